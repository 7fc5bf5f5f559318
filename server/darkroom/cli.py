"""The command line: `darkroom up | api | worker | generate | models | jobs | keys | bench`.

Exit codes: 0 done or stopped as asked, 1 failed, 2 a bad setting, model or request, 130 interrupted. What a command
needs is imported inside it, so that `darkroom --help` is quick and the API never loads torch.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from darkroom import __version__
from darkroom.errors import (
    EXIT_DEVICE_LOST,
    ConfigError,
    DarkroomError,
    DeviceLost,
    InvalidRequest,
    ModelError,
    QueueUnavailable,
    RequestError,
)
from darkroom.jobs import Priority

if TYPE_CHECKING:
    from darkroom.config import Settings
    from darkroom.queue import JobQueue

_Reply = TypeVar("_Reply")

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="darkroom",
    help="Prompts in, pictures out: a serving engine for latent diffusion.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

keys = typer.Typer(help="API keys of a server with DARKROOM_AUTH=keys.", no_args_is_help=True)
app.add_typer(keys, name="keys")
bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")

jobs = typer.Typer(help="Look at jobs in the queue, and at those that were given up.", no_args_is_help=True)
app.add_typer(jobs, name="jobs")

dead = typer.Typer(
    help="Dead letters: jobs that were given up because several workers were lost while they ran them.",
    no_args_is_help=True,
)
jobs.add_typer(dead, name="dead")

ModelPaths = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="PATH",
        help="Model directory, or org/name on the Hugging Face hub; may be given again. (default: the built-in model)",
    ),
]
DataDir = Annotated[Path | None, typer.Option(metavar="PATH", help="Where the private Redis keeps its data.")]
RedisUrl = Annotated[str | None, typer.Option(metavar="URL", help="Redis to use. (default: DARKROOM_REDIS_URL)")]
Host = Annotated[str | None, typer.Option(help="Address to bind to. (default: DARKROOM_HOST or 127.0.0.1)")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
LetterIds = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of dead letters, or of their jobs.")
]
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

    settings = _settings("up", host=host, port=port, data_dir=data_dir)
    from darkroom.up import run_up

    raise typer.Exit(asyncio.run(run_up(settings, model or [], workers)))


@app.command()
def api(redis_url: RedisUrl = None, host: Host = None, port: Port = None) -> None:
    """Run the HTTP API alone."""
    settings = _settings("api", redis_url=redis_url, host=host, port=port)
    queue_url = _redis_url(settings)
    from darkroom.api.server import serve

    serve(settings, queue_url)
    _leave()


@app.command()
def worker(model: ModelPaths = None, redis_url: RedisUrl = None) -> None:
    """Run one worker alone: it claims jobs and draws them."""
    settings = _settings("worker", redis_url=redis_url)
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
    settings = _settings("generate", log_level="warning")
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
                pictures = generate_there(fields, url, on_progress, api_key=_api_key(settings))
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
    """List the built-in model, given directories, or the models of a server."""
    import msgspec

    settings = _settings("models", log_level="warning")
    if memory:
        from darkroom.config import BUILTIN_MODEL
        from darkroom.worker.main import memory_table

        _print_table(memory_table(settings, [str(BUILTIN_MODEL), *(path or [])]))
        return
    if url is not None:
        from darkroom.generate import fetch_models

        cards = fetch_models(url, api_key=_api_key(settings))
    else:
        from darkroom.config import BUILTIN_MODEL
        from darkroom.worker.main import read_cards

        cards = [msgspec.to_builtins(card) for card in read_cards([str(BUILTIN_MODEL), *(path or [])])]
    rows: list[tuple[str, ...]] = [("MODEL", "FAMILY", "SIZE", "STEPS", "SAMPLER", "WEIGHTS", "LICENCE")]
    for card in cards:
        size, digest = f"{card['width']}x{card['height']}", card["weights_hash"].rpartition(":")[2][:12]
        steps, licence = str(card["num_inference_steps"]), card["license"] or "-"
        rows.append((card["id"], card["family"], size, steps, card["sampler"], digest, licence))
    _print_table(rows)


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="What the key is called in lists.")],
    tenant: Annotated[
        str | None, typer.Option(help="Whose jobs it sees; several keys may share one. (default: the name)")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="generate, read (its tenant's jobs) or admin (all); may be given again. (default: generate)"),
    ] = None,
    weight: Annotated[float, typer.Option(min=0.01, max=100, help="Share of the workers beside other tenants.")] = 1,
    rate: Annotated[str | None, typer.Option(help="Calls per s, m, h or d, such as 60/m. (default: no limit)")] = None,
    burst: Annotated[int | None, typer.Option(min=1, help="Calls that may come at once. (default: the rate's)")] = None,
    max_cost: Annotated[
        int | None,
        typer.Option(min=1, help="Most that its unfinished jobs may cost: model rows × evaluations × latent pixels."),
    ] = None,
    priority: Annotated[Priority, typer.Option(help="Highest class it may ask for.")] = Priority.HIGH,
    expires: Annotated[str | None, typer.Option(help="When it ends: 90d, 12h or 2030-01-31. (default: never)")] = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
) -> None:
    """Make a key and print it. It is shown this once: Darkroom keeps its hash alone."""
    import asyncio

    settings = _settings("keys", log_level="warning", data_dir=data_dir, redis_url=redis_url)
    from darkroom.keys import create

    key, token = asyncio.run(
        create(
            settings,
            name=name,
            tenant=tenant,
            scopes=scope or ["generate"],
            weight=weight,
            rate=rate,
            burst=burst,
            max_cost=max_cost,
            priority=priority,
            expires=expires,
        )
    )
    typer.echo(f"key {key.id} of tenant {key.tenant}; it is shown this once:", err=True)
    typer.echo(token)


@keys.command("list")
def list_keys(data_dir: DataDir = None, redis_url: RedisUrl = None) -> None:
    """List the keys there are, without their secrets."""
    import asyncio

    settings = _settings("keys", log_level="warning", data_dir=data_dir, redis_url=redis_url)
    from darkroom.keys import table

    _print_table(asyncio.run(table(settings)))


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")],
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
) -> None:
    """End a key. Servers refuse it within two seconds; jobs that it has asked for go on."""
    import asyncio

    settings = _settings("keys", log_level="warning", data_dir=data_dir, redis_url=redis_url)
    from darkroom.keys import revoke

    asyncio.run(revoke(settings, key_id))
    typer.echo(f"key {key_id} is revoked")


def _api_key(settings: Settings) -> str | None:
    return settings.api_key.get_secret_value() if settings.api_key else None


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@jobs.command()
def show(job_id: JobId, redis_url: RedisUrl = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show what became of a job."""
    import json

    import msgspec

    status = _with_queue(redis_url, data_dir, lambda queue: queue.status(job_id))
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(status)))
        return
    request = status.job.request
    rows = [("JOB", job_id), ("STATE", status.state.value)]
    if status.position is not None:
        rows.append(("JOBS AHEAD", str(status.position)))
    rows += [
        ("STEPS", f"{status.step} of {status.num_steps}" if status.num_steps else "-"),
        ("ATTEMPTS", f"{status.job.attempt}, {status.job.failures} workers lost"),
        ("ACCEPTED", _when(status.job.created_at_ms)),
        ("ENDED", _when(status.finished_at_ms) if status.finished_at_ms else "-"),
        ("MODEL", request.model),
        ("PICTURES", f"{request.num_images_per_prompt} of {request.width}x{request.height}"),
        ("PROMPT", _short(request.prompt)),
    ]
    if status.failure is not None:
        rows.append(("FAILURE", f"{status.failure.code}: {status.failure.message}"))
    _print_table(rows)


