"""The clients, as Locust users. `python -m loadtests` runs them headless; for Locust's own page:

`locust -f loadtests/users.py --host http://127.0.0.1:8000 Mixed Abusive`
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections import Counter
from typing import Any, ClassVar
from urllib.parse import urlsplit

import gevent
from gevent.pool import Group
from locust import FastHttpUser, constant, task

from loadtests import traffic
from loadtests.traffic import Body

PNG = b"\x89PNG"
NONE: dict[str, str] = {}
# Each arrival is a client of its own, with a connection of its own.
ALONE = {"Connection": "close"}
POLL_S = 0.2
BURST_EVERY_S = 4.0
# A waiting call may be held for as long as the server's queue is.
REPLY_TIMEOUT_S = 180.0


class Client(FastHttpUser):
    """Asks for one picture after the other. Told to come back later, it does so then, with the same request."""

    abstract = True
    network_timeout = REPLY_TIMEOUT_S
    connection_timeout = 10.0
    wait_time = constant(0)
    seed = 0
    _numbers: ClassVar[Counter[str]] = Counter()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kind = type(self).__name__
        Client._numbers[kind] += 1
        self.random = random.Random(f"{self.seed} {kind} {Client._numbers[kind]}")

    def post(
        self, body: Body, name: str, *, accept: str = "image/png", num_images: int = 0, headers: dict[str, str] = NONE
    ) -> Any:
        """One call of `POST /generate`; `num_images` is what its success counts for."""
        headers = {"Content-Type": "application/json", "Accept": accept, **headers}
        content = json.dumps(body).encode()
        with self.client.post(
            "/generate", data=content, headers=headers, name=name, catch_response=True, context={"images": num_images}
        ) as reply:
            if accept == "image/png" and reply.status_code == 202:
                reply.failure("202 handed over")
            elif accept == "image/png" and reply.status_code == 200 and not reply.content.startswith(PNG):
                reply.failure("200 without a picture")
        return reply

    def draw(self, body: Body, name: str) -> None:
        """Wait for a picture; refused, come back when told to and ask for the same."""
        while True:
            reply = self.post(body, name, num_images=body.get("num_images_per_prompt", 1))
            if reply.status_code not in (429, 503) or not self.sleep_as_told(reply):
                return

    def sleep_as_told(self, reply: Any) -> bool:
        """Wait for the time of `Retry-After`; whether the test is still going on then."""
        # By then the server has closed the connection, and a call that meets that moment would fail.
        self.client.client.clientpool.close()
        gevent.sleep(float((reply.headers or {}).get("Retry-After", 1)))
        return self.environment.runner.state in ("spawning", "running")

    def report(self, name: str, started: float, exception: Exception | None, num_images: int = 0) -> None:
        """Count what took more than one call, or none of Locust's, from `time.time()` of its start."""
        self.environment.events.request.fire(
            request_type="POST",
            name=name,
            response_time=(time.time() - started) * 1000,
            response_length=0,
            response=None,
            context={"images": num_images},
            exception=exception,
            start_time=started,
            url="/generate",
        )


class Steady(Client):
    @task
    def picture(self) -> None:
        self.draw(traffic.steady(self.random), "steady")


class Quick(Client):
    """One step without guidance: mostly what the service itself takes."""

    @task
    def picture(self) -> None:
        self.draw(traffic.quick(self.random), "quick")


class Mixed(Client):
    @task
    def picture(self) -> None:
        self.draw(traffic.mixed(self.random), "mixed")


class Varied(Client):
    @task
    def picture(self) -> None:
        self.draw(traffic.varied(self.random), "varied")


class LongTail(Client):
    @task
    def picture(self) -> None:
        body = traffic.long_tail(self.random)
        self.draw(body, "long" if traffic.is_long(body) else "short")


class Burst(Client):
    """Idle most of the time, then all at once: every user fires at the same moments of the clock."""

    @task
    def picture(self) -> None:
        gevent.sleep(BURST_EVERY_S - time.time() % BURST_EVERY_S)
        self.draw(traffic.mixed(self.random), "burst")


class Fickle(Client):
    """Refused, it waits as told and then wants something else, as when one client gives up and another one comes."""

    @task
    def picture(self) -> None:
        reply = self.post(traffic.mixed(self.random), "fickle", num_images=1)
        if reply.status_code in (429, 503):
            self.sleep_as_told(reply)


class JobClient(Client):
    """Asks for a job's URL, learns there of its end, and fetches the picture."""

    abstract = True
    what = ""

    @task
    def picture(self) -> None:
        started = time.time()
        accepted = self.post({**traffic.mixed(self.random), "mode": "async"}, "POST", accept="application/json")
        if accepted.status_code != 202:
            self.sleep_as_told(accepted)
            return
        job = accepted.json()
        error = None
        if (state := self.last_state(job)) != "succeeded":
            error = RuntimeError(f"the job {state}")
        elif not (self.client.get(f"{job['url']}/images/0", name="GET image").content or b"").startswith(PNG):
            error = RuntimeError("no picture")
        self.report(self.what, started, error, num_images=1)

    def last_state(self, job: dict[str, Any]) -> str:
        """Wait for the end of the job that a 202 has told of."""
        raise NotImplementedError


