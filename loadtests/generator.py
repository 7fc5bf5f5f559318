"""One stage of load, in a process of its own: `python -m loadtests.generator --url URL --users Mixed:8 --out FILE`.

Users are started at once and warm up; then everything that ends within `--seconds` is counted, and the workers'
metrics are read before and after. What the generator itself takes of a core is measured over the same time. At the end
users finish what they have begun, so nothing is left over for the next stage.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

# Locust patches the standard library for gevent and must come before what uses it.
import locust  # isort: skip
import gevent
import psutil
from locust.env import Environment
from locust.exception import CatchResponseError

from loadtests import users
from loadtests.scrape import scrape

STOP_S = 120.0
LOOK_S = 0.02


def error_kind(response: Any, exception: BaseException | None) -> str:
    """A short name for what went wrong, such as '429 queue_full' or 'ConnectionRefusedError'; '' for nothing."""
    if exception is None:
        return ""
    if isinstance(exception, CatchResponseError):
        return str(exception)
    status = response.status_code if response is not None else 0
    if not status:
        return type(exception).__name__
    try:
        return f"{status} {json.loads(response.content)['code']}"
    except (ValueError, LookupError, TypeError):
        return str(status)


class Recorder:
    """Everything that ended, as rows of name, end (epoch seconds), latency (seconds), images, error."""

    def __init__(self) -> None:
        self.samples: list[tuple[str, float, float, int, str]] = []
        self.num_drawn = 0

    def __call__(
        self,
        name: str,
        response_time: float,
        response: Any,
        exception: BaseException | None,
        context: dict[str, Any],
        **_: Any,
    ) -> None:
        error = error_kind(response, exception)
        images = context.get("images", 0)
        self.samples.append((name, time.time(), response_time / 1000, images, error))
        self.num_drawn += images > 0 and not error


def parse_users(text: str) -> tuple[type[users.Client], int]:
    """`Mixed:8` as class and count. Raises `ValueError` naming the classes there are."""
    known = {
        name: kind
        for name, kind in vars(users).items()
        if isinstance(kind, type) and issubclass(kind, users.Client) and not kind.abstract
    }
    name, _, count = text.partition(":")
    if name not in known or not count.isdecimal() or int(count) < 1:
        raise ValueError(f"expected NAME:COUNT with one of {', '.join(sorted(known))}, got {text!r}")
    return known[name], int(count)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Drive the load and return what was seen."""
    crowd = dict(parse_users(text) for text in arguments.users)
    for kind, count in crowd.items():
        kind.fixed_count = count
    users.Client.seed = arguments.seed
    users.Arrivals.rate = arguments.rate
    recorder = Recorder()
    environment = Environment(user_classes=list(crowd), host=arguments.url, stop_timeout=STOP_S)
    environment.events.request.add_listener(recorder)
    runner = environment.create_local_runner()
    total = sum(crowd.values())
    process = psutil.Process()

    runner.start(total, spawn_rate=total)
    begun = time.monotonic()
    while (waited := time.monotonic() - begun) < arguments.warm_up_limit_s and (
        waited < arguments.warm_up_s or recorder.num_drawn < arguments.warm_up_images
    ):
        gevent.sleep(LOOK_S)
    ticks_before, cpu_before, started_at = scrape(arguments.metrics), process.cpu_times(), time.time()
    gevent.sleep(arguments.seconds)
    ticks_after, cpu_after, ended_at = scrape(arguments.metrics), process.cpu_times(), time.time()

    users.Arrivals.is_open = False
    runner.stop()
    users.Arrivals.crowd.join(timeout=arguments.drain_s)
    users.Arrivals.crowd.kill()
    visits = users.Arrivals.visits
    jobs = read_jobs(arguments.url, [visit["job_id"] for visit in visits if visit["job_id"]])
    runner.quit()
    return {
        "started_at": started_at,
        "seconds": ended_at - started_at,
        "users": {kind.__name__: count for kind, count in crowd.items()},
        "rate": arguments.rate if users.Arrivals in crowd else None,
        "cpu_s": (cpu_after.user + cpu_after.system) - (cpu_before.user + cpu_before.system),
        "ticks": None if ticks_before is None or ticks_after is None else ticks_after.since(ticks_before)._asdict(),
        "samples": recorder.samples,
        "visits": [{**visit, **jobs.get(visit["job_id"], {})} for visit in visits],
    }


def read_jobs(url: str, job_ids: list[str]) -> dict[str, dict[str, str]]:
    """When each job was accepted and claimed, by the server's clock, as ISO 8601."""
    session = locust.contrib.fasthttp.FastHttpSession(
        base_url=url, request_event=locust.event.EventHook(), user=None, network_timeout=30.0
    )
    views = {job_id: session.get(f"/jobs/{job_id}").json() for job_id in job_ids}
    return {
        job_id: {"accepted_at": view["created_at"], "claimed_at": view["started_at"]} for job_id, view in views.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--users", nargs="+", required=True, metavar="NAME:COUNT")
    parser.add_argument("--metrics", nargs="*", default=[], metavar="URL", help="the workers' metrics")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm-up-s", type=float, default=2.0, help="at least this long")
    parser.add_argument("--warm-up-images", type=int, default=0, help="and until so many pictures are there")
    parser.add_argument("--warm-up-limit-s", type=float, default=60.0, help="but no longer than this")
    parser.add_argument("--rate", type=float, default=1.0, help="of the users called Arrivals, a second")
    parser.add_argument("--drain-s", type=float, default=120.0, help="how long refused arrivals may come back")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    seen = run(arguments)
    with open(arguments.out, "w") as file:
        json.dump(seen, file)


if __name__ == "__main__":
    main()
