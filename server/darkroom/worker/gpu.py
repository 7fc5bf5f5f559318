"""What torch and the driver say of this worker's GPU, for its metrics."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import pynvml
import structlog
import torch
from prometheus_client import Gauge

from darkroom import metrics

log = structlog.get_logger("darkroom.worker")

_XID_WAIT_MS = 60_000
# NVML puts the kind of a device before the UUID that CUDA gives.
_UUID_PREFIXES = ("GPU-", "MIG-")


def watch_gpu(device: torch.device) -> None:
    """Let the metrics show the CUDA `device` of this process: read at each scrape, Xid errors counted as they come."""
    # CUDA_VISIBLE_DEVICES renumbers GPUs, so only the UUID says which one this is.
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    for kind, read in (("allocated", torch.cuda.memory_allocated), ("reserved", torch.cuda.memory_reserved)):
        metrics.GPU_MEMORY_BYTES.labels(short(uuid), kind).set_function(functools.partial(read, device))
    watch_driver(uuid)


def watch_driver(uuid: str) -> threading.Thread | None:
    """Let the metrics show what NVML knows of the GPU, or MIG slice, with this `uuid` (as CUDA gives it).

    Returns the thread that counts Xid errors. What is not supported is left out; without a driver, all of it.
    """
    try:
        pynvml.nvmlInit()
        handle = _handle(uuid)
    except pynvml.NVMLError as error:
        log.debug("gpu_metrics_unavailable", gpu=uuid, reason=str(error))
        return None
    gpu = short(uuid)
    _show(metrics.GPU_MEMORY_BYTES, (gpu, "used"), lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    _show(metrics.GPU_MEMORY_BYTES, (gpu, "total"), lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    _show(metrics.GPU_UTILIZATION, (gpu,), lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
    _show(metrics.GPU_POWER_WATTS, (gpu,), lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)
    _show(
        metrics.GPU_TEMPERATURE_CELSIUS,
        (gpu,),
        lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
    )
    try:
        events = pynvml.nvmlEventSetCreate()
        pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
    except pynvml.NVMLError as error:
        log.debug("gpu_xid_unavailable", gpu=uuid, reason=str(error))
        return None
    thread = threading.Thread(target=_count_xids, args=(events, uuid), name="gpu-xid", daemon=True)
    thread.start()
    return thread


def short(uuid: str) -> str:
    """The first group of a UUID, as a label: enough to find the GPU in the list of `nvidia-smi -L`."""
    return uuid.partition("-")[0]


def _handle(uuid: str) -> Any:
    """NVML's handle of a device. Raises `NVMLError` when it has none."""
    for prefix in _UUID_PREFIXES[:-1]:
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(prefix + uuid)
        except pynvml.NVMLError:
            continue
    return pynvml.nvmlDeviceGetHandleByUUID(_UUID_PREFIXES[-1] + uuid)


def _show(gauge: Gauge, labels: tuple[str, ...], read: Callable[[], float]) -> None:
    """Read the gauge at each scrape, if it can be read now; NaN where it cannot any more."""

    def read_or_nan() -> float:
        try:
            return read()
        except pynvml.NVMLError:
            return math.nan

    if not math.isnan(read_or_nan()):
        gauge.labels(*labels).set_function(read_or_nan)


def _count_xids(events: Any, uuid: str) -> None:
    """Count the driver's reports for as long as it gives any. The device is often lost with them, and this process."""
    while True:
        try:
            event = pynvml.nvmlEventSetWait_v2(events, _XID_WAIT_MS)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_TIMEOUT:
                continue
            log.warning("gpu_xid_unavailable", gpu=uuid, reason=str(error))
            return
        log.error("gpu_xid", gpu=uuid, xid=event.eventData)
        metrics.GPU_XID_ERRORS.labels(short(uuid), str(event.eventData)).inc()
