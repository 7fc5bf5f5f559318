"""`darkroom up`: the queue, the workers and the API on this machine, as one command.

redis-server, API and workers start side by side. Once the API says that it is ready, a short block tells where the page
is and how to get a first picture.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import json
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import httpx
import structlog
from rich.console import Console
from rich.table import Table
from rich.text import Text

from darkroom import __version__, tracing
from darkroom.config import Settings, builtin_models
from darkroom.errors import ConfigError, QueueUnavailable
from darkroom.jobs import ModelCard
from darkroom.queue import EmbeddedRedis, JobQueue
from darkroom.supervisor import Service, Spawner, Supervisor, first_of

log = structlog.get_logger("darkroom.up")

_POLL_S = 0.05
# A machine where some workers never come up still serves with the others.
_MISSING_WORKERS_S = 15.0
# In the order of stopping, which as a whole must take less than 5 s. A worker has a tick to finish, results to store
# and jobs to hand back; one that is killed costs its jobs a lease time.
STOP_TIMEOUTS_S = {"api": 1.7, "worker": 2.5, "redis": 0.6}
_DEFAULT_PROMPT = "an astronaut riding a horse"


@dataclass(frozen=True)
class Child:
    """One process to start: `darkroom COMMAND`, under this name in the logs."""

    name: str
    arguments: tuple[str, ...]
    metrics_port: int
    env: Mapping[str, str] = field(default_factory=dict)


def visible_gpus() -> list[str]:
    """The entries of CUDA_VISIBLE_DEVICES, or an index for each GPU the driver knows. Does not import torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [entry.strip() for entry in named.split(",") if entry.strip() not in ("", "-1")]
    try:
        driver = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    count = ctypes.c_uint(0)
    if driver.nvmlInit_v2() or driver.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return []
    return [str(index) for index in range(count.value)]


def gpus_to_use(device: str) -> list[str]:
    """The GPUs that workers are spread over; none when the device setting or the installed torch rules them out.

    `cpu` needs none, and `cuda:N` is one GPU that all workers share.
    """
    with suppress(PackageNotFoundError):
        if device in ("auto", "cuda") and "+cpu" not in version("torch"):
            return visible_gpus()
    return []


