"""The loop of updates that all stages share, with its log, averages and checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training import common


class Trainer:
    """Trains `module` with AdamW as `common.run_parser`'s options say, and goes on where `args.out` was left.

    `generator` is for whatever an update draws; a run that goes on draws other numbers than before.
    """

    def __init__(
        self, args: argparse.Namespace, module: nn.Module, *, weight_decay: float, num_scenes: int, batch_size: int
    ) -> None:
        common.refuse_other_recipe(args.out, args.recipe)
        device = torch.device(args.device)
        self.module = module
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        self.progress = common.Progress(args.minutes, args.updates)
        weights = common.load_checkpoint(args.out, self.optimizer, self.progress)
        self.ema = common.Ema(module, args.ema)
        if weights:
            module.load_state_dict(common.with_prefix(weights, "live."))
            self.ema.restore(common.with_prefix(weights, "ema."))
        self.log = common.CsvLog(args.out / "log.csv", fresh=not weights)
        self.log.cut(self.progress.done_updates)
        self.generator = torch.Generator(device).manual_seed(args.seed + self.progress.done_updates)
        self._args = args
        self._save_minutes = args.save_minutes or (1 if device.type == "cuda" else 10)
        self._record = common.record_of(args, num_scenes, batch_size)

    @torch.no_grad()
    def take_averages(self) -> None:
        """Go on from the averaged weights: those that get no gradient then stay exactly so."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(self.ema.shadow[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The module has its averaged weights meanwhile."""
        self.ema.swap()
        try:
            yield
        finally:
            self.ema.swap()

    def run(
        self,
        batch_loss: Callable[[], Tensor],
        measure: Callable[[], dict[str, float]] = dict,
        show: Callable[[], None] = lambda: None,
    ) -> None:
        """Update until the run is over or told to stop.

        `measure` gives more columns for each row of the log. `show` leaves something to look at beside a checkpoint.
        Both are called with averaged weights.
        """
        progress, running = self.progress, list[Tensor]()
        bar = tqdm(total=self._args.updates, initial=progress.done_updates, desc=self._args.out.name, mininterval=10)

        def report() -> None:
            loss, rate = float(torch.stack(running).mean()), self.optimizer.param_groups[0]["lr"]
            running.clear()
            with self.averaged():
                more = measure()
            minutes = round(progress.elapsed_minutes, 2)
            self.log.write(updates=progress.done_updates, minutes=minutes, loss=loss, lr=rate, **more)
            bar.set_postfix({"loss": f"{loss:.4f}"} | {name: f"{value:.1f}" for name, value in more.items()})

        def save() -> None:
            tensors = {f"live.{name}": p for name, p in self.module.named_parameters()}
            tensors |= {f"ema.{name}": p for name, p in self.ema.shadow.items()}
            common.save_checkpoint(self._args.out, tensors, self.optimizer, progress, self._record)
            with self.averaged():
                show()

        while not progress.stopping:
            common.follow_cpu_share()
            for group in self.optimizer.param_groups:
                group["lr"] = common.learning_rate(progress, self._args.lr)
            loss = batch_loss()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            progress.done_updates += 1
            self.ema.update(progress.done_updates)
            running.append(loss.detach())
            bar.update()
            if progress.done_updates % self._args.report_every == 0:
                report()
            if progress.is_save_due(self._save_minutes):
                save()
        if running:
            report()
        save()
        bar.close()

    def finish(self) -> None:
        """Plot the log, and mark the run as finished if it is."""
        columns = [name for name in self.log.rows()[-1] if name not in ("updates", "minutes")]
        self.log.plot(*columns)
        if self.progress.finished:
            common.finish(self._args.out)
