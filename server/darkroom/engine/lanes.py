"""The lanes of a worker, each there while rows need it."""

from __future__ import annotations

from collections.abc import Mapping

from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.batcher import BatchKey
from darkroom.engine.device import TickDevice
from darkroom.engine.lane import Lane
from darkroom.engine.prompts import PromptCache
from darkroom.engine.wide import WideModels


class Lanes(dict[BatchKey, Lane]):
    """Lanes by key, of `models` and of those that are `wide`. Only the ticks' thread may call."""

    def __init__(
        self,
        device: TickDevice,
        models: Mapping[str, DiffusionModel],
        prompts: Mapping[str, PromptCache],
        wide: WideModels,
    ) -> None:
        super().__init__()
        self._device, self._models, self._prompts, self._wide = device, models, prompts, wide

    def make(self, key: BatchKey, num_slots: int | None = None) -> Lane:
        """The lane of a key. A new one takes the place of those that nobody uses and that hold no graphs."""
        if key not in self:
            for idle in [lane for lane in self.values() if lane.is_idle and not lane.graphs]:
                del self[idle.key]
            model = self._wide[key.model].model if key.is_wide else self._models[key.model]
            # Rows in fp32 are few, and hold no more memory than they need.
            num_slots = None if key.is_wide else num_slots
            self[key] = Lane(self._device, model, key, self.prompts_of(key), num_slots=num_slots)
        return self[key]

    def prompts_of(self, key: BatchKey) -> PromptCache:
        """The texts of a lane's rows."""
        return self._wide[key.model].prompts if key.is_wide else self._prompts[key.model]

    def forget_wide(self, model_id: str) -> None:
        """Give back the memory of a model in fp32, and of its lanes."""
        self._wide.forget(model_id)
        for key in [key for key in self if key.is_wide and key.model == model_id]:
            del self[key]
