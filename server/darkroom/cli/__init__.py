"""The command line: `darkroom up | api | worker | generate | models | jobs | keys | bench`.

Exit codes: 0 done or stopped as asked, 1 failed, 2 a bad setting, model or request, 130 interrupted. What a command
needs is imported inside it, so that `darkroom --help` is quick and the API never loads torch.
"""

from __future__ import annotations

import os
import sys
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from darkroom import __version__
from darkroom.cli.bench import bench
from darkroom.cli.common import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, DataDir, RedisUrl, print_table, read_settings
from darkroom.cli.jobs import jobs
from darkroom.cli.keys import keys
from darkroom.errors import (
    EXIT_DEVICE_LOST,
    ConfigError,
    DarkroomError,
    DeviceLost,
    InvalidRequest,
    ModelError,
    RequestError,
)

if TYPE_CHECKING:
    from darkroom.config import Settings

app = typer.Typer(
    name="darkroom",
    help="Prompts in, pictures out: a serving engine for latent diffusion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(keys, name="keys")
app.add_typer(bench, name="bench")
app.add_typer(jobs, name="jobs")

ModelPaths = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="PATH",
        help="Model directory, or org/name on the Hugging Face hub; may be given again. (default: the built-in models)",
    ),
]
Host = Annotated[str | None, typer.Option(help="Address to bind to. (default: DARKROOM_HOST or 127.0.0.1)")]
Port = Annotated[int | None, typer.Option(help="Port, 0 for a free one. (default: DARKROOM_PORT or 8000)")]