@jobs.command()
def cancel(job_id: JobId, redis_url: RedisUrl = None, data_dir: DataDir = None) -> None:
    """Cancel a job that waits or runs; one that has ended stays as it is."""
    status = _with_queue(redis_url, data_dir, lambda queue: queue.cancel(job_id))
    asked = "" if status.state.is_terminal else "; its worker was asked to drop it"
    typer.echo(f"{job_id} is {status.state.value}{asked}")


@dead.command("list")
def list_dead(redis_url: RedisUrl = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List the dead letters, oldest first. At most a thousand are kept."""
    import json

    from darkroom.queue.dead_letters import shown

    letters = _with_queue(redis_url, data_dir, lambda queue: queue.dead_letters.all())
    if as_json:
        typer.echo(json.dumps([shown(letter) for letter in letters]))
        return
    if not letters:
        typer.echo("There are no dead letters.")
        return
    rows = [("LETTER", "JOB", "GIVEN UP", "LOST", "LAST WORKER", "REASON", "MODEL", "PROMPT")]
    for letter in letters:
        model, prompt = (
            ("?", "cannot be read")
            if letter.job is None
            else (letter.job.request.model, _short(letter.job.request.prompt))
        )
        given_up, lost = _when(letter.written_at_ms), str(letter.failures)
        rows.append((letter.id, letter.job_id, given_up, lost, letter.worker, letter.reason, model, prompt))
    _print_table(rows)


@dead.command()
def replay(
    letter_ids: LetterIds = None,
    every: Annotated[bool, typer.Option("--all", help="Replay every letter.")] = False,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Queue what letters ask for once more, as new jobs with new ids, and remove the letters.

    The old jobs stay failed. A letter that is replayed twice gives one job. Mend what killed the workers first, or the
    same requests kill them again.
    """
    _check_choice(letter_ids, every, "--all")

    async def run(queue: JobQueue) -> int:
        letters = await (queue.dead_letters.all() if every else queue.dead_letters.find(letter_ids or []))
        num_failed = 0
        for letter in letters:
            try:
                enqueued = await queue.dead_letters.replay(letter)
            except QueueUnavailable:
                raise
            except DarkroomError as error:
                num_failed += 1
                print(f"darkroom: {letter.id} is not replayed: {error}", file=sys.stderr)
            else:
                typer.echo(f"{letter.id}: job {letter.job_id} is now job {enqueued.job_id}")
        if not letters:
            typer.echo("There are no dead letters.")
        return num_failed

    if _with_queue(redis_url, data_dir, run):
        raise typer.Exit(EXIT_FAILED)


@dead.command()
def purge(
    letter_ids: LetterIds = None,
    every: Annotated[bool, typer.Option("--all", help="Remove every letter.")] = False,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Remove those given up longer ago: 90s, 15m, 12h or 7d.")
    ] = None,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Remove letters for good, and with them the prompts they hold. Their jobs stay failed."""
    _check_choice(letter_ids, every, "--all", older_than is not None, "--older-than")
    age_s = _seconds(older_than) if older_than is not None else 0

    async def run(queue: JobQueue) -> int:
        letters = await (queue.dead_letters.find(letter_ids) if letter_ids else queue.dead_letters.all())
        if age_s:
            written_before_ms = await queue.dead_letters.server_ms() - age_s * 1000
            letters = [letter for letter in letters if letter.written_at_ms < written_before_ms]
        return await queue.dead_letters.purge(letters)

    count = _with_queue(redis_url, data_dir, run)
    typer.echo(f"{count} dead {'letter' if count == 1 else 'letters'} removed.")


def _check_choice(ids: Sequence[str] | None, *choices: bool | str) -> None:
    """Raise `InvalidRequest` unless exactly one of ids and options says which letters are meant."""
    names = [str(name) for name in choices[1::2]]
    if [bool(ids), *map(bool, choices[::2])].count(True) != 1:
        raise InvalidRequest("ID", " ".join(ids or []), f"either ids of letters or {' or '.join(names)}")


def _seconds(age: str) -> int:
    import re

    found = re.fullmatch(r"([1-9]\d{0,5})([smhd])", age)
    if found is None:
        raise InvalidRequest("--older-than", age, "a number and a unit, as 90s, 15m, 12h or 7d")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _when(ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ms / 1000))


def _short(text: str, limit: int = 40) -> str:
    """A prompt on one line of a table, without what would move a terminal's cursor."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _with_queue(redis_url: str | None, data_dir: Path | None, run: Callable[[JobQueue], Awaitable[_Reply]]) -> _Reply:
    """Run something against the queue of a Redis, or of a data directory, whether or not a server runs on it."""
    import asyncio

    settings = _settings("jobs", redis_url=redis_url, data_dir=data_dir, log_level="error")
    from darkroom.queue import JobQueue, redis_of

    # A data directory that is named means the private Redis in it, whatever the environment says.
    if data_dir is not None and redis_url is None:
        settings = settings.model_copy(update={"redis_url": None})

    async def connected(url: str) -> _Reply:
        queue = JobQueue(settings, url)
        try:
            return await run(queue)
        finally:
            await queue.close()

    with redis_of(settings) as url:
        return asyncio.run(connected(url))


@bench.command()
def kernels(
    tune: Annotated[
        bool, typer.Option("--tune", help="Try every form and tile, and rewrite the tables that `auto` reads.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="SDXL's shapes alone.")] = False,
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", help="With --tune: begin no shape after this.")] = 480,
    device: Annotated[str, typer.Option(help="cuda or cuda:N; cpu runs toy shapes, which say nothing of speed.")] = (
        "cuda"
    ),
) -> None:
    """Time the kernels at the shapes of SD 1.5, SD 2.1 and SDXL, against what PyTorch offers."""
    _settings("bench", log_level="error")
    from darkroom.worker.main import choose_device

    place = choose_device(device)
    if tune and place.type == "cpu":
        raise ConfigError("--tune: tiles are tuned on a CUDA device")
    from darkroom_kernels.bench.report import bench_kernels, tune_attention, tune_kernels

    if tune:
        # The others first: they take seconds, and attention the rest of the time.
        began_s = time.monotonic()
        tune_kernels(place, quick=quick, time_limit_s=time_limit, say=typer.echo)
        left_s = time_limit - (time.monotonic() - began_s)
        tune_attention(place, quick=quick, time_limit_s=left_s, say=typer.echo)
    else:
        bench_kernels(place, quick=quick, say=typer.echo)


def _leave() -> NoReturn:
    """End a service that has nothing left to do. The interpreter's teardown takes long once torch is loaded."""
    sys.stderr.flush()
    os._exit(0)


def _settings(process: str, **overrides: object) -> Settings:
    """Read the settings, options over variables, and start logging under the name that `up` gave this process."""
    from darkroom import logs
    from darkroom.config import load_settings

    settings = load_settings(**{name: value for name, value in overrides.items() if value is not None})
    process = os.environ.get("DARKROOM_PROCESS", process)
    logs.configure(settings.log_level, process=process, with_prompts=settings.log_prompts)
    return settings


def _redis_url(settings: Settings) -> str:
    if settings.redis_url is None:
        raise ConfigError(
            "DARKROOM_REDIS_URL is not set: a process of its own needs the queue's address; `darkroom up` needs none"
        )
    return settings.redis_url
