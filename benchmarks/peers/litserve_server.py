"""LitServe with request batching, as one uses it for diffusers: `python -m benchmarks.peers.litserve_server`.

LitServe collects up to `--max-batch-size` requests, or what came within `--batch-timeout`. A pipeline wants equal
steps, guidance and size in one call, so a batch is split into groups of equals, one call each.
"""

# No deferred annotations here: LitServe reads the type of a request from `decode_request`.
import argparse
from typing import Any

import litserve
from darkroom.jobs import GenerationRequest
from starlette.responses import Response

from benchmarks.peers import Peer
from benchmarks.peers.wire import groups_of, png_of, request_of


class Diffusers(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.peer = Peer.as_served()

    def decode_request(self, request: dict[str, Any]) -> GenerationRequest:
        return request_of(request)

    def predict(self, x: list[GenerationRequest]) -> list[Any]:
        images: dict[int, Any] = {}
        for places in groups_of(x):
            images.update(zip(places, self.peer.draw_group([x[place] for place in places]), strict=True))
        return [images[place] for place in range(len(x))]

    def encode_response(self, output: Any) -> Response:
        return Response(png_of(output), media_type="image/png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--max-batch-size", type=int, default=32)
    parser.add_argument("--batch-timeout", type=float, default=0.05, help="seconds")
    arguments = parser.parse_args()
    api = Diffusers(
        max_batch_size=arguments.max_batch_size, batch_timeout=arguments.batch_timeout, api_path="/generate"
    )
    # No limit on the time in its queue: nobody else has one in this comparison.
    server = litserve.LitServer(api, timeout=False)
    server.run(host="127.0.0.1", port=arguments.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
