"""A second try for an image whose numbers turned to NaN or infinity: from its last saved state, in fp32, and apart.

Ticks overlap, so when a row is seen to have overflowed its slot holds nothing of use any more. What it goes on from is
the last state that was made safe, or else its first noise.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.device import TickDevice
from darkroom.engine.joining import make_rows, prompts_of
from darkroom.engine.prompts import PromptCache
from darkroom.engine.row import Row


@dataclass(frozen=True)
class Wide:
    """A model in fp32 and the texts of its rows."""

    model: DiffusionModel
    prompts: PromptCache


class WideModels:
    """Models in fp32, each there while rows need it. Only the ticks' thread may call."""

    def __init__(self, device: TickDevice, *, batch_alone: bool) -> None:
        self._device, self._batch_alone = device, batch_alone
        self._wide: dict[str, Wide] = {}

    def __getitem__(self, model_id: str) -> Wide:
        return self._wide[model_id]

    def begin_again(self, row: Row, now_s: float) -> Row:
        """A row that makes the image of `row` in fp32; it holds a reference to each of its texts. Raises what the
        attempt meets, a lack of memory for the model above all."""
        active, model = row.active, row.model
        wide = self._wide.get(model.id)
        if wide is None:
            widened = model.widened()
            wide = self._wide[model.id] = Wide(widened, PromptCache(widened, 0, batch_alone=self._batch_alone))
        if row.saved is not None:
            active.checkpoints = {**active.checkpoints, row.index: row.saved.pack()}
        encoded = wide.prompts.encode(prompts_of(wide.model, active.job))
        try:
            again = make_rows(self._device, wide.model, active, encoded, now_s)[row.index]
            again.key = dataclasses.replace(again.key, is_wide=True)
            wide.prompts.retain(conditioning.encoded for conditioning in again.conditionings)
        finally:
            wide.prompts.release(encoded.values())
        return again

    def forget(self, model_id: str) -> None:
        """Give back the memory of a model that no row needs in fp32 any more."""
        self._wide.pop(model_id, None)
