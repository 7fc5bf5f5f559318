"""What the training runs share: the clock behind the schedule, weight averaging, checkpoints, logs and grids."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.recipes import add_recipe

FINISHED = "finished"


@dataclass
class Progress:
    """How far a run is. Ends after `minutes` of training time or `updates`, whichever is set."""

    minutes: float | None
    updates: int | None
    done_updates: int = 0
    earlier_minutes: float = 0.0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.updates is None):
            raise ValueError("Give exactly one of --minutes and --updates.")
        self._started_s, self._saved_s = time.monotonic(), time.monotonic()
        self._stopping = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = True

    @property
    def elapsed_minutes(self) -> float:
        """Training time, runs that this one resumed included."""
        return self.earlier_minutes + (time.monotonic() - self._started_s) / 60

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        done = self.done_updates / self.updates if self.updates else self.elapsed_minutes / (self.minutes or 1)
        return min(done, 1.0)

    @property
    def finished(self) -> bool:
        return self.fraction >= 1.0

    @property
    def stopping(self) -> bool:
        """Whether the run ends after this update: it is finished, or SIGTERM asks it to save and go."""
        return self.finished or self._stopping

    def is_save_due(self, every_minutes: float) -> bool:
        """Whether to save while the run goes on; says so once for each time that it is due."""
        is_due = time.monotonic() - self._saved_s >= 60 * every_minutes
        if is_due:
            self._saved_s = time.monotonic()
        return is_due


def learning_rate(progress: Progress, peak: float, warmup_updates: int = 100, floor: float = 0.01) -> float:
    """Cosine decay over the run's fraction, so that it ends decayed whatever the speed; linear warm-up by updates."""
    decayed = peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress.fraction)))
    return decayed * min(1.0, (progress.done_updates + 1) / warmup_updates)


class Ema:
    """Exponential moving average of a module's parameters, in fp32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        self._live = dict(module.named_parameters())

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Move towards the live weights; early on the average is short, so the initial weights are forgotten."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in self._live.values()], 1 - decay)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the averages from a checkpoint, whatever the order of its names."""
        self.shadow = {name: laid_out_as(parameter, tensors[name]) for name, parameter in self._live.items()}

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights; a second call undoes the first."""
        for name, parameter in self._live.items():
            parameter.data, self.shadow[name] = self.shadow[name], parameter.data


def laid_out_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A copy of `tensor` on the parameter's device and in its memory layout, which a checkpoint does not keep.

    The fused optimizers go through the memory of both at once, so another order pairs the wrong numbers.
    """
    return torch.empty_like(parameter, requires_grad=False).copy_(tensor)


def follow_cpu_share() -> None:
    """Use as many threads as the process may now use cores: more only wait for each other. Cheap enough per update."""
    num_cores = len(os.sched_getaffinity(0))
    if num_cores != torch.get_num_threads():
        torch.set_num_threads(num_cores)


def run_parser(description: str | None, *, lr: float, ema: float = 0.998, seed: int = 0) -> argparse.ArgumentParser:
    """The options that every run of updates has, with its defaults."""
    parser = argparse.ArgumentParser(description=description)
    add_recipe(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an unfinished run in it resumes")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="length of the run in training time")
    length.add_argument("--updates", type=int, help="length of the run in updates")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--ema", type=float, default=ema)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--scenes", type=int, help="made once; default: the recipe's")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, which takes a minute first")
    parser.add_argument("--report-every", type=int, default=50, help="updates between log rows")
    parser.add_argument("--save-minutes", type=float, help="between checkpoints and samples (1; 10 on a CPU)")
    return parser


def autocast(device: torch.device) -> torch.autocast:
    """Mixed precision in bf16, where the device multiplies it fast: on every GPU, and on some CPUs."""
    has_bf16 = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16)


def finish(run: Path) -> None:
    """Mark a run as finished: its results are whole, and the next stage may read them."""
    (run / FINISHED).touch()


def is_finished(run: Path) -> bool:
    return (run / FINISHED).exists()


def wait_for(run: Path) -> None:
    """Wait until another process has finished this run. Ends this process when the one that started it is gone."""
    parent = os.getppid()
    while not is_finished(run):
        if os.getppid() != parent:
            raise SystemExit(f"nobody is left to finish {run}")
        time.sleep(0.5)


