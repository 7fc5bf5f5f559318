"""The tick loop: choose rows, step them, settle them.

On a GPU a tick is enqueued while the one before it still runs, and settled when its event says that it is complete: the
host's work is hidden behind the device's. On a CPU a tick is complete when it was called.

The engine knows nothing of Redis or HTTP. Jobs come in through `submit`, events go out through `on_event` and
`on_tick`, both called on engine threads and expected to return at once.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog
import torch
from darkroom_kernels.attention import takes_key_lengths

from darkroom import metrics
from darkroom.config import Settings
from darkroom.diffusion.finish import Finisher
from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.batch import Batch, Tick, checkpoint_of, or_left_out
from darkroom.engine.batcher import Batcher, BatchKey, Choice, row_buckets
from darkroom.engine.checkpoint import MAX_HISTORY, Checkpoint
from darkroom.engine.decode import Decoder, Developed, Encoded
from darkroom.engine.device import TickDevice, device_for, is_out_of_memory
from darkroom.engine.due import Due
from darkroom.engine.events import Cancelled, Event, Expired, Failed, Preview, Saved, TickReport, failed, finished
from darkroom.engine.joining import Joiner, key_of
from darkroom.engine.lane import Lane
from darkroom.engine.lanes import Lanes
from darkroom.engine.prompts import PromptCache
from darkroom.engine.pulse import Pulse
from darkroom.engine.roster import Roster
from darkroom.engine.row import ActiveJob, Row
from darkroom.engine.threads import use_cpu_threads
from darkroom.engine.tracebacks import release_frames
from darkroom.engine.warm_up import capture_ticks, request_of_nobody, try_decoding, turn_away_from_wrong_kernels
from darkroom.engine.wide import WideModels
from darkroom.errors import DeviceLost, JobError
from darkroom.jobs import BatchRow, BatchView, Job, Previews

MAX_DECODE_BATCH = 8

log = structlog.get_logger("darkroom.engine")


@dataclass(frozen=True)
class _InFlight:
    """A tick that was enqueued, and what its report will say."""

    tick: Tick
    choice: Choice
    started_s: float
    joined: int
    not_taken: dict[str, int]


class Engine:
    """Runs jobs of `models` (by id) until `stop`; `clock` is in seconds and monotonic.

    `on_ready` is called from `run` before the first tick; with `warm_up` that is after ticks were captured as graphs,
    where the device has them, and after one picture of each model was drawn for nobody, so that no caller pays for
    first calls. `on_saved` gets the state of running images from time to time, and when `run` ends that of all that
    are unfinished; `on_preview` gets previews of jobs while somebody watches them (`show`). `batcher` and `device`
    replace what the settings and the models call for.
    """

    def __init__(
        self,
        models: Mapping[str, DiffusionModel],
        settings: Settings,
        *,
        worker: str = "local",
        on_event: Callable[[Event], None],
        on_tick: Callable[[TickReport], None] | None = None,
        on_ready: Callable[[], None] | None = None,
        on_saved: Callable[[Saved], None] | None = None,
        on_preview: Callable[[Preview], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        warm_up: bool = False,
        batcher: Batcher | None = None,
        device: TickDevice | None = None,
    ) -> None:
        self.models = dict(models)
        self._settings = settings
        self._worker = worker
        self._on_event = on_event
        self._on_tick = on_tick
        self._on_ready = on_ready
        self._on_saved = on_saved
        self._on_preview = on_preview
        self._clock = clock
        self._warm_up = warm_up
        self._is_reproducible = settings.batching == "reproducible"
        self.pulse = Pulse(settings.lease_s)
        place = next(iter(self.models.values())).device
        self._device = device or device_for(place, graphs=settings.graphs == "auto")
        self.batcher = batcher or Batcher(
            row_buckets(
                settings.max_rows,
                is_reproducible=self._is_reproducible,
                reproducible_rows=settings.reproducible_rows,
                has_graphs=self._device.has_stores,
            )
        )
        # A worker holds up to twice what one tick takes, so that an urgent job need not wait for a place. Memory is
        # planned for as many, see `diffusion.memory.HELD_PER_ROW`.
        self._max_resident = 2 * self.batcher.max_model_rows
        self._prompts = {
            id_: PromptCache(
                model,
                settings.prompt_cache_bytes,
                batch_alone=self._is_reproducible,
                num_in_use=self._max_resident + 2 if self._device.has_stores else None,
                # Rows of several chunks share ticks with those of fewer.
                max_chunks=settings.max_prompt_chunks if takes_key_lengths(settings.attention) else 1,
            )
            for id_, model in self.models.items()
        }
        self._decoder = Decoder(
            self._developed,
            self._encoded,
            on_preview,
            pulse=self.pulse,
            max_batch=1 if self._is_reproducible else MAX_DECODE_BATCH,
            encode_threads=settings.encode_threads,
            finish=Finisher(settings),
            has_few_sizes=self._device.tries_decoding,
        )
        self._num_threads = settings.num_threads or len(os.sched_getaffinity(0))
        self._roster = Roster()
        # From here on only the ticks' thread.
        self._joiner = Joiner(self._device, self.models, self._prompts, self._roster, self._end, clock)
        self._wide = WideModels(self._device, batch_alone=self._is_reproducible)
        self._lanes = Lanes(self._device, self.models, self._prompts, self._wide)
        self._due = Due(settings, self._decoder.previews)
        self._rows: dict[int, Row] = {}
        self._batch: Batch | None = None
        self._in_flight: deque[_InFlight] = deque()
        self._ticking: tuple[Row, ...] = ()
        self._last_done_s = 0.0

    def submit(
        self,
        job: Job,
        *,
        deadline_in_s: float | None = None,
        checkpoints: Mapping[int, bytes] | None = None,
        inputs: Mapping[str, bytes] | None = None,
    ) -> None:
        """Hand a job to the engine. It joins at the next tick; `deadline_in_s` counts from now. Images go on from
        their `checkpoints`, those that were packed for the same picture. A job that begins with pictures brings them as
        `inputs`, PNG by name, and joins when they are encoded.

        Raises `ValueError` when the job asks for a model that this engine does not hold.
        """
        if job.request.model not in self.models:
            raise ValueError(f"model: got {job.request.model!r}, expected one of {sorted(self.models)}")
        now_s = self._clock()
        deadline_s = None if deadline_in_s is None else now_s + deadline_in_s
        active = ActiveJob(job, now_s, deadline_s, self._on_event, checkpoints or {}, inputs or {})
        self._roster.add(active, has_arrived=not job.request.init_image)
        if job.request.init_image:
            self._decoder.encode(active, self.models[job.request.model])

    def cancel(self, job_id: str, attempt: int = 0) -> None:
        """Drop a job's rows before the next tick; `Cancelled` follows unless it ends first.

        An unknown id is ignored, and so is one that is here as another attempt.
        """
        self._roster.cancel(job_id, attempt)

    def cut_short(self, job_id: str, attempt: int = 0) -> None:
        """Make a job's pictures of what its images look like after their next evaluation; `Finished` follows.

        One that is not here as this attempt is ignored.
        """
        self._roster.cut_short(job_id, attempt)

    def show(self, job_id: str, attempt: int, previews: Previews) -> None:
        """From now on make these previews of a running job; one that is not here as this attempt is ignored."""
        self._roster.show(job_id, attempt, previews)

    def stop(self) -> None:
        """End `run` after the ticks in flight."""
        self._roster.stop()

    def resident_model_rows(self) -> int:
        """Model rows held or about to be held; what a worker subtracts from its room before it claims more."""
        return self._roster.unfinished_model_rows()

    def batch_view(self) -> BatchView:
        """What any thread may see of the images in hand. Takes no part in the ticks, so it may be a moment old."""
        ticking = self._ticking
        rows = [
            BatchRow(
                id=row.id,
                job_id=row.active.job.id,
                state="developed" if row.is_denoised else "in_tick" if row in ticking else "waiting",
                step=row.num_done,
                num_steps=row.table.num_evaluations,
            )
            for row in self._roster.rows()
        ]
        return BatchView(rows=rows, max_model_rows=self.batcher.max_model_rows)

    def run(self) -> None:
        """The loop. Returns after `stop`; unfinished jobs stay unfinished and no event is sent for them.

        The thread that runs it gets all CPU threads, and should be the only one that does (`use_cpu_threads`). Raises
        `ConfigError` on a size that cannot be captured, `DeviceLost` when the process is left without its device.
        """
        use_cpu_threads(self._num_threads)
        try:
            with torch.inference_mode(), self._device.activated(is_reproducible=self._is_reproducible):
                if self._warm_up:
                    started_s = self._clock()
                    self._prepare()
                    metrics.WARM_UP_SECONDS.set(self._clock() - started_s)
                self._roster.open()
                if self._on_ready is not None and not self._roster.is_stopping:
                    self._on_ready()
                while self._turn():
                    pass
                while self._in_flight:
                    self._complete()
                self._save_all()
        except Exception as error:
            if not self._device.is_lost(error):
                raise
            raise DeviceLost(f"the device was lost: {error}", self._under_way()) from error
        finally:
            self._decoder.close()

    def _under_way(self) -> set[str]:
        """The jobs that may have taken the device along: those in ticks, being decoded or encoded."""
        rows = [*self._ticking, *(row for flight in self._in_flight for row in flight.tick.rows)]
        ids = self._roster.encoding() | {
            row.active.job.id for row in self._roster.rows() if row.is_denoised and row.index not in row.active.images
        }
        return ids | {row.active.job.id for row in rows}

    def check_kernels(self) -> None:
        """Turn away from kernels that are wrong on this device."""
        turn_away_from_wrong_kernels(self.models.values(), self._settings.kernels)

    def _prepare(self) -> None:
        """Meet what jobs will meet, before there are any."""
        models, sizes_px = self.models.values(), self._settings.graph_sizes_px
        self.check_kernels()
        with self._device.trying_algorithms(is_reproducible=self._is_reproducible):
            if self._device.has_graphs:
                capture_ticks(
                    models,
                    sizes_px,
                    lambda key: self._lane(key, num_slots=self._max_resident),
                    self.batcher.buckets,
                    lambda: self._roster.is_stopping,
                )
            if self._device.tries_decoding:
                try_decoding(models, sizes_px, self._decoder, lambda: self._roster.is_stopping)
            if self._on_preview is not None:
                for model in models:
                    self._decoder.previews.fit(model)
            for model in models:
                self._draw_for_nobody(model)

    def _draw_for_nobody(self, model: DiffusionModel) -> None:
        """Draw one picture, and raise what that meets."""
        ended = list[Event]()

        def on_end(event: Event) -> None:
            ended.append(event)
            self._roster.wake()

        on_tick, self._on_tick = self._on_tick, None
        job = Job(id="warm-up", request=request_of_nobody(model))
        self._joiner.postponed.append(ActiveJob(job, self._clock(), None, on_end))
        while not ended and self._turn(until=lambda: bool(ended)):
            pass
        self._on_tick = on_tick
        if ended and isinstance(ended[0], Failed):
            raise JobError(ended[0].failure.message, code=ended[0].failure.code)

    def _turn(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for something to do, or for `until`, and do it once. Returns False when told to stop."""
        news = self._roster.wait(lambda: bool(self._rows or self._in_flight or self._joiner.postponed) or until())
        if news is None:
            return False
        arrived = self._joiner.take_postponed() + news.arrived
        with self.pulse.phase("turn", self._size_of_turn(arrived)):
            self._take_turn(arrived, news.cancelled)
        return True

    def _size_of_turn(self, arrived: Sequence[ActiveJob]) -> float:
        """What a turn may take grows like this: model rows × latent pixels of the largest tick it may run, and once
        more by the pixels, as attention does."""
        sizes = [(len(row.conditionings), row.shape[1] * row.shape[2]) for row in self._rows.values()]
        for active in arrived:
            request, model = active.job.request, self.models[active.job.request.model]
            key = key_of(model, request.width, request.height)
            sizes.append((request.num_model_rows, key.height * key.width))
        most = max((pixels for _, pixels in sizes), default=1)
        return float(min(sum(rows for rows, _ in sizes), self.batcher.max_model_rows) * most * most)

    def _take_turn(self, arrived: list[ActiveJob], cancelled: list[ActiveJob]) -> None:
        for active in cancelled:
            self._end(active, Cancelled(active.job))
        self._expire(arrived)
        for row in [row for row in self._rows.values() if row.active.is_over]:
            self._drop(row)
        joined = self._join([active for active in arrived if not active.is_over])
        self._seat()
        # A row that finds no place in its lane waits for one.
        candidates = (row.candidate() for row in self._rows.values() if row.slot is not None and not row.active.is_over)
        choice = self.batcher.choose(candidates, self._clock())
        if choice is not None:
            self._tick(choice, joined)
        elif self._in_flight:
            self._complete()

    def _tick(self, choice: Choice, joined: int) -> None:
        """Enqueue a tick, then settle what is complete by then."""
        started_s = self._clock()
        rows = self._ticking = tuple(self._rows[id_] for id_ in choice.ids)
        not_taken = self._not_taken(choice) if len(rows) < len(self._rows) else {}
        try:
            if self._batch is None or self._batch.rows != rows or self._batch.bucket != choice.bucket:
                self._batch = Batch(self._lanes[choice.key], rows, choice.bucket)
            to_save = self._due.to_save(rows, started_s) if self._on_saved is not None else []
            to_show = self._due.to_show(rows, started_s) if self._on_preview is not None else []
            tick = self._batch.enqueue(to_save, to_show)
        except Exception as error:
            self._batch = None
            self._fail_tick(choice, rows, error)
            return
        for row in to_save:
            row.saved_s, row.saved_step = started_s, row.step_index
        for row in to_show:
            row.shown_s, row.shown_step = started_s, row.step_index
        self._enqueued(tick, started_s)
        self._in_flight.append(_InFlight(tick, choice, started_s, joined, not_taken))
        while len(self._in_flight) > self._device.ticks_ahead:
            self._complete()

    def _save(self, row: Row, checkpoint: Checkpoint) -> None:
        row.saved = checkpoint
        metrics.CHECKPOINTS.inc()
        if self._on_saved is not None:
            self._on_saved(Saved(row.active.job, checkpoint))

    def _save_all(self) -> None:
        """Make safe what is unfinished when nothing is in flight any more: not one evaluation is done twice."""
        if self._on_saved is None:
            return
        saved = []
        for row in self._roster.rows():
            with or_left_out("no_checkpoint", row, self._device):
                if row.num_done == row.table.num_evaluations and row.last_latents is not None:
                    latents = self._device.download(row.last_latents)
                    nothing = latents.new_zeros((MAX_HISTORY, *latents.shape))
                    saved.append((row, Checkpoint(row.index, row.num_done, latents, nothing, 0, row.fingerprint)))
                elif row.slot is not None and row.num_done:
                    saved.append((row, checkpoint_of(self._lanes[row.key], row, row.num_done)))
        self._device.wait(self._device.record())
        for row, checkpoint in saved:
            if not row.active.is_over:
                self._save(row, checkpoint)

    def _not_taken(self, choice: Choice) -> dict[str, int]:
        """How many rows the choice leaves waiting, by reason."""
        reasons: dict[str, int] = {}
        taken, is_redelivered = set(choice.ids), self._rows[choice.ids[0]].active.job.failures > 0
        for row in self._rows.values():
            if row.id in taken or row.active.is_over:
                continue
            if row.slot is None:
                reason = "no_slot"
            elif row.key != choice.key:
                reason = "other_shape"
            elif (row.active.job.failures > 0) != is_redelivered:
                reason = "kept_apart"
            else:
                reason = "no_room"
            reasons[reason] = reasons.get(reason, 0) + 1
        return reasons

    def _enqueued(self, tick: Tick, started_s: float) -> None:
        """What can be known of a tick before it is complete."""
        for row in tick.rows:
            row.waiting_since_s = started_s
            if row.active.first_tick_s is None:
                row.active.first_tick_s = started_s
            if row.is_denoised:
                self._drop(row)

    def _complete(self) -> None:
        """Wait for the oldest tick in flight, settle its rows, and report it."""
        flight = self._in_flight.popleft()
        tick, choice = flight.tick, flight.choice
        self._device.wait(tick.done)
        now_s = self._clock()
        # From completion to completion where ticks follow each other without a gap.
        seconds = now_s - max(flight.started_s, self._last_done_s)
        self._last_done_s = now_s
        # A job that ends meanwhile, on another thread, has none any more.
        rows_of = {row.active: row.active.rows for row in tick.rows}
        self._settle(tick, choice, now_s)
        self.batcher.account(choice.key, seconds, max(row.active.job.priority.rank for row in tick.rows))
        if self._on_tick is not None:
            self._on_tick(
                TickReport(
                    choice=choice,
                    seconds=seconds,
                    ended_s=now_s,
                    num_rows=len(tick.rows),
                    joined=flight.joined,
                    left=len(tick.finished),
                    not_taken=flight.not_taken,
                    progress=[(active.job, *_progress_of(rows)) for active, rows in rows_of.items()],
                )
            )

    def _settle(self, tick: Tick, choice: Choice, now_s: float) -> None:
        for row, is_finite in zip(tick.rows, tick.is_finite.tolist(), strict=False):
            active = row.active
            if active.is_over or row.is_replaced:
                continue
            row.num_done += 1
            row.waiting_since_s = max(row.waiting_since_s, now_s)
            active.last_tick_s = now_s
            active.max_batch_rows = max(active.max_batch_rows, choice.model_rows)
            if not is_finite:
                metrics.NON_FINITE.labels("tick").inc()
                self._begin_again(row, now_s)
            elif row in tick.finished:
                if row.key.is_wide:
                    metrics.NON_FINITE_RECOVERED.labels("tick").inc()
                self._decoder.submit(row, tick.finished[row], tick.done)
            elif row in tick.saved:
                self._save(row, tick.saved[row])
            if is_finite and row in tick.shown:
                self._decoder.previews.show(row, tick.shown[row], row.num_done)

    def _begin_again(self, row: Row, now_s: float) -> None:
        """Try an image once more whose numbers are not finite; one that was tried in fp32 already fails its job."""
        active = row.active
        if not row.key.is_wide:
            try:
                again = self._wide.begin_again(row, now_s)
            except Exception as error:
                if self._device.is_lost(error):
                    raise
                release_frames(error)
                self._forget_wide(row.key.model)
                log.warning("image_not_begun_again", job_id=active.job.id, image=row.index, exc_info=error)
            else:
                log.warning("image_begun_again", job_id=active.job.id, image=row.index, step=again.step_index)
                self._roster.replace(row, again)
                self._rows[again.id] = again
                if row.id in self._rows:
                    self._drop(row)
                metrics.ROWS_JOINED.inc()
                return
        self._end(active, failed(active, JobError("the picture came out as NaN or infinity", code="non_finite")))

    def _drop(self, row: Row) -> None:
        """Take a row out: its slot and its texts are free for others, whose use of them comes after its last tick."""
        del self._rows[row.id]
        if self._roster.is_open:
            metrics.ROWS_LEFT.labels("finished" if row.is_denoised else "ended_early").inc()
        if row.slot is not None:
            self._lanes[row.key].pool.release(row.slot)
            row.slot = None
        self._lanes.prompts_of(row.key).release(conditioning.encoded for conditioning in row.conditionings)
        if row.key.is_wide:
            self._forget_wide(row.key.model)

    def _forget_wide(self, model_id: str) -> None:
        """Give the memory of a model in fp32 back once no row needs it."""
        if not any(row.key.is_wide and row.key.model == model_id for row in self._rows.values()):
            self._lanes.forget_wide(model_id)
            self._batch = None

    def _expire(self, arrived: list[ActiveJob]) -> None:
        """Jobs past their deadline cost no further tick."""
        now_s = self._clock()
        late = {active for active in (*arrived, *(row.active for row in self._rows.values())) if active.is_late(now_s)}
        for active in late:
            self._end(active, Expired(active.job))

    def _fail_tick(self, choice: Choice, rows: tuple[Row, ...], error: Exception) -> None:
        """One row may be the cause: try each alone once, and fail only those that fail alone. A row that was alone is
        tried again where memory was short, which may have been the decoder's doing. One that is spoilt would be
        stepped twice, and fails.

        An error that takes the device away is raised: nothing can be tried any more, and no job is to blame.
        """
        log.error("tick_failed", rows=len(rows), error=type(error).__name__, exc_info=error)
        if self._device.is_lost(error):
            raise error
        release_frames(error)
        if is_out_of_memory(error):
            metrics.OUT_OF_MEMORY.labels("tick").inc()
        # A captured tick has its memory, whatever else ran out of it.
        if is_out_of_memory(error) and choice.bucket not in self._lanes[choice.key].graphs:
            limit = self.batcher.halve(choice.key, choice.bucket)
            if limit is not None:
                log.warning("rows_limited", key=choice.key, bucket=choice.bucket, limit=limit)
        while self._in_flight:
            self._complete()
        for row in rows:
            if row.active.is_over or row.is_replaced:
                continue
            if not row.is_spoilt and (len(rows) > 1 or is_out_of_memory(error)):
                started_s = self._clock()
                bucket = next(b for b in self.batcher.buckets if b >= len(row.conditionings))
                try:
                    tick = Batch(self._lanes[row.key], (row,), bucket).enqueue()
                except Exception as alone:
                    if self._device.is_lost(alone):
                        raise
                    release_frames(alone)
                    error = alone
                else:
                    self._enqueued(tick, started_s)
                    self._device.wait(tick.done)
                    self._settle(tick, choice, self._clock())
                    continue
            self._end(row.active, failed(row.active, error))

    def _join(self, arrived: list[ActiveJob]) -> int:
        """Take the newcomers' rows in. Returns how many have evaluations to come."""
        joined = 0
        for row in self._joiner.join(arrived):
            if not row.is_denoised:
                self._rows[row.id] = row
                joined += 1
            elif row.first_latents is not None:
                row.last_latents = self._device.upload(row.first_latents)
                self._decoder.submit(row, row.last_latents, self._device.record())
        if joined and self._roster.is_open:
            metrics.ROWS_JOINED.inc(joined)
        return joined

    def _seat(self) -> None:
        """Give rows that have none a slot of their lane's pool, most urgent class first."""
        unseated = [row for row in self._rows.values() if row.slot is None]
        for row in sorted(unseated, key=lambda row: -row.active.job.priority.rank) if len(unseated) > 1 else unseated:
            assert row.first_latents is not None  # noqa: S101
            try:
                taken = self._lane(row.key).pool.take(row.first_latents, row.first_previous, row.condition)
            except Exception as error:
                if self._device.is_lost(error):
                    raise
                self._end(row.active, failed(row.active, error))
                continue
            if taken is not None:
                row.slot, row.last_latents = taken
                row.first_latents = row.first_previous = row.condition = None

    def _lane(self, key: BatchKey, num_slots: int | None = None) -> Lane:
        if key not in self._lanes:
            # It may be of a lane that goes to make room.
            self._batch = None
        return self._lanes.make(key, num_slots)

    def _encoded(self, encoded: Encoded) -> None:
        active = encoded.active
        if isinstance(encoded.outcome, Exception):
            self._failed_beside(active, encoded.outcome)
            return
        active.start, active.inputs = encoded.outcome, {}
        active.note("encode", encoded.interval)
        self._roster.arrive(active)

    def _failed_beside(self, active: ActiveJob, error: Exception) -> None:
        """End a job that failed on the decoder's thread, or the engine when the device was lost there."""
        if self._device.is_lost(error):
            self._roster.break_(error)
        else:
            self._end(active, failed(active, error))

    def _developed(self, developed: Developed) -> None:
        row, active = developed.row, developed.row.active
        if isinstance(developed.outcome, Exception):
            self._failed_beside(active, developed.outcome)
            return
        if self._roster.add_image(row, developed.outcome, developed.decode, developed.image_encode):
            self._end(active, finished(active, row.model, self._worker))

    def _end(self, active: ActiveJob, event: Event) -> None:
        """Send a job's one terminal event and forget the job; a second end of the same job is ignored.

        May run on a decoder thread; the tick thread drops the job's rows before its next choice.
        """
        if self._roster.end(active):
            active.on_end(event)


def _progress_of(rows: Sequence[Row]) -> tuple[int, int]:
    """Evaluations done by the slowest image, and those of the longest."""
    return min((row.num_done for row in rows), default=0), max((row.table.num_evaluations for row in rows), default=0)
