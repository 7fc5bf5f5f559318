"""Pictures without a server: one request through an engine in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from darkroom.config import Settings
from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.engine import Engine
from darkroom.engine.events import Event, Failed, Finished, TickReport
from darkroom.errors import JobError
from darkroom.jobs import GenerationRequest, Job, Result, new_job_id


def generate_images(
    model: DiffusionModel,
    request: GenerationRequest,
    settings: Settings,
    on_progress: Callable[[int, int], None] | None = None,
    inputs: Mapping[str, bytes] | None = None,
) -> tuple[list[bytes], Result]:
    """Draw a request and return its encoded images and manifest. `inputs` are the pictures it begins with, as PNG.

    Ticks run on the calling thread, and so does `on_progress(step, num_steps)`. Raises `JobError` when the job fails.
    """
    ended: list[Event] = []

    def on_event(event: Event) -> None:
        ended.append(event)
        engine.stop()

    def on_tick(report: TickReport) -> None:
        if on_progress is not None:
            for _, step, num_steps in report.progress:
                on_progress(step, num_steps)

    engine = Engine({model.id: model}, settings, on_event=on_event, on_tick=on_tick)
    engine.check_kernels()
    engine.submit(Job(id=new_job_id(), request=request), inputs=inputs)
    engine.run()
    event = ended[0]
    if isinstance(event, Finished):
        return event.images, event.result
    if isinstance(event, Failed):
        raise JobError(event.failure.message, code=event.failure.code)
    raise JobError("the job ended without pictures", code="cancelled")
