"""Random kills, stops, drains and partitions under load, from one seed, and what they cost."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import signal
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from darkroom.engine.checkpoint import HEADER
from darkroom.errors import QueueUnavailable
from darkroom.jobs import Job, decode
from darkroom.queue.keys import Keys

from benchmarks.record import Figure
from tests.chaos import shims
from tests.chaos.load import Book, Client, make_bodies
from tests.chaos.stack import Member, Stack
from tests.chaos.verdict import Record, Verdict, read_records, server_ms, wait_until
from tests.support.engines import pixels

NUM_WORKERS, NUM_APIS, NUM_CLIENTS = 3, 2, 6
LEASE_S, CHECKPOINT_S, ROWS = 2.0, 0.3, 4
PERIOD_S = 1.0
PAUSE_S = 0.4
# So long after an outage a worker writes checkpoints again: it tries each second, each two while Redis loads its data.
CALM_S = 4.0
# Redis answers, a supervisor starts processes again, and a client's last request ends.
REST_S = 240.0


@dataclass(frozen=True)
class Hit:
    """A job that a killed worker had. `repeated_steps` are those that its image with the most of them did and no
    checkpoint holds, `repeated_s` from the beginning of the first to the end of the last. The worker had Redis within
    reach for `calm_s`."""

    job_id: str
    attempt: int
    failures: int
    at_ms: int
    repeated_steps: int
    repeated_s: float
    calm_s: float


class HandBack(NamedTuple):
    """A job that a drained worker handed back: how many steps of its images were done by then, and how many of these
    the next worker did again."""

    num_kept: int
    num_repeated: int


@dataclass
class Figures:
    """Seconds from a kill to the next claim of the job, where rows were free; seconds and steps of work done again, of
    workers that had Redis within reach, and seconds of those that had not."""

    reclaimed_s: list[float] = field(default_factory=list)
    num_crowded: int = 0
    repeated_s: list[float] = field(default_factory=list)
    repeated_steps: list[int] = field(default_factory=list)
    repeated_after_outage_s: list[float] = field(default_factory=list)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


class Campaign:
    """`kills` makes that many kills, and stops, drains and partitions between them; `restarts` restarts everything in
    turn. Both under the same load, and both return their verdict and the line that sums it up."""

    def __init__(
        self, stack: Stack, seed: int, *, num_workers: int = NUM_WORKERS, say: Callable[[str], None] = print
    ) -> None:
        self.stack, self._say, self._seed = stack, say, seed
        self._names = [f"api-{n}" for n in range(NUM_APIS)] + [f"worker-{n}" for n in range(num_workers)]
        self._dice = random.Random(seed)
        self._bodies = make_bodies(random.Random(seed))
        self._expected: dict[tuple[int, int], Any] = {}
        self._balanced = {"up"}
        self.book = Book()
        self.faults: Counter[str] = Counter()
        self.num_kills = 0
        self.problems: list[str] = []
        self.hits: list[Hit] = []
        self.drained: list[Member] = []
        self.drains_s: list[float] = []
        self.figures: list[Figure] = []
        self._redis_back_s = -math.inf
        self._mended_s: dict[str, float] = {}
        self._up_since: dict[str, int] = {}
        self._up_spans: list[tuple[int, int]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._began = self._told_at = time.monotonic()

    async def kills(self, num_kills: int) -> tuple[Verdict, str]:
        async with self._under_load():
            await self._wreck(num_kills)
        verdict, records = await self._judge()
        took_s = time.monotonic() - self._began
        self._tell_cost(self._figures(records))
        self._say(f"{self.num_kills} kills in {took_s / 60:.1f} minutes: {60 * self.num_kills / took_s:.0f} a minute")
        self._tell(verdict)
        detail = f"seed {self._seed}, {verdict.accepted} jobs, {self.faults.total() - self.num_kills} other faults"
        self.figures += [
            Figure(f"chaos, {self.num_kills} kills, jobs lost", len(verdict.lost), "jobs", detail=detail),
            Figure(f"chaos, {self.num_kills} kills, jobs doubled", len(verdict.doubled), "jobs", detail=detail),
            Figure(f"chaos, {self.num_kills} kills, failed requests", len(self.book.failed), "requests", detail=detail),
        ]
        return verdict, verdict.line(self.num_kills)

    async def restarts(self, num_restarts: int) -> tuple[Verdict, str]:
        """Restart workers and APIs one after the other, that many times all of them. A server that drains still gets
        calls, as behind a load balancer that does not know yet."""
        self._balanced = {"up", "draining"}
        async with self._under_load():
            for number in range(num_restarts):
                for name in self._names:
                    await self.drain(self.stack.members[name])
                self._tell_progress(f"{number + 1}/{num_restarts} rolling restarts")
        verdict, records = await self._judge()
        for job_id, record in records.items():
            if int(record.fields.get("failures", 0)):
                verdict.wrong.append(f"job {job_id} counts a failure, and nothing but drains happened")
        handed_back = self._check_hand_backs(verdict)
        repeated = sum(one.num_repeated for one in handed_back)
        num_begun = sum(one.num_kept > 0 for one in handed_back)
        self._say(
            f"drains: p50 {statistics.median(self.drains_s):.2f} s, most {max(self.drains_s):.2f} s; "
            f"{len(handed_back)} jobs handed back, {num_begun} of them begun, {repeated} steps repeated"
        )
        self._tell(verdict)
        name = f"{num_restarts} rolling restarts under load"
        self.figures += [
            Figure(f"{name}, failed requests", len(self.book.failed), f"of {self.book.num_requests}"),
            Figure(f"{name}, steps repeated", repeated, "steps", detail=f"{len(handed_back)} jobs handed back"),
            Figure(f"{name}, longest drain", max(self.drains_s), "s"),
        ]
        return verdict, (
            f"{len(self.book.failed)} of {self.book.num_requests} requests failed in {num_restarts} rolling restarts, "
            f"{verdict.line(0).removesuffix(' (0 kills)')}, {repeated} steps repeated"
        )

    @contextlib.asynccontextmanager
    async def _under_load(self) -> AsyncIterator[None]:
        """Start everything and let clients ask for as long as the block lasts, and then until they have their answers
        and every fault is over."""
        for name in self._names:
            await self._start(name)
        await self._draw_undisturbed()
        stop = asyncio.Event()
        clients = [
            Client(f"client-{n}", random.Random(f"{self._seed}-{n}"), self._urls, self._bodies, self.book)
            for n in range(NUM_CLIENTS)
        ]
        load = [asyncio.create_task(client.run(stop, PAUSE_S)) for client in clients]
        try:
            yield
            stop.set()
            while self._tasks:
                await asyncio.gather(*self._tasks)
            await asyncio.gather(*load)
        finally:
            tasks = [*load, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _judge(self) -> tuple[Verdict, dict[str, Record]]:
        verdict = await self.stack.verdict(list(self.book.job_ids), self.book, REST_S)
        verdict.wrong += self.problems
        records = await read_records(self.stack.queue, self.stack.settings, await self._all_jobs())
        self._check_told(verdict, records)
        await self._check_pictures(verdict, records)
        return verdict, records

    def _urls(self) -> list[str]:
        return [one.url for one in self.stack.members.values() if one.kind == "api" and one.state in self._balanced]

    async def _all_jobs(self) -> list[str]:
        prefix = f"{Keys(self.stack.settings.shard).prefix}job:"
        names = await self.stack.queue._connection.command("KEYS", f"{prefix}*")
        return [name.decode().removeprefix(prefix) for name in names]

    async def _draw_undisturbed(self) -> None:
        """What each request gives when nothing happens, by seed and image."""
        client = Client("undisturbed", self._dice, self._urls, self._bodies, self.book)

        async def draw(body: dict[str, Any]) -> None:
            job_id, end = await client._submit(f"undisturbed-{body['seed']}", {**body, "mode": "wait"})
            if end != "succeeded":
                raise RuntimeError(f"an undisturbed request ended as {end}")
            for index, image in enumerate(await self.stack.queue.images(job_id)):
                self._expected[body["seed"], index] = pixels(image)

        await asyncio.gather(*map(draw, self._bodies))
        await client.close()

    # What goes wrong

    async def _wreck(self, num_kills: int) -> None:
        faults: dict[Callable[[], Awaitable[bool]], int] = {
            self._kill_worker: 42,
            self._kill_starting_worker: 6,
            self._kill_api: 14,
            self._kill_redis: 10,
            self._stop_worker: 8,
            self._stop_api: 2,
            self._drain_worker: 7,
            self._drain_api: 3,
            self._part: 8,
        }
        while self.num_kills < num_kills:
            await asyncio.sleep(PERIOD_S * self._dice.uniform(0.2, 1.8))
            await self._dice.choices(list(faults), list(faults.values()))[0]()
            self._tell_progress(f"{self.num_kills}/{num_kills} kills, {self.faults.total() - self.num_kills} others")

    def _tell_progress(self, so_far: str) -> None:
        if time.monotonic() - self._told_at < 10:
            return
        self._told_at = time.monotonic()
        self._say(
            f"{self._told_at - self._began:6.0f} s  {so_far}; {len(self.book.job_ids)} jobs accepted, "
            f"{len(self.book.ends)} answered, {len(self.book.failed)} requests failed"
        )

    def _pick(self, kind: str) -> Member | None:
        there = [one for one in self.stack.members.values() if one.kind == kind and one.state == "up"]
        return self._dice.choice(there) if there else None

    def _later(self, work: Awaitable[None]) -> None:
        async def done() -> None:
            try:
                await work
            except (AssertionError, TimeoutError, OSError) as error:
                self.problems.append(f"{type(error).__name__}: {error}")

        task = asyncio.create_task(done())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self, name: str) -> None:
        member = await self.stack.start(name, prepare=shims.write_down_ticks if name.startswith("worker") else None)
        if member.kind == "worker":
            self._up_since[name] = await self._now_ms()

    async def _now_ms(self) -> int:
        while True:
            try:
                return server_ms(await self.stack.queue._connection.command("TIME"))
            except QueueUnavailable:
                await asyncio.sleep(0.02)

    def _went_down(self, member: Member, at_ms: int) -> None:
        if member.kind == "worker" and member.name in self._up_since:
            self._up_spans.append((self._up_since.pop(member.name), at_ms))

    def _killed(self, fault: str) -> None:
        self.num_kills += 1
        self.faults[fault] += 1

    async def _kill(self, member: Member | None, fault: str) -> bool:
        if member is None:
            return False
        worker_id = member.worker_id if member.kind == "worker" else None
        calm_s = time.monotonic() - max(self._redis_back_s, self._mended_s.get(member.name, -math.inf))
        await self.stack.kill(member)
        self._killed(fault)
        at_ms = await self._now_ms()
        self._went_down(member, at_ms)
        self._later(self._start(member.name))
        if worker_id is not None:
            self.hits += await self._jobs_of(member, worker_id, at_ms, calm_s)
        return True

    async def _kill_worker(self) -> bool:
        return await self._kill(self._pick("worker"), "kill -9 of a worker")

    async def _kill_api(self) -> bool:
        return await self._kill(self._pick("api"), "kill -9 of an API")

    async def _kill_starting_worker(self) -> bool:
        """Once more, while it starts again after a kill."""
        member = self._pick("worker")
        if member is None:
            return False
        await self.stack.kill(member)
        self._killed("kill -9 of a worker")
        self._went_down(member, await self._now_ms())
        again = await self.stack.start(member.name, is_awaited=False)
        await asyncio.sleep(self._dice.uniform(0, 0.6))
        await self.stack.kill(again)
        self._killed("kill -9 of a starting worker")
        self._later(self._start(member.name))
        return True

    async def _kill_redis(self) -> bool:
        await self.stack.kill_redis()
        self._redis_back_s = time.monotonic()
        self._killed("kill -9 of redis-server")
        return True

    async def _stop_worker(self) -> bool:
        member = self._pick("worker")
        if member is not None:
            self._later(self._stop(member, self._dice.uniform(1.2, 3.0) * LEASE_S))
        return member is not None

    async def _stop_api(self) -> bool:
        member = self._pick("api")
        if member is not None:
            self._later(self._stop(member, self._dice.uniform(0.5, 2.0)))
        return member is not None

    async def _stop(self, member: Member, seconds: float) -> None:
        member.state = "stopped"
        member.child.signal(signal.SIGSTOP)
        await wait_until(lambda: _state_of(member.child.pid) == "T", what=f"the stop of {member.name}")
        self.faults[f"SIGSTOP of {'a worker' if member.kind == 'worker' else 'an API'}"] += 1
        self._went_down(member, await self._now_ms())
        await asyncio.sleep(seconds)
        member.child.signal(signal.SIGCONT)
        # One that is not well must say so by its end.
        await asyncio.sleep(2.5)
        if (code := member.child.exit_code) is not None:
            self.problems.append(f"{member.name} ended with {code} after it was stopped: {member.log}")
            await self._start(member.name)
            return
        member.state = "up"
        if member.kind == "worker":
            self._up_since[member.name] = await self._now_ms()

    async def _drain_worker(self) -> bool:
        return await self._drain("worker")

    async def _drain_api(self) -> bool:
        return await self._drain("api")

    async def _drain(self, kind: str) -> bool:
        member = self._pick(kind)
        if member is not None:
            self._later(self.drain(member))
        return member is not None

    async def drain(self, member: Member, limit_s: float = 10.0) -> None:
        """SIGTERM, an orderly end, and a new start."""
        member.state = "draining"
        self._went_down(member, await self._now_ms())
        member.child.signal(signal.SIGTERM)
        told_at = time.monotonic()
        code = await member.child.wait(limit_s)
        self.drains_s.append(time.monotonic() - told_at)
        self.faults[f"SIGTERM of {'a worker' if member.kind == 'worker' else 'an API'}"] += 1
        if code != 0:
            self.problems.append(f"{member.name} ended with {code} after SIGTERM: {member.log}")
        if member.kind == "worker":
            self.drained.append(member)
        await member.link.close()
        await self._start(member.name)

    async def _part(self) -> bool:
        member = self._pick(self._dice.choice(("worker", "worker", "api")))
        if member is not None:
            mode = self._dice.choice(("cut", "silent", "slow", "reset"))
            self._later(self._partition(member, mode, self._dice.uniform(0.3, 2 * LEASE_S)))
        return member is not None

    async def _partition(self, member: Member, mode: str, seconds: float) -> None:
        member.state = "parted"
        link = member.link
        before = (link.num_reset, link.num_refused, link.num_bytes_held, link.num_delayed)
        if mode == "cut":
            link.cut()
        elif mode == "silent":
            link.fall_silent()
        elif mode == "slow":
            link.latency_s = 1.0
        else:
            link.reset_after(self._dice.randint(1, 2000))

        def is_proven() -> bool:
            reset, refused, held, delayed = link.num_reset, link.num_refused, link.num_bytes_held, link.num_delayed
            return {
                "cut": reset > before[0] or refused > before[1],
                "silent": held > before[2],
                "slow": delayed > before[3],
                "reset": reset > before[0],
            }[mode]

        await asyncio.sleep(seconds)
        await wait_until(is_proven, 10.0, f"partition ({mode}) of {member.name}")
        link.mend()
        self._mended_s[member.name] = time.monotonic()
        self.faults[f"partition, {mode}"] += 1
        member.state = "up"

    async def _jobs_of(self, member: Member, worker_id: str, at_ms: int, calm_s: float) -> list[Hit]:
        """The jobs that a worker had when it was killed."""
        queue, keys = self.stack.queue, Keys(self.stack.settings.shard)
        steps = _steps_of(member)
        found = []
        try:
            for job_id in await self._unfinished():
                owner, is_in, attempt, failures, payload = await queue._connection.command(
                    "HMGET", keys.job(job_id), "owner", "state", "attempt", "failures", "payload"
                )
                if owner != worker_id.encode() or is_in != b"running":
                    continue
                num_images = decode(payload, Job).request.num_images_per_prompt
                states = [
                    await queue._connection.command("GET", keys.checkpoint(job_id, index))
                    for index in range(num_images)
                ]
                repeated_steps, repeated_s = 0, 0.0
                for index, packed in enumerate(states):
                    kept = HEADER.unpack_from(packed)[4] if packed else 0
                    again = [step for step in steps.get((job_id, int(attempt), index), ()) if step.num_done > kept]
                    if again:
                        repeated_steps = max(repeated_steps, len(again))
                        repeated_s = max(repeated_s, again[-1].ended_s - again[0].began_s)
                found.append(Hit(job_id, int(attempt), int(failures), at_ms, repeated_steps, repeated_s, calm_s))
        except QueueUnavailable:
            pass
        return found

    async def _unfinished(self) -> list[str]:
        prefix = Keys(self.stack.settings.shard).prefix
        names: list[bytes] = []
        for key in ("leases", "queued"):
            names += await self.stack.queue._connection.command("ZRANGE", prefix + key, 0, -1)
        return [name.decode() for name in names]

    # What came of it

    def _check_told(self, verdict: Verdict, records: dict[str, Record]) -> None:
        """Nobody was told another end than the one that is stored."""
        for job_id, ends in self.book.ends.items():
            if job_id in records and ends != {records[job_id].state}:
                verdict.wrong.append(f"job {job_id} is {records[job_id].state}, clients were told {sorted(ends)}")

    async def _check_pictures(self, verdict: Verdict, records: dict[str, Record]) -> None:
        """Every picture is bit for bit the undisturbed one."""
        self.num_compared, self.num_resumed = 0, 0
        for job_id, record in records.items():
            if record.state != "succeeded":
                continue
            request = decode(record.fields["payload"], Job).request
            self.num_resumed += int(record.fields["attempt"]) > 1
            for index, image in enumerate(await self.stack.queue.images(job_id)):
                self.num_compared += 1
                if (pixels(image) != self._expected[request.seed, index]).any():
                    verdict.wrong.append(f"picture {index} of job {job_id} is not the undisturbed one")

    def _check_hand_backs(self, verdict: Verdict) -> list[HandBack]:
        """Every job that a drained worker handed back, by its log: as many as it says itself, or it is wrong, and so it
        is if a step of one was done again."""
        done: dict[tuple[str, int], set[tuple[int, int]]] = defaultdict(set)
        for member in self.stack.started:
            for (job_id, attempt, index), steps in _steps_of(member).items():
                done[job_id, attempt] |= {(index, step.num_done) for step in steps}
        found = []
        for member in self.drained:
            ended = {line["job_id"] for line in member.events("job_ended")}
            claimed = [(line["job_id"], line["attempt"]) for line in member.events("job_claimed")]
            handed_back = [(job_id, attempt) for job_id, attempt in claimed if job_id not in ended]
            told = [line["handed_back"] for line in member.events("worker_stopped")]
            if told != [len(handed_back)]:
                verdict.wrong.append(
                    f"{member.name} handed {told} jobs back, known are {len(handed_back)}: {member.log}"
                )
            for job_id, attempt in handed_back:
                # An attempt that did nothing hands on what those before it did.
                kept = set[tuple[int, int]]().union(*(done[job_id, number] for number in range(1, attempt + 1)))
                if again := kept & done[job_id, attempt + 1]:
                    verdict.wrong.append(f"job {job_id} was handed back, and {len(again)} of its steps were done again")
                found.append(HandBack(len(kept), len(again)))
        return found

    def _figures(self, records: dict[str, Record]) -> Figures:
        figures = Figures()
        running = [span for record in records.values() for span in _running_spans(record)]
        suspects = [span for record in records.values() if (span := _suspected(record)) is not None]
        spans = self._up_spans + [(since, 1 << 62) for since in self._up_since.values()]
        for hit in self.hits:
            record = records.get(hit.job_id)
            if record is None:
                continue
            claims = [at for at, kind, _ in record.events if kind == "running"]
            if len(record.events) >= 256 or len(claims) < hit.attempt:
                continue
            if hit.calm_s < CALM_S:
                figures.repeated_after_outage_s.append(hit.repeated_s)
            else:
                figures.repeated_steps.append(hit.repeated_steps)
                figures.repeated_s.append(hit.repeated_s)
            requeued = [at for at, kind, _ in record.events if kind == "queued" and at >= hit.at_ms]
            if len(claims) == hit.attempt or not requeued:
                continue  # it was cancelled or expired meanwhile
            used = sum(rows for begin, end, rows in running if begin <= requeued[0] < end)
            capacity = ROWS * sum(begin <= requeued[0] < end for begin, end in spans)
            # After two losses a job is a suspect: it waits for a worker that has nothing, and keeps that one's rows.
            is_beside_suspects = any(begin <= requeued[0] < end for begin, end in suspects)
            if used >= capacity or hit.failures >= 1 or is_beside_suspects:
                figures.num_crowded += 1
            else:
                figures.reclaimed_s.append((claims[hit.attempt] - hit.at_ms) / 1000)
        return figures

    def _tell(self, verdict: Verdict) -> None:
        say = self._say
        say(f"faults: {', '.join(f'{number} {name}' for name, number in sorted(self.faults.items()))}")
        ends = ", ".join(f"{number} {state}" for state, number in sorted(verdict.states.items()))
        say(f"jobs: {ends}; {self.num_resumed} of those that succeeded had more than one worker")
        say(f"pictures: {self.num_compared} compared with undisturbed ones, bit for bit")
        retries = ", ".join(f"{number} {name}" for name, number in self.book.retries.most_common())
        say(
            f"requests: {self.book.num_requests}, {len(self.book.failed)} failed, {self.book.num_refused} refused for "
            f"their deadline, {verdict.num_asked_anew} had a new job after one that was given up; tried again: "
            f"{retries or 'none'}"
        )
        for line in [*self.book.failed[:10], *(f"WRONG {line}" for line in verdict.wrong[:40])]:
            say(f"  {line}")

    def _tell_cost(self, figures: Figures) -> None:
        if figures.reclaimed_s:
            detail = f"lease {LEASE_S:g} s, {len(figures.reclaimed_s)} jobs"
            for share in (0.5, 0.99):
                value = quantile(figures.reclaimed_s, share)
                name = f"killed worker, its job claimed again with rows free, p{100 * share:g}"
                self.figures.append(Figure(name, value, "s", detail=detail))
            self._say(
                f"claimed again after a kill: p50 {statistics.median(figures.reclaimed_s):.2f} s, "
                f"p99 {quantile(figures.reclaimed_s, 0.99):.2f} s, most {max(figures.reclaimed_s):.2f} s of "
                f"{len(figures.reclaimed_s)} jobs with rows free ({figures.num_crowded} more had to wait for rows, or "
                f"suspects were about); lease + 2 s is {LEASE_S + 2:.1f} s"
            )
        if figures.repeated_s:
            value, detail = quantile(figures.repeated_s, 0.99), f"checkpoint each {CHECKPOINT_S} s"
            self.figures.append(Figure("killed worker, work of a job done again, p99", value, "s", detail=detail))
            self._say(
                f"work done again after a kill: p50 {statistics.median(figures.repeated_s):.2f} s, "
                f"p99 {value:.2f} s, most {max(figures.repeated_s):.2f} s and {max(figures.repeated_steps)} steps of "
                f"{len(figures.repeated_s)} jobs whose workers had Redis within reach for {CALM_S:g} s; a checkpoint "
                f"each {CHECKPOINT_S} s"
            )
        if figures.repeated_after_outage_s:
            self._say(
                f"work done again after a kill that followed an outage: "
                f"p50 {statistics.median(figures.repeated_after_outage_s):.2f} s, "
                f"most {max(figures.repeated_after_outage_s):.2f} s of {len(figures.repeated_after_outage_s)} jobs"
            )


def _state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class _Step(NamedTuple):
    began_s: float
    ended_s: float
    num_done: int


def _steps_of(member: Member) -> dict[tuple[str, int, int], list[_Step]]:
    """What a worker has done, by job, attempt and image."""
    file = shims.ticks_file(member.log)
    steps: dict[tuple[str, int, int], list[_Step]] = defaultdict(list)
    if file.exists():
        for line in file.read_text().splitlines():
            began_s, ended_s, job_id, attempt, index, num_done = line.split()
            steps[job_id, int(attempt), int(index)].append(_Step(float(began_s), float(ended_s), int(num_done)))
    return steps


def _running_spans(record: Record) -> list[tuple[int, int, int]]:
    """From when to when the job ran, and its model rows."""
    spans: list[tuple[int, int, int]] = []
    begun: int | None = None
    rows = decode(record.fields["payload"], Job).request.num_model_rows if record.fields.get("payload") else 1
    for at, kind, _ in record.events:
        if kind == "running":
            begun = at
        elif kind != "progress" and begun is not None:
            spans.append((begun, at, rows))
            begun = None
    return spans


def _suspected(record: Record) -> tuple[int, int] | None:
    """From when to when the job may have been a suspect: from the second time it was queued again to its end."""
    queued = [at for at, kind, _ in record.events if kind == "queued"]
    return (queued[2], record.events[-1][0]) if len(queued) > 2 else None
