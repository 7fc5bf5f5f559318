"""Past saturation: are refused clients told the truth, and do accepted ones keep their latency?

First the server is saturated by as many closed-loop clients as its rows and its queue hold; that gives its rate and
the latency of a full queue. Then requests arrive at a multiple of that rate for a while, each a client of its own that
comes back exactly when `Retry-After` says, with the same bytes, until it is accepted. At last clients that do not come
back saturate the server: what was kept for them must not be lost to the others.

**Over-wait.** Let the queue have K places. In order of first arrival, the n-th client could have had a place once
n - K jobs had been claimed from the queue, so the place became free for it at

    free(n) = max(arrival of n, time of the (n - K)-th claim)

and it waited `accepted - free` longer than it had to: its over-wait, 0 where it overtook others, relative to the sum of
the waits it was told. Claims and acceptances are those the server itself recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from benchmarks.arrivals import percentile
from loadtests.servers import darkroom
from loadtests.stages import Stage, generate, run_stage, summarise

OVERLOAD = 3.0
MAX_QUEUE_JOBS = 16
FILLINGS = 4
# Three in four requests of the mix take two model rows, and a worker's largest tick has 32.
RESIDENT_JOBS = round(32 / 1.75)


@dataclass(frozen=True)
class Visit:
    """One client: its arrival, the waits it was told, and when the server accepted and claimed it (epoch seconds).

    `told_s` has None for a refusal that named no time; `refused_in_s` is how long each refusal took to come. What did
    not happen is None.
    """

    arrived_at: float
    told_s: tuple[float | None, ...]
    refused_in_s: tuple[float, ...]
    accepted_at: float | None
    claimed_at: float | None
    latency_s: float | None


@dataclass(frozen=True)
class Overload:
    """What the scenario showed. Shares are of the clients that came back at least once."""

    max_queue_jobs: int
    capacity_images_s: float
    offered_images_s: float
    clients: int
    refused: int
    refused_without_retry_after: int
    p50_refusal_s: float | None
    p99_refusal_s: float | None
    accepted_on_first_retry: float | None
    never_accepted: int
    median_told_s: float | None
    median_over_wait: float | None
    p95_over_wait: float | None
    median_over_wait_s: float | None
    p95_at_saturation_s: float | None
    p95_accepted_s: float | None
    fickle_images_s: float
    errors: dict[str, int]

    @property
    def latency_ratio(self) -> float | None:
        """p95 of accepted requests over that at saturation."""
        if self.p95_accepted_s is None or not self.p95_at_saturation_s:
            return None
        return self.p95_accepted_s / self.p95_at_saturation_s

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "latency_ratio": self.latency_ratio}


def visit_of(seen: dict[str, Any]) -> Visit:
    """One entry of the generator's `visits`."""

    def epoch(text: str | None) -> float | None:
        return None if text is None else datetime.fromisoformat(text).timestamp()

    return Visit(
        arrived_at=seen["arrived_at"],
        told_s=tuple(refusal["told_s"] for refusal in seen["refusals"]),
        refused_in_s=tuple(refusal["took_s"] for refusal in seen["refusals"]),
        accepted_at=epoch(seen.get("accepted_at")),
        claimed_at=epoch(seen.get("claimed_at")),
        latency_s=seen["latency_s"],
    )


def free_times(visits: Sequence[Visit], max_queue_jobs: int) -> list[float | None]:
    """For each of `visits`, when a place had become free for it, by order of arrival; None when none ever did."""
    claims = sorted(visit.claimed_at for visit in visits if visit.claimed_at is not None)
    order = sorted(range(len(visits)), key=lambda i: visits[i].arrived_at)
    free: list[float | None] = [None] * len(visits)
    for place, i in enumerate(order):
        ahead = place - max_queue_jobs
        if ahead < 0:
            free[i] = visits[i].arrived_at
        elif ahead < len(claims):
            free[i] = max(visits[i].arrived_at, claims[ahead])
    return free