class AsyncPoller(JobClient):
    """Asks the job's URL again and again."""

    what = "polled job"

    def last_state(self, job: dict[str, Any]) -> str:
        while True:
            gevent.sleep(POLL_S)
            reply = self.client.get(job["url"], name="GET job")
            if reply.status_code != 200:
                return f"answered {reply.status_code}"
            if (state := str(reply.json()["state"])) not in ("queued", "running"):
                return state


class SseWatcher(JobClient):
    """Reads every event of the job until its last."""

    what = "watched job"

    def last_state(self, job: dict[str, Any]) -> str:
        headers = {"Accept": "text/event-stream"}
        reply = self.client.get(job["events_url"], name="GET events", headers=headers, stream=True)
        if reply.status_code != 200:
            return f"answered {reply.status_code}"
        lines = b"".join(iter(lambda: reply.stream.read(4096), b"")).decode().splitlines()
        states = [line.removeprefix("event:").strip() for line in lines if line.startswith("event:")]
        return states[-1] if states else "sent no event"


class Abusive(Client):
    """What a server must bear: nonsense, giants, clients that leave in the middle, and no pause at all.

    A call counts as an error when it is not refused in the way it should be.
    """

    @task(8)
    def nonsense(self) -> None:
        call = self.random.choice(traffic.BAD_CALLS)
        headers = {"Content-Type": call.content_type}
        with self.client.post(
            "/generate", data=call.content, headers=headers, name="nonsense", catch_response=True
        ) as reply:
            if reply.status_code == call.status:
                reply.success()
            elif reply.status_code:
                reply.failure(f"{call.name}: expected {call.status}, got {reply.status_code}")

    @task(4)
    def leave(self) -> None:
        """Close the connection in the middle of the body, or while the picture is drawn."""
        content = json.dumps(traffic.steady(self.random)).encode()
        address = urlsplit(self.host or "")
        head = (
            f"POST /generate HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        ).encode()
        is_whole = self.random.random() < 0.5
        started, error = time.time(), None
        try:
            with socket.create_connection((address.hostname, address.port or 80), timeout=10) as connection:
                connection.sendall(head + (content if is_whole else content[: len(content) // 2]))
                gevent.sleep(self.random.uniform(0, 0.1))
        except OSError as failed:
            error = failed
        self.report("leave", started, error)

    @task(1)
    def hammer(self) -> None:
        """Ten jobs in a row that nobody waits for, whatever the server says."""
        for _ in range(10):
            content = json.dumps({**traffic.quick(self.random), "mode": "async"}).encode()
            headers = {"Content-Type": "application/json"}
            with self.client.post(
                "/generate", data=content, headers=headers, name="hammer", catch_response=True
            ) as reply:
                if reply.status_code in (202, 429):
                    reply.success()


class Arrivals(Client):
    """Requests that come when they like, `rate` a second, however slow the server: each one is a client of its own.

    A client that is refused comes back exactly when it was told to, with the same bytes, until it is accepted.
    `visits` has an entry for each client. One user of this class is enough.
    """

    rate = 1.0
    concurrency = 4096
    max_tries = 50
    is_open = True
    crowd = Group()
    visits: ClassVar[list[dict[str, Any]]] = []

    def on_start(self) -> None:
        self._due = time.time()

    @task
    def arrive(self) -> None:
        self._due += self.random.expovariate(self.rate)
        gevent.sleep(max(0.0, self._due - time.time()))
        if Arrivals.is_open:
            Arrivals.crowd.spawn(self._visit, traffic.mixed(self.random))

    def _visit(self, body: Body) -> None:
        visit: dict[str, Any] = {"arrived_at": time.time(), "refusals": [], "job_id": None, "latency_s": None}
        Arrivals.visits.append(visit)
        for _ in range(self.max_tries):
            sent_at = time.time()
            reply = self.post(body, "arrival", num_images=1, headers=ALONE)
            answered_at = time.time()
            if reply.status_code == 429:
                told = (reply.headers or {}).get("Retry-After")
                told_s = None if told is None else float(told)
                visit["refusals"].append({"at": answered_at, "told_s": told_s, "took_s": answered_at - sent_at})
                gevent.sleep(max(0.0, answered_at + float(told or 1) - time.time()))
                continue
            if reply.status_code == 200:
                visit["job_id"] = reply.headers.get("Darkroom-Job-Id")
                visit["latency_s"] = answered_at - sent_at
            return
