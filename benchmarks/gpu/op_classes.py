"""Where a network's time goes: seconds of its kernels, by what they compute."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

OTHER = "elementwise and copies"
# The first pattern that a kernel's name matches decides: cuDNN's attention is called a convolution too, and its
# convolutions are called implicit products.
CLASSES: tuple[tuple[str, re.Pattern[str]], ...] = (
    # The product before it is torch's and has a name of its own.
    (OTHER, re.compile(r"_geglu_gate")),
    ("attention", re.compile(r"attention|attn|sdpa|flash|fmha|few_keys", re.I)),
    ("norm", re.compile(r"norm|moments|welford|_statistics", re.I)),
    ("convolution", re.compile(r"conv|cudnn|fprop|implicit|winograd|nhwcTo|nchwTo", re.I)),
    ("matrix product", re.compile(r"gemm|gemv|nvjet|cutlass|cublas|splitk|linear|addmm|\bmm\b|bmm|matmul|geglu", re.I)),
)


def class_of(name: str) -> str:
    """The class of a kernel, on a CPU of an operator, by its name."""
    return next((label for label, pattern in CLASSES if pattern.search(name)), OTHER)


@torch.inference_mode()
def seconds_by_class(call: Callable[[], object], device: torch.device, *, turns: int = 3) -> dict[str, float]:
    """Seconds of one `call` in each class: device kernels on CUDA, operators' own time on a CPU."""
    on_gpu = device.type == "cuda"
    call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(turns):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    found: dict[str, float] = {}
    for event in profiler.events():
        if on_gpu:
            # Kernels and copies alone; an operator's own entry would count them twice.
            if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
                continue
            microseconds = event.time_range.elapsed_us()
        else:
            microseconds = event.self_cpu_time_total
        label = class_of(event.name)
        found[label] = found.get(label, 0.0) + microseconds * 1e-6 / turns
    return dict(sorted(found.items(), key=lambda item: -item[1]))