def analyse(
    visits: Sequence[Visit],
    *,
    max_queue_jobs: int,
    saturated: Stage,
    fickle: Stage,
    offered_images_s: float,
    errors: dict[str, int],
) -> Overload:
    """Reduce the clients of an overload to figures."""
    refused = [visit for visit in visits if visit.told_s]
    over_waits, over_waits_s = [], []
    for visit, free in zip(visits, free_times(visits, max_queue_jobs), strict=True):
        told_s = sum(told or 0.0 for told in visit.told_s)
        if visit.accepted_at is not None and free is not None and told_s:
            over_waits_s.append(max(0.0, visit.accepted_at - free))
            over_waits.append(over_waits_s[-1] / told_s)
    latencies = [visit.latency_s for visit in visits if visit.latency_s is not None]
    refusals = [took_s for visit in refused for took_s in visit.refused_in_s]
    first = [told for visit in refused if (told := visit.told_s[0]) is not None]
    on_first_retry = sum(len(visit.told_s) == 1 and visit.accepted_at is not None for visit in refused)
    return Overload(
        max_queue_jobs=max_queue_jobs,
        capacity_images_s=saturated.images_s,
        offered_images_s=offered_images_s,
        clients=len(visits),
        refused=len(refused),
        refused_without_retry_after=sum(None in visit.told_s for visit in refused),
        p50_refusal_s=percentile(refusals, 0.5) if refusals else None,
        p99_refusal_s=percentile(refusals, 0.99) if refusals else None,
        accepted_on_first_retry=on_first_retry / len(refused) if refused else None,
        never_accepted=sum(visit.accepted_at is None for visit in visits),
        median_told_s=percentile(first, 0.5) if first else None,
        median_over_wait=percentile(over_waits, 0.5) if over_waits else None,
        p95_over_wait=percentile(over_waits, 0.95) if over_waits else None,
        median_over_wait_s=percentile(over_waits_s, 0.5) if over_waits_s else None,
        p95_at_saturation_s=saturated.p95_s,
        p95_accepted_s=percentile(latencies, 0.95) if latencies else None,
        fickle_images_s=fickle.images_s,
        errors=errors,
    )


def measure(
    *,
    seconds: float,
    warm_up_s: float,
    factor: float = OVERLOAD,
    max_queue_jobs: int = MAX_QUEUE_JOBS,
    drain_s: float = 240.0,
    seed: int = 0,
) -> tuple[list[Stage], Overload, list[Visit]]:
    """Saturate a server with a queue of `max_queue_jobs`, then overload it `factor` times, for `seconds` or longer.

    Refused clients get `drain_s` more to be accepted. Raises `RuntimeError` when nothing is drawn at saturation.
    """
    with darkroom(max_queue_jobs=max_queue_jobs) as target:
        clients = max_queue_jobs + RESIDENT_JOBS

        def saturate(kind: str, label: str, count: int) -> Stage:
            return run_stage(
                target,
                {kind: count},
                part="overload",
                label=label,
                seconds=seconds,
                warm_up_s=warm_up_s,
                warm_up_images=clients,
                warm_up_limit_s=30.0,
                seed=seed,
            )

        saturated = saturate("Mixed", "saturation", clients)
        if not saturated.images:
            raise RuntimeError(f"no picture within {seconds:g} s at saturation: {saturated.errors or 'no reply'}")
        rate = factor * saturated.images_s
        # The first arrivals find a server with nothing to do; many more than it can hold must come.
        arriving_s = max(seconds, FILLINGS * clients / rate)
        seen = generate(
            target, {"Arrivals": 1}, rate=rate, seconds=arriving_s, warm_up_s=0, drain_s=drain_s, seed=seed + 1
        )
        fickle = saturate("Fickle", f"{2 * clients} clients that do not come back", 2 * clients)
    overloaded = summarise(seen, part="overload", label=f"{factor:g}x capacity", server=target.name)
    visits = [visit_of(visit) for visit in seen["visits"]]
    found = analyse(
        visits,
        max_queue_jobs=max_queue_jobs,
        saturated=saturated,
        fickle=fickle,
        offered_images_s=rate,
        errors={kind: count for kind, count in overloaded.errors.items() if not kind.startswith("429")},
    )
    return [saturated, overloaded, fickle], found, visits
