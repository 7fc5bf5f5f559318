"""One tick: the rows' tensors put together, one UNet call, one fused update.

A `Batch` lives as long as its membership: while nobody joins or leaves, latents, history and text keys and values stay
stacked and nothing is copied between ticks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from darkroom_kernels.step import scale_input, step_

from darkroom.diffusion.loader import DiffusionModel
from darkroom.engine.row import Row


class Batch:
    """Rows of one model and one latent shape, padded to `bucket` model rows.

    Model rows are laid out as: every row with its prompt, then the guided rows with their negative prompts, then
    padding that repeats the first row and is thrown away.
    """

    def __init__(self, rows: Sequence[Row], bucket: int) -> None:
        self.rows = tuple(rows)
        self.bucket = bucket
        self.model: DiffusionModel = rows[0].model
        guided = [i for i, row in enumerate(rows) if len(row.conditionings) > 1]
        sources = [*range(len(rows)), *guided]
        self.num_model_rows = len(sources)
        sources += [0] * (bucket - len(sources))
        conditionings = [row.conditionings[0] for row in rows] + [rows[i].conditionings[1] for i in guided]
        self._conditionings = conditionings + [conditionings[0]] * (bucket - len(conditionings))

        device = self.model.device
        uncond = list(range(len(rows)))
        for offset, i in enumerate(guided):
            uncond[i] = len(rows) + offset
        self._sources = torch.tensor(sources, device=device)
        self._cond = torch.arange(len(rows), device=device)
        self._uncond = torch.tensor(uncond, device=device)
        self._guidance = torch.tensor([row.guidance_scale for row in rows], dtype=torch.float32, device=device)
        self._text_kv, self._text_lengths = self._stack_text()
        self._latents = torch.stack([row.latents for row in rows])
        self._previous = torch.stack([row.previous for row in rows])
        self._is_finite = torch.ones(len(rows), dtype=torch.bool, device=device)

    @torch.inference_mode()
    def tick(self) -> None:
        """Advance every row by one evaluation."""
        device, rows = self.model.device, self.rows
        coefficients = torch.stack([row.table.coefficients[row.step_index] for row in rows]).to(
            device, non_blocking=True
        )
        noise = None
        if any(row.table.needs_noise[row.step_index] for row in rows):
            noise = torch.stack(
                [
                    row.draw_noise() if row.table.needs_noise[row.step_index] else torch.zeros(row.latents.shape)
                    for row in rows
                ]
            ).to(device, non_blocking=True)
        steps = [row.step_index for row in rows]
        per_model_row = steps + [steps[i] for i in range(len(rows)) if len(rows[i].conditionings) > 1]
        per_model_row += [steps[0]] * (self.bucket - len(per_model_row))
        time_projection = torch.stack(
            [
                conditioning.time_projection[index]
                for conditioning, index in zip(self._conditionings, per_model_row, strict=True)
            ]
        )
        model_output = self.model.unet(
            scale_input(self._latents, coefficients, self._cond, self._sources, self.model.dtype),
            time_projection,
            self._text_kv,
            self._text_lengths,
        )
        # A batch is its own pool, of which row i holds slot i.
        step_(
            self._latents,
            self._previous,
            model_output,
            self._cond,
            self._cond,
            self._uncond,
            self._guidance,
            coefficients,
            noise,
            self._is_finite,
        )
        for i, row in enumerate(rows):
            row.latents, row.previous = self._latents[i], self._previous[i]
            row.step_index += 1

    def _stack_text(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[bucket, L, text_kv_width]`, and `[bucket]` lengths when prompts differ in length."""
        tensors = [conditioning.text_kv for conditioning in self._conditionings]
        lengths = [tensor.shape[0] for tensor in tensors]
        if len(set(lengths)) == 1:
            return torch.stack(tensors), None
        padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        return padded, torch.tensor(lengths, dtype=torch.int32, device=padded.device)