def plan_workers(
    settings: Settings, models: Sequence[str], num_workers: int | None, gpus: Sequence[str], num_cores: int
) -> list[Child]:
    """The workers to start: one for each GPU, or one for the CPU, unless the caller says how many.

    Each serves all models. Workers that share a CPU share its cores.
    """
    count = num_workers or len(gpus) or 1
    workers = []
    for index in range(count):
        env: dict[str, str] = {}
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        elif count > 1 and not settings.num_threads:
            env["DARKROOM_NUM_THREADS"] = str(max(1, num_cores // count))
        arguments = ["worker", *(argument for model in models for argument in ("--model", model))]
        workers.append(Child(f"worker-{index}", tuple(arguments), _metrics_port(settings, 1 + index), env))
    return workers


def free_port(host: str, port: int, *, setting: str) -> int:
    """`port` itself, or a free one for 0. Raises `ConfigError` when it is taken or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; {setting} chooses another") from error
        return int(probe.getsockname()[1])


def _metrics_port(settings: Settings, offset: int) -> int:
    """Processes on one machine need ports of their own: the setting's and those after it, or free ones."""
    port = settings.metrics_port
    return free_port(settings.metrics_host, port + offset if port else 0, setting="DARKROOM_METRICS_PORT")


def _base_url(host: str, port: int) -> str:
    """An address that a browser on this machine can open."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _PrivateRedis:
    """The embedded redis-server as a service: started once, restarted on the same address ever after."""

    def __init__(self, redis: EmbeddedRedis, supervisor: Supervisor) -> None:
        self._redis = redis
        self._supervisor = supervisor
        self.answers = asyncio.Event()

    async def start(self) -> _PrivateRedis:
        """Return once it answers; a long log takes a while to load, and a stop cuts that short."""
        begin = self._redis.restart if self.answers.is_set() else self._redis.start
        starting = asyncio.ensure_future(asyncio.to_thread(begin))
        await first_of(starting, self._supervisor.wait_stop())
        if not starting.done():
            await asyncio.to_thread(self._redis.stop)
        await starting
        self.answers.set()
        return self

    async def wait(self) -> int:
        while (code := self._redis.poll()) is None:  # noqa: ASYNC110 - a process sets it, and has no event to give
            await asyncio.sleep(_POLL_S)
        return code

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(self._redis.server_pid, number)


async def run_up(settings: Settings, models: Sequence[str], num_workers: int | None) -> int:
    """Run everything until SIGINT or SIGTERM. Returns the exit code.

    Raises `ConfigError` and `ModelError` where a start is refused before any child could say so itself.
    """
    began = time.monotonic()
    settings.refuse_open_door()
    tracing.check(settings)
    supervisor = Supervisor()
    supervisor.handle_signals()
    port = free_port(settings.host, settings.port, setting="--port")
    gpus = gpus_to_use(settings.device)
    models = models or [str(path) for path in builtin_models()]
    workers = plan_workers(settings, models, num_workers, gpus, os.cpu_count() or 1)
    children = [Child("api", ("api",), _metrics_port(settings, 0)), *workers]
    common = {
        **os.environ,
        "DARKROOM_HOST": settings.host,
        "DARKROOM_PORT": str(port),
        "DARKROOM_DATA_DIR": str(settings.data_dir),
    }
    spawner = Spawner()
    redis = EmbeddedRedis(settings) if settings.redis_url is None else None
    announcing: asyncio.Future[None] | None = None
    try:
        if redis is not None:
            service = _PrivateRedis(redis, supervisor)
            supervisor.add(Service("redis", service.start, stop_rank=2, stop_timeout_s=STOP_TIMEOUTS_S["redis"]))
            answering = asyncio.ensure_future(service.answers.wait())
            await first_of(answering, supervisor.wait_stop())
            answering.cancel()
            if service.answers.is_set():
                await _forget_workers(settings, redis.url)
        if not supervisor.is_stopping:
            common["DARKROOM_REDIS_URL"] = redis.url if redis is not None else str(settings.redis_url)
            log.info("starting", workers=len(workers), gpus=len(gpus), models=list(models))
            for child in children:
                supervisor.add(_service(child, spawner, common))
            announcing = asyncio.ensure_future(
                _announce(
                    supervisor,
                    settings,
                    common["DARKROOM_REDIS_URL"],
                    _base_url(settings.host, port),
                    children,
                    len(workers),
                    began,
                )
            )
        return await supervisor.run()
    finally:
        if announcing is not None:
            announcing.cancel()
        spawner.close()
        if redis is not None:
            redis.stop()
        log.info("all_stopped")


async def _forget_workers(settings: Settings, url: str) -> None:
    """A killed `up` took its workers along, and none of the next one is there yet."""
    queue = JobQueue(settings, url)
    try:
        await queue.forget_workers()
    except QueueUnavailable as error:
        log.warning("workers_not_forgotten", reason=str(error))
    finally:
        await queue.close()


def _service(child: Child, spawner: Spawner, common: Mapping[str, str]) -> Service:
    env = {
        **common,
        **child.env,
        "DARKROOM_METRICS_PORT": str(child.metrics_port),
        "DARKROOM_PROCESS": child.name,
    }
    start = functools.partial(spawner.spawn, [sys.executable, "-m", "darkroom", *child.arguments], env)
    kind = child.arguments[0]
    return Service(child.name, start, list(STOP_TIMEOUTS_S).index(kind), STOP_TIMEOUTS_S[kind])


async def _announce(
    supervisor: Supervisor,
    settings: Settings,
    redis_url: str,
    url: str,
    children: Sequence[Child],
    num_workers: int,
    began: float,
) -> None:
    queue = JobQueue(settings, redis_url)
    try:
        cards = await _wait_ready(supervisor, queue, url, num_workers)
        if cards is None:
            return
        needs_key = settings.auth == "keys" and not await queue.api_keys.all()
    finally:
        await queue.close()
    supervisor.settle()
    metrics = {child.name: f"{_base_url(settings.metrics_host, child.metrics_port)}/metrics" for child in children}
    print_ready(url, cards, metrics, time.monotonic() - began, asks_for_keys=settings.auth == "keys")
    if needs_key:
        directory = "" if settings.redis_url else f" --data-dir {shlex.quote(str(settings.data_dir))}"
        print(f"  There is no key yet: DARKROOM_API_KEY=$(darkroom keys create --name me{directory})\n", flush=True)


async def _wait_ready(supervisor: Supervisor, queue: JobQueue, url: str, num_workers: int) -> list[ModelCard] | None:
    """Ask until the API is ready and every worker there, or enough time has passed for those that are missing.

    Returns the cards of the models, None when a stop came first.
    """
    first_ready: float | None = None
    async with httpx.AsyncClient(base_url=url, timeout=2.0, trust_env=False) as client:
        while not await supervisor.wait_stop(_POLL_S):
            try:
                reply = await client.get("/health/ready")
                if reply.status_code != 200:
                    continue
                first_ready = first_ready or time.monotonic()
                if reply.json()["workers"] < num_workers and time.monotonic() - first_ready < _MISSING_WORKERS_S:
                    continue
                offered = (await queue.cards()).offered
            except (httpx.HTTPError, ValueError, LookupError, QueueUnavailable):
                continue
            return [offered[name] for name in sorted(offered)]
    return None


def first_request(url: str, cards: Sequence[ModelCard], *, asks_for_keys: bool = False) -> str:
    """A command line that ends with a picture; where the server asks for keys, with the one in `DARKROOM_API_KEY`."""
    body: dict[str, str] = {"prompt": _DEFAULT_PROMPT}
    if cards:
        card = cards[0]
        body["prompt"] = next(iter(card.example_prompts), _DEFAULT_PROMPT)
        if len(cards) > 1:
            body["model"] = card.id
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    key = ' -H "authorization: Bearer $DARKROOM_API_KEY"' if asks_for_keys else ""
    kinds = "-H 'accept: image/png' -H 'content-type: application/json'"
    return f"curl -s{key} {kinds} -d {data} {url}/generate -o picture.png"


def print_ready(
    url: str, cards: Sequence[ModelCard], metrics: Mapping[str, str], seconds: float, *, asks_for_keys: bool
) -> None:
    """Tell on stdout where everything is."""
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_row("  page", Text(f"{url}/", style="bold"))
    table.add_row("  models", Text(", ".join(card.id for card in cards)))
    for index, (name, address) in enumerate(metrics.items()):
        table.add_row("  metrics" if index == 0 else "", Text(f"{address}  {name}"))
    console.print()
    console.print(Text(f"  Darkroom {__version__} is ready after {seconds:.1f} s", style="bold green"))
    console.print()
    console.print(table)
    console.print()
    # Never wrapped, so that it can be copied in one piece.
    console.print(Text(first_request(url, cards, asks_for_keys=asks_for_keys)), soft_wrap=True)
    console.print()
    console.print(Text("  Ctrl-C stops everything.", style="dim"))
    console.print()
