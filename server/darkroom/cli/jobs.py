"""`darkroom jobs`: look at jobs in the queue, and at those that were given up."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from darkroom.cli.common import EXIT_FAILED, AsJson, DataDir, RedisUrl, print_table, with_queue
from darkroom.errors import DarkroomError, InvalidRequest, QueueUnavailable

if TYPE_CHECKING:
    from darkroom.queue import JobQueue

jobs = typer.Typer(help="Look at jobs in the queue, and at those that were given up.", no_args_is_help=True)
dead = typer.Typer(
    help="Dead letters: jobs that were given up because several workers were lost while they ran them.",
    no_args_is_help=True,
)
jobs.add_typer(dead, name="dead")

JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job.")]
LetterIds = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of dead letters, or of their jobs.")
]


@jobs.command()
def show(job_id: JobId, redis_url: RedisUrl = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show what became of a job."""
    import json

    import msgspec

    status = with_queue(redis_url, data_dir, lambda queue: queue.status(job_id))
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
    print_table(rows)


@jobs.command()
def cancel(job_id: JobId, redis_url: RedisUrl = None, data_dir: DataDir = None) -> None:
    """Cancel a job that waits or runs; one that has ended stays as it is."""
    status = with_queue(redis_url, data_dir, lambda queue: queue.cancel(job_id))
    asked = "" if status.state.is_terminal else "; its worker was asked to drop it"
    typer.echo(f"{job_id} is {status.state.value}{asked}")


@dead.command("list")
def list_dead(redis_url: RedisUrl = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List the dead letters, oldest first. At most a thousand are kept."""
    import json

    from darkroom.queue.dead_letters import shown

    letters = with_queue(redis_url, data_dir, lambda queue: queue.dead_letters.all())
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
    print_table(rows)


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

    if with_queue(redis_url, data_dir, run):
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

    count = with_queue(redis_url, data_dir, run)
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
