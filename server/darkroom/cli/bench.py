"""`darkroom bench`: measure this machine."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from darkroom.cli.common import read_settings
from darkroom.errors import ConfigError

bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)


@bench.command()
def kernels(
    tune: Annotated[
        bool, typer.Option("--tune", help="Try every form and tile, and rewrite the tables that `auto` reads.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="SDXL's shapes alone.")] = False,
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", help="With --tune: begin no shape after this.")] = 480,
    device: Annotated[str, typer.Option(help="cuda or cuda:N; cpu runs toy shapes, which say nothing of speed.")] = (
        "cuda"
    ),
) -> None:
    """Time the kernels at the shapes of SD 1.5, SD 2.1 and SDXL, against what PyTorch offers."""
    read_settings("bench", log_level="error")
    from darkroom.worker.main import choose_device

    place = choose_device(device)
    if tune and place.type == "cpu":
        raise ConfigError("--tune: tiles are tuned on a CUDA device")
    from darkroom_kernels.bench.report import bench_kernels, tune_attention, tune_kernels

    if tune:
        # The others first: they take seconds, and attention the rest of the time.
        began_s = time.monotonic()
        tune_kernels(place, quick=quick, time_limit_s=time_limit, say=typer.echo)
        left_s = time_limit - (time.monotonic() - began_s)
        tune_attention(place, quick=quick, time_limit_s=left_s, say=typer.echo)
    else:
        bench_kernels(place, quick=quick, say=typer.echo)
