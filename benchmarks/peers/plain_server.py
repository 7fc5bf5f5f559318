"""What people write first: FastAPI, a diffusers pipeline and a lock. `python -m benchmarks.peers.plain_server`."""

from __future__ import annotations

import argparse
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.responses import Response

from benchmarks.peers import Peer
from benchmarks.peers.wire import png_of, request_of


def create_app(peer: Peer) -> FastAPI:
    """`POST /generate` draws one picture at a time; those that came meanwhile wait in threads."""
    app, lock = FastAPI(), threading.Lock()

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/generate")
    def generate(body: dict[str, Any]) -> Response:
        with lock:
            image = peer.draw(request_of(body))
        return Response(png_of(image), media_type="image/png")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8001)
    arguments = parser.parse_args()
    uvicorn.run(create_app(Peer.as_served()), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
