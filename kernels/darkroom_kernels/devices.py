"""Names under which the measured tables know a device."""

from __future__ import annotations

import torch


def device_kinds(device: torch.device) -> list[str]:
    """Names under which a table may know a device, the closest first: product and class, then the class alone.

    Classes differ in tensor cores and shared memory: 8.x and 12.x have 99 KiB at least, 9.x and 10.x 227 KiB.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return ["sm_90"]
    major, _ = torch.cuda.get_device_capability(device)
    by_class = {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")
    return [f"{torch.cuda.get_device_name(device)} {by_class}", by_class]
