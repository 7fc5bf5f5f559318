"""`darkroom generate`: pictures from a prompt, in this process or by a running server."""

from __future__ import annotations

import base64
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from darkroom.config import Settings
from darkroom.errors import DarkroomError, InvalidRequest, JobError, RequestError, Unavailable

OnProgress = Callable[[int, int], None]
_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_TERMINAL_EVENTS = ("succeeded", "failed", "cancelled", "expired")
_MAX_FAILURES = 20
_RETRY_S = 0.5
# How long Ctrl-C waits for the server, for the job's id and again for its cancellation.
_CANCEL_S = 2.0


@dataclass(frozen=True)
class Pictures:
    """What came out: the files' bytes, each with its seed, and where the time went in seconds."""

    contents: Sequence[bytes]
    seeds: Sequence[int]
    sampler: str
    num_inference_steps: int
    seconds: Mapping[str, float]


def output_format_of(out: Path, named: str | None) -> str:
    """The format asked for, else the one the file name says. Raises `InvalidRequest` when neither helps."""
    if named is not None:
        return named
    if out.suffix.lower() not in _FORMATS:
        raise InvalidRequest("-o", out.name, "a name that ends in .png, .jpg or .webp, or --format")
    return _FORMATS[out.suffix.lower()]


def paths_of(out: Path, count: int) -> list[Path]:
    """`out` itself, or for several pictures `out-0`, `out-1` and so on."""
    return [out] if count == 1 else [out.with_name(f"{out.stem}-{index}{out.suffix}") for index in range(count)]


def picture_in(path: Path | None, option: str) -> str | None:
    """A file as `POST /generate` takes it. Raises `InvalidRequest` when it cannot be read."""
    try:
        return None if path is None else base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise InvalidRequest(option, str(path), "a file that can be read") from error


def generate_here(
    fields: Mapping[str, Any], model_source: str | Path, settings: Settings, on_progress: OnProgress
) -> Pictures:
    """Load the model and draw, with no server and no Redis. `fields` are those of `POST /generate`.

    Raises `RequestError`, `ModelError`, `ConfigError` or `JobError`.
    """
    from darkroom.api.body import parse_fields
    from darkroom.api.resolve import accepted_values, check_cost, check_limits, complete, cost_of, with_inputs
    from darkroom.api.schema import GenerateRequest

    accepted = accepted_values(settings)
    body = parse_fields(GenerateRequest, dict(fields), accepted)
    check_limits(body, settings, accepted)
    begun_with = None
    if body.init_image is not None:
        from darkroom.api.pictures import read_pictures

        begun_with = read_pictures(body.init_image, body.mask_image, max_pixels=settings.max_image_pixels)
    # torch takes seconds to import, and a refused request none.
    from darkroom.engine.local import generate_images
    from darkroom.worker.main import load_models

    (model,) = load_models(settings, [model_source]).values()
    request = complete(body, model.card, str(fields["output_format"]), begun_with)
    inputs: dict[str, bytes] = {}
    if begun_with is not None:
        from darkroom.api.pictures import fitted

        inputs = fitted(begun_with, request.width, request.height, body.resize_mode)
        request = with_inputs(request, inputs)
    check_cost(cost_of(request, model.card), settings)
    contents, result = generate_images(model, request, settings, on_progress, inputs)
    timings = result.timings
    return Pictures(
        contents,
        [image.seed for image in result.images],
        request.sampler,
        request.num_inference_steps,
        {"encode": timings.encode_s, "denoise": timings.denoise_s, "decode": timings.decode_s},
    )


def generate_there(
    fields: Mapping[str, Any], url: str, on_progress: OnProgress, *, api_key: str | None = None
) -> Pictures:
    """Let the server at `url` draw, following its events. Leaving early (Ctrl-C) cancels the job.

    Raises `RequestError` when the server refuses the request, `Unavailable` when it cannot take it now, `JobError` when
    the job ends without pictures.
    """
    with _client(url, 30.0, api_key) as client, _reachable(url):
        asked: Future[httpx.Response] = Future()
        try:
            _post(client, {**fields, "mode": "async"}, asked)
            accepted = _checked(asked.result()).json()
            _follow(client, accepted["events_url"], on_progress)
            job = _checked(client.get(accepted["url"])).json()
        except KeyboardInterrupt:
            # Where the server does not answer any more, an interruption is still one.
            with suppress(DarkroomError, httpx.HTTPError, TimeoutError, ValueError, LookupError):
                accepted = _checked(asked.result(_CANCEL_S)).json()
                client.delete(accepted["url"], timeout=_CANCEL_S)
            raise
        if job["state"] != "succeeded":
            failure = job["failure"] or {"message": f"the job was {job['state']}", "code": job["state"]}
            raise JobError(failure["message"], code=failure["code"])
        contents = [_checked(client.get(image["url"])).content for image in job["images"]]
    manifest = job["manifest"]
    timings: dict[str, float] = manifest["timings"]
    return Pictures(
        contents,
        manifest["seeds"],
        manifest["sampler"],
        manifest["num_inference_steps"],
        {name.removesuffix("_s"): seconds for name, seconds in timings.items()},
    )


