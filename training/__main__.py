"""Train the shipped models: `python -m training`. The same command goes on where it was stopped.

The recipe is `full` on a GPU and `small` on a CPU, unless `--recipe` names the other.

The autoencoder and the text encoder come first, then the denoiser, then the student that is distilled from it. On a GPU
the later stages get ready (scenes, compilation) while the earlier ones train.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from training import common
from training.painting import require_font
from training.recipes import RECIPES, Recipe, add_recipe


def commands(recipe: Recipe, out: Path, minutes: float, device: str, scenes: int | None = None) -> dict[str, list[str]]:
    """Stage -> its command, in the order in which they depend on each other. `scenes` is for each stage."""
    runs = {stage: out / stage for stage in ("text", "vae", "unet", "student")}
    given = {stage: ["--recipe", recipe.name, "--out", str(run), "--device", device] for stage, run in runs.items()}
    for stage, share in recipe.shares.items():
        given[stage] += ["--minutes", f"{share * minutes:.3f}"]
        # The text encoder trains for less time than compiling it would take.
        if device != "cpu" and stage != "text":
            given[stage].append("--compile")
    if scenes is not None:
        for words in given.values():
            words += ["--scenes", str(scenes)]
    for stage in ("unet", "student"):
        given[stage] += ["--vae", str(runs["vae"]), "--text", str(runs["text"]), "--wait"]
    given["student"] += ["--teacher", str(runs["unet"])]
    modules = {"text": "train_text", "vae": "train_vae", "unet": "train_unet", "student": "distill"}
    return {stage: [sys.executable, "-m", f"training.{modules[stage]}", *words] for stage, words in given.items()}


def follow(
    processes: dict[str, subprocess.Popen[bytes]], shares: dict[str, float], out: Path, minutes: float, bar: tqdm
) -> None:
    """Wait until all are finished, telling the stage's last log row. Ends all when one fails or this process ends."""
    try:
        while True:
            ended = {stage: process.returncode for stage, process in processes.items() if process.poll() is not None}
            for stage in processes:
                rows = common.CsvLog(out / stage / "log.csv").rows()
                if stage in ended:
                    if not common.is_finished(out / stage):
                        sys.exit(f"{stage} ended unfinished with code {ended[stage]}: see {out / stage}.log")
                elif rows:
                    bar.set_description(stage, refresh=False)
                    bar.set_postfix({name: f"{value:.4g}" for name, value in rows[-1].items()}, refresh=False)
            done = sum(
                share * (1.0 if common.is_finished(out / stage) else _fraction(out / stage, share * minutes))
                for stage, share in shares.items()
            )
            bar.update(round(100 * done, 1) - bar.n)
            bar.refresh()
            if len(ended) == len(processes):
                return
            time.sleep(2)
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait()


def _fraction(run: Path, minutes: float) -> float:
    rows = common.CsvLog(run / "log.csv").rows()
    return min(1.0, rows[-1]["minutes"] / minutes) if rows and minutes else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_recipe(parser)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs; unfinished ones resume")
    parser.add_argument("--minutes", type=float, help="of training in all; default: the recipe's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--scenes", type=int, help="for each stage; a few, with a part of a minute, try the whole chain"
    )
    parser.add_argument("--models", type=Path, default=Path("server/darkroom/models"), help="where the models go")
    args = parser.parse_args()

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[args.recipe]
    minutes = recipe.minutes if args.minutes is None else args.minutes
    if minutes <= 0:
        parser.error(f"--minutes: got {minutes:g}, expected more than 0")
    require_font()
    all_stages = commands(recipe, args.out, minutes, args.device, args.scenes)
    for stage in all_stages:
        common.refuse_other_recipe(args.out / stage, recipe.name)
    open_stages = {stage: command for stage, command in all_stages.items() if not common.is_finished(args.out / stage)}
    if not open_stages:
        print(f"All stages in {args.out} are finished, and are exported once more. Another --out trains anew.")
    # A CPU has nothing left over to get the next stage ready with.
    groups = [[stage] for stage in open_stages] if args.device == "cpu" else [list(open_stages)]
    with tqdm(total=100, unit="%", mininterval=1) as bar:
        for group in groups:
            processes = {}
            for stage in group:
                with (args.out / f"{stage}.log").open("ab") as output:
                    # In a session of its own, Ctrl-C reaches it as this process's SIGTERM, at which it saves.
                    processes[stage] = subprocess.Popen(
                        open_stages[stage], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                    )
            follow(processes, recipe.shares, args.out, minutes, bar)
    export = ["--vae", "vae", "--text", "text", "--unet", "unet", "--student", "student"]
    words = [word if word.startswith("--") else str(args.out / word) for word in export]
    subprocess.run(
        [sys.executable, "-m", "training.export", "--recipe", recipe.name, *words, "--out", str(args.models)],
        check=True,
    )


if __name__ == "__main__":
    main()