def device_name(device: torch.device) -> str:
    """Return words for the hardware, for the model card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} shared CPU cores"


def refuse_other_recipe(run: Path, recipe: str) -> None:
    """End the process where a run of another recipe lies in this folder: its weights have other shapes."""
    path = run / "progress.json"
    if path.exists() and (found := json.loads(path.read_text())["recipe"]) != recipe:
        raise SystemExit(f"{run} holds a run of the recipe {found}, not {recipe}: give another --out")


def save_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    recipe: dict[str, Any],
) -> None:
    """Write the weights, the optimizer state and the figures. Each file is replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    state = optimizer.state_dict()["state"]
    flat = {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}
    for name, content in (("weights", tensors), ("optimizer", flat)):
        temporary = folder / f"{name}.tmp"
        save_file({key: value.detach().cpu().contiguous() for key, value in content.items()}, temporary)
        os.replace(temporary, folder / f"{name}.safetensors")
    write_record(folder, progress, recipe)


def record_of(args: argparse.Namespace, num_scenes: int, batch_size: int) -> dict[str, Any]:
    """What a run is made with, as the model card tells it. `before` are the parts of it that were made otherwise."""
    record: dict[str, Any] = {
        "recipe": args.recipe,
        "batch": batch_size,
        "scenes": num_scenes,
        "lr": args.lr,
        "seed": args.seed,
        "device": device_name(torch.device(args.device)),
        "torch": torch.__version__,
    }
    if getattr(args, "decoder_only", False):
        record["decoder_only"] = True
    path = args.out / "progress.json"
    if path.exists():
        earlier = json.loads(path.read_text())
        before = earlier.pop("before", [])
        is_same = {name: value for name, value in earlier.items() if name not in ("updates", "minutes")} == record
        if not is_same:
            before.append(earlier)
        if before:
            record["before"] = before
    return record


def write_record(folder: Path, progress: Progress, recipe: dict[str, Any]) -> None:
    """Write how far the run is, and its recipe. A run without this file begins anew."""
    record = {"updates": progress.done_updates, "minutes": round(progress.elapsed_minutes, 2), **recipe}
    temporary = folder / "progress.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, folder / "progress.json")


def load_checkpoint(folder: Path, optimizer: torch.optim.Optimizer, progress: Progress) -> dict[str, Tensor] | None:
    """Restore the optimizer and the progress; return the weights, or None where there is no checkpoint."""
    if not (folder / "progress.json").exists():
        return None
    record = json.loads((folder / "progress.json").read_text())
    progress.done_updates, progress.earlier_minutes = record["updates"], record["minutes"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, name = key.split(".")
        is_moment = value.shape == parameters[int(index)].shape
        state.setdefault(int(index), {})[name] = laid_out_as(parameters[int(index)], value) if is_moment else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return load_file(folder / "weights.safetensors")


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start so, without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class CsvLog:
    """Appends rows to a CSV file; the first row's keys are the header, its updates the first. `fresh` begins anew."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        if fresh:
            path.unlink(missing_ok=True)

    def write(self, **row: float | int) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def cut(self, done_updates: int) -> None:
        """Forget the rows of updates that no checkpoint holds: they are done once more."""
        if self.path.exists():
            head, *lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if int(line.split(",")[0]) <= done_updates]
            self.path.write_text("".join([head, *kept]))

    def rows(self) -> list[dict[str, float]]:
        """What has been logged so far; another process may be writing."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
        return [{name: float(value) for name, value in row.items()} for row in rows]

    def plot(self, *columns: str) -> None:
        """Draw the columns over the updates, one above the other, as a PNG beside the file."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows = self.rows()
        figure, axes = pyplot.subplots(len(columns), 1, figsize=(8, 3 * len(columns)), sharex=True, squeeze=False)
        for axis, column in zip(axes[:, 0], columns, strict=True):
            axis.plot([row["updates"] for row in rows], [row[column] for row in rows])
            axis.set_ylabel(column)
            axis.grid(alpha=0.3)
        axes[-1, 0].set_xlabel("updates")
        figure.tight_layout()
        figure.savefig(self.path.with_suffix(".png"))
        pyplot.close(figure)


def to_tensor(pixels: Tensor) -> Tensor:
    """`[N, H, W, 3]` uint8 to `[N, 3, H, W]` fp32 in [-1, 1], channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_pixels(images: Tensor) -> np.ndarray:
    """`[N, 3, H, W]` in [-1, 1] to `[N, H, W, 3]` uint8."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path: Path, pixels: Iterable[np.ndarray], columns: int, zoom: int = 2) -> None:
    """Write `[H, W, 3]` uint8 pictures as one sheet, row by row."""
    tiles = [Image.fromarray(tile) for tile in pixels]
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * (width + 2), math.ceil(len(tiles) / columns) * (height + 2)))
    for index, tile in enumerate(tiles):
        sheet.paste(tile, ((index % columns) * (width + 2), (index // columns) * (height + 2)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST).save(path)