def _post(client: httpx.Client, body: Mapping[str, Any], asked: Future[httpx.Response]) -> None:
    """Ask for a job in a thread of its own, so that an interruption does not lose the id of a job that was accepted."""

    def post() -> None:
        try:
            asked.set_result(client.post("/generate", json=body))
        except Exception as error:
            asked.set_exception(error)

    threading.Thread(target=post, name="post", daemon=True).start()


def fetch_models(url: str, *, api_key: str | None = None) -> list[dict[str, Any]]:
    """The cards of the models that the server at `url` serves. Raises `Unavailable`, `RequestError`."""
    with _client(url, 10.0, api_key) as client, _reachable(url):
        models: list[dict[str, Any]] = _checked(client.get("/models")).json()["models"]
        return models


def _client(url: str, timeout_s: float, api_key: str | None) -> httpx.Client:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(base_url=url, timeout=timeout_s, follow_redirects=True, headers=headers)


@contextmanager
def _reachable(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise InvalidRequest("--url", url, "an address such as http://127.0.0.1:8000") from error
    except httpx.HTTPError as error:
        raise Unavailable(f"{url} does not answer: {error}") from error
    except (ValueError, LookupError) as error:
        raise Unavailable(f"{url} does not answer as Darkroom does") from error


def _checked(reply: httpx.Response) -> httpx.Response:
    """The reply, unless it is an error: then the problem's own words."""
    if reply.is_success:
        return reply
    try:
        problem = reply.json()
        message, code = str(problem["detail"]), str(problem["code"])
    except (ValueError, LookupError, TypeError):
        message, code = f"{reply.request.url} answered {reply.status_code}", "unavailable"
    if reply.status_code in (429, 503):
        wait_s = reply.headers.get("retry-after", "")
        again = f"; try again in {wait_s} s" if wait_s.isdecimal() else ""
        raise Unavailable(f"{message}{again}", retry_after_s=float(wait_s) if again else 1.0)
    if 400 <= reply.status_code < 500:
        raise RequestError(message, code=code)
    raise DarkroomError(message, code=code)


def _follow(client: httpx.Client, events_url: str, on_progress: OnProgress) -> None:
    """Report progress until the job has ended, taking the stream up again where it breaks off.

    A server that is restarted comes back within seconds; one that stays away for longer is given up.
    """
    last_id, failures = "", 0
    while True:
        headers = {"accept": "text/event-stream", **({"last-event-id": last_id} if last_id else {})}
        try:
            with client.stream("GET", events_url, headers=headers) as reply:
                if not reply.is_success:
                    reply.read()
                for event in read_events(_checked(reply).iter_lines()):
                    if event.get("id", last_id) != last_id:
                        failures, last_id = 0, event["id"]
                    data = json.loads(event.get("data", "{}"))
                    if data.get("num_steps"):
                        on_progress(data["step"], data["num_steps"])
                    if event.get("event") in _TERMINAL_EVENTS:
                        return
            if failures >= _MAX_FAILURES:
                raise Unavailable("the server's events end again and again before the job has ended")
        except httpx.ReadTimeout:
            continue  # the job waits in the queue and nothing happened to it
        except (httpx.TransportError, Unavailable):
            if failures >= _MAX_FAILURES:
                raise
        failures += 1
        time.sleep(_RETRY_S)


def read_events(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Server-sent events as dicts of their fields; comments are skipped."""
    event: dict[str, str] = {}
    for line in lines:
        if not line:
            if event:
                yield event
            event = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            event[name] = value.removeprefix(" ")


@contextmanager
def progress_bar(first: str) -> Iterator[OnProgress]:
    """A bar on stderr, gone once done. It says `first` until the first step; the callback may come from any thread."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(first, total=None)

        def on_progress(step: int, num_steps: int) -> None:
            bar.update(task, description="drawing", completed=step, total=num_steps)

        yield on_progress


def report(paths: Sequence[Path], pictures: Pictures, total_s: float) -> list[str]:
    """One line for each file, with the seed that makes it again, and one on the time."""
    width = max(len(str(path)) for path in paths)
    lines = [f"{path!s:<{width}}  seed {seed}" for path, seed in zip(paths, pictures.seeds, strict=True)]
    parts = ", ".join(f"{name} {_rounded(seconds)} s" for name, seconds in pictures.seconds.items())
    lines.append(f"{pictures.sampler}, {pictures.num_inference_steps} steps, {total_s:.1f} s ({parts})")
    return lines


def _rounded(seconds: float) -> str:
    """Two significant digits, never in exponent form."""
    digits = 1 if seconds <= 0 else max(0, 1 - math.floor(math.log10(seconds)))
    return f"{seconds:.{min(digits, 3)}f}"
