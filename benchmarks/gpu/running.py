"""One engine on a thread of its own, fed by a benchmark: Darkroom as a worker runs it, without queue and HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from darkroom.config import Settings
from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.batcher import Batcher
from darkroom.engine.engine import Engine
from darkroom.engine.events import Event, Finished, TickReport
from darkroom.jobs import GenerationRequest, Job, Timings

TIMEOUT_S = 400.0


@dataclass
class Run:
    """What happened to some requests, in seconds from the run's start; a request that did not end has no time."""

    ended_s: dict[str, float] = field(default_factory=dict)
    timings: list[Timings] = field(default_factory=list)
    ticks: list[tuple[float, TickReport]] = field(default_factory=list)

    @property
    def last_s(self) -> float:
        return max(self.ended_s.values())

    def tick_spans_s(self) -> list[float]:
        """Seconds from the end of one tick to the end of the next."""
        return [later - earlier for (earlier, _), (later, _) in zip(self.ticks, self.ticks[1:], strict=False)]


class RunningEngine:
    """Its policy may be exchanged while it has nothing to do, so that policies share one engine and its graphs.

    Ready, with its ticks captured, when the constructor returns. `buckets` are the model-row counts of its ticks, by
    default those of a worker. Raises `RuntimeError` when the engine ends by itself.
    """

    def __init__(self, model: DiffusionModel, settings: Settings, buckets: Sequence[int] | None = None) -> None:
        self.model = model
        self._is_ready, self._broken = threading.Event(), list[Exception]()
        self.engine = Engine(
            {model.id: model},
            settings,
            on_event=self._ended,
            on_tick=self._ticked,
            on_ready=self._is_ready.set,
            warm_up=True,
            batcher=Batcher(buckets) if buckets else None,
        )
        self.buckets = self.engine.batcher.buckets
        self._lock = threading.Condition()
        self._run, self._began_s, self._failures = Run(), time.monotonic(), list[Event]()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()
        self._is_ready.wait()
        self._check()

    def _serve(self) -> None:
        try:
            self.engine.run()
        except Exception as error:
            self._broken.append(error)
            self._is_ready.set()
            with self._lock:
                self._lock.notify_all()

    def _check(self) -> None:
        if self._broken:
            raise RuntimeError(f"the engine ended: {self._broken[0]}") from self._broken[0]

    def close(self) -> None:
        self.engine.stop()
        self._thread.join()

    def use(self, batcher: Batcher) -> None:
        """Exchange the policy. Every request before has ended."""
        self.engine.batcher = batcher

    def graph_of(self, model_rows: int) -> Callable[[], None] | None:
        """The replay of the captured tick of so many model rows of the model's own size; None where nothing is.

        While the engine has nothing to do it may be replayed: it writes only to places that no row holds.
        """
        for lane in self.engine._lanes.values():
            if lane.key.width * self.model.vae_scale_factor == self.model.card.width and model_rows in lane.graphs:
                return lane.graphs[model_rows].replay
        return None

    def begin(self) -> float:
        """Start a new run, and return its start on the monotonic clock."""
        with self._lock:
            self._run, self._began_s, self._failures = Run(), time.monotonic(), []
            return self._began_s

    def submit(self, id_: str, request: GenerationRequest) -> None:
        self.engine.submit(Job(id=id_, request=request))

    @property
    def num_ended(self) -> int:
        return len(self._run.ended_s)

    def wait(self, ids: Sequence[str], timeout_s: float) -> Run:
        """Wait until all of `ids` have ended or the time is over; what is left then is cancelled.

        Raises `RuntimeError` when one of them failed.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._broken or self.num_ended == len(ids), timeout=max(0.0, timeout_s))
            self._check()
            run, failures = self._run, list(self._failures)
            self._run = Run()
        self._cancel(set(ids) - run.ended_s.keys())
        if failures:
            raise RuntimeError(f"{len(failures)} of {len(ids)} requests failed, the first with {failures[0]}")
        return run

    def draw(self, requests: Sequence[GenerationRequest], timeout_s: float = TIMEOUT_S) -> Run:
        """All of `requests` at once, to the last picture's bytes. Raises `RuntimeError` when one does not end."""
        self.begin()
        ids = [str(index) for index in range(len(requests))]
        for id_, request in zip(ids, requests, strict=True):
            self.submit(id_, request)
        run = self.wait(ids, timeout_s)
        if len(run.ended_s) < len(ids):
            raise RuntimeError(f"{len(run.ended_s)} of {len(ids)} requests ended in {timeout_s:.0f} s")
        return run

    def _cancel(self, ids: Iterable[str]) -> None:
        pending = set(ids)
        for id_ in pending:
            self.engine.cancel(id_)
        with self._lock:
            if not self._lock.wait_for(lambda: self._broken or pending <= self._run.ended_s.keys(), timeout=60):
                raise RuntimeError("cancelled requests did not end")

    def _ended(self, event: Event) -> None:
        with self._lock:
            self._run.ended_s[event.job.id] = time.monotonic() - self._began_s
            if isinstance(event, Finished):
                self._run.timings.append(event.result.timings)
            else:
                self._failures.append(event)
            self._lock.notify_all()

    def _ticked(self, report: TickReport) -> None:
        self._run.ticks.append((time.monotonic() - self._began_s, report))