class Format(str, Enum):
    """What `generate` can write."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


def main() -> None:
    """Run the command line and exit. A known error is one line on stderr, never a traceback."""
    if "DARKROOM_PARENT" in os.environ:
        from darkroom.supervisor import die_with_parent

        die_with_parent()
    try:
        app()
    except DarkroomError as error:
        print(f"darkroom: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if isinstance(error, DeviceLost):
            sys.exit(EXIT_DEVICE_LOST)
        sys.exit(EXIT_USAGE if isinstance(error, (ConfigError, ModelError, RequestError)) else EXIT_FAILED)
    except Exception:
        import structlog

        structlog.get_logger("darkroom.cli").exception("unexpected_error")
        sys.exit(EXIT_FAILED)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"darkroom {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def up(
    model: ModelPaths = None,
    host: Host = None,
    port: Port = None,
    data_dir: DataDir = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Worker processes. (default: one for each GPU, else one)"),
    ] = None,
) -> None:
    """Start everything on this machine and keep it running."""
    import asyncio

    settings = read_settings("up", host=host, port=port, data_dir=data_dir)
    from darkroom.up import run_up

    raise typer.Exit(asyncio.run(run_up(settings, model or [], workers)))


@app.command()
def api(redis_url: RedisUrl = None, host: Host = None, port: Port = None) -> None:
    """Run the HTTP API alone."""
    settings = read_settings("api", redis_url=redis_url, host=host, port=port)
    queue_url = _redis_url(settings)
    from darkroom.api.server import serve

    serve(settings, queue_url)
    _leave()


@app.command()
def worker(model: ModelPaths = None, redis_url: RedisUrl = None) -> None:
    """Run one worker alone: it claims jobs and draws them."""
    settings = read_settings("worker", redis_url=redis_url)
    queue_url = _redis_url(settings)
    from darkroom.worker.main import run_worker

    run_worker(settings, queue_url, model or [])
    _leave()


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture should show.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("picture.png"),
    negative: Annotated[str, typer.Option(help="What it should not show.")] = "",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance weight; 1 or less turns it off.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same picture. (default: random)")] = None,
    sampler: Annotated[str | None, typer.Option(help="Sampler, such as dpmpp_2m.")] = None,
    sigma_schedule: Annotated[str | None, typer.Option(help="Spacing of the noise levels.")] = None,
    prompt_syntax: Annotated[
        str | None,
        typer.Option(help="plain, or weighted: (word:1.3), [word], BREAK, and any length. (default: plain)"),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    init_image: Annotated[Path | None, typer.Option(metavar="FILE", help="Picture to begin with.")] = None,
    mask: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What of it to draw anew: white is new, black is kept.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of it may change, up to 1. (default: 0.8, with a mask 1)")
    ] = None,
    resize_mode: Annotated[
        str | None, typer.Option(help="For other proportions: stretch, crop or fill. (default: stretch)")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", help="Pictures; they go to out-0.png, out-1.png, ...")] = 1,
    output_format: Annotated[
        Format | None, typer.Option("--format", help="File format. (default: as the file is called)")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="As for `up`, or with --url the id of a served model.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Server to ask. (default: draw in this process)")] = None,
) -> None:
    """Draw a prompt into a file."""
    settings = read_settings("generate", log_level="warning")
    from darkroom.config import BUILTIN_MODEL
    from darkroom.generate import (
        generate_here,
        generate_there,
        output_format_of,
        paths_of,
        picture_in,
        progress_bar,
        report,
    )

    began = time.monotonic()
    options: dict[str, Any] = {
        "negative_prompt": negative or None,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "seed": seed,
        "sampler": sampler,
        "sigma_schedule": sigma_schedule,
        "prompt_syntax": prompt_syntax,
        "width": width,
        "height": height,
        "init_image": picture_in(init_image, "--init-image"),
        "mask_image": picture_in(mask, "--mask"),
        "strength": strength,
        "resize_mode": resize_mode,
        "model": model if url is not None else None,
    }
    fields = {
        "prompt": prompt,
        "num_images_per_prompt": count,
        "output_format": output_format_of(out, output_format.value if output_format else None),
        **{name: value for name, value in options.items() if value is not None},
    }
    if not out.parent.is_dir():
        raise InvalidRequest("-o", str(out), "a file in a directory that exists")
    try:
        with progress_bar("waiting" if url is not None else "loading the model") as on_progress:
            if url is not None:
                pictures = generate_there(fields, url, on_progress, api_key=api_key_of(settings))
            else:
                pictures = generate_here(fields, model or BUILTIN_MODEL, settings, on_progress)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    paths = paths_of(out, len(pictures.contents))
    for path, content in zip(paths, pictures.contents, strict=True):
        try:
            path.write_bytes(content)
        except OSError as error:
            raise DarkroomError(f"cannot write {path}: {error.strerror}") from error
    for line in report(paths, pictures, time.monotonic() - began):
        typer.echo(line)


@app.command()
def models(
    path: Annotated[
        list[str] | None, typer.Argument(metavar="PATH...", help="Model directories to list as well.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="List the models of this server instead.")] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Estimate the GPU memory of each, in GiB, by model rows in a tick.")
    ] = False,
) -> None:
    """List the built-in models, given directories, or the models of a server."""
    import msgspec

    from darkroom.config import builtin_models

    settings = read_settings("models", log_level="warning")
    if memory:
        from darkroom.worker.main import memory_table

        print_table(memory_table(settings, [*builtin_models(), *(path or [])]))
        return
    if url is not None:
        from darkroom.generate import fetch_models

        cards = fetch_models(url, api_key=api_key_of(settings))
    else:
        from darkroom.worker.main import read_cards

        cards = [msgspec.to_builtins(card) for card in read_cards([*builtin_models(), *(path or [])])]
    rows: list[tuple[str, ...]] = [("MODEL", "FAMILY", "SIZE", "STEPS", "SAMPLER", "WEIGHTS", "LICENCE")]
    for card in cards:
        size, digest = f"{card['width']}x{card['height']}", card["weights_hash"].rpartition(":")[2][:12]
        steps, licence = str(card["num_inference_steps"]), card["license"] or "-"
        rows.append((card["id"], card["family"], size, steps, card["sampler"], digest, licence))
    print_table(rows)


def api_key_of(settings: Settings) -> str | None:
    return settings.api_key.get_secret_value() if settings.api_key else None


def _leave() -> NoReturn:
    """End a service that has nothing left to do. The interpreter's teardown takes long once torch is loaded."""
    sys.stderr.flush()
    os._exit(0)


def _redis_url(settings: Settings) -> str:
    if settings.redis_url is None:
        raise ConfigError(
            "DARKROOM_REDIS_URL is not set: a process of its own needs the queue's address; `darkroom up` needs none"
        )
    return settings.redis_url
