"""What NVIDIA's driver tells of the GPUs: names and the energy they have used. Nothing where there is no driver."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_TEXT_BYTES = 96


@dataclass(frozen=True)
class Gpu:
    """One GPU. `millijoules`: used since the driver was loaded; None: this one does not count."""

    uuid: str
    name: str
    millijoules: int | None


def gpus(load: Any = ctypes.CDLL) -> list[Gpu]:
    """Every GPU of the machine, whatever CUDA_VISIBLE_DEVICES says; empty without a driver."""
    try:
        nvml = load(_LIBRARY)
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        return [gpu for index in range(count.value) if (gpu := _read(nvml, index)) is not None]
    finally:
        nvml.nvmlShutdown()


def _read(nvml: Any, index: int) -> Gpu | None:
    device = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
        return None
    used = ctypes.c_ulonglong()
    counts = nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(used)) == 0
    return Gpu(
        _text(nvml.nvmlDeviceGetUUID, device), _text(nvml.nvmlDeviceGetName, device), used.value if counts else None
    )


def _text(ask: Any, device: ctypes.c_void_p) -> str:
    buffer = ctypes.create_string_buffer(_TEXT_BYTES)
    return buffer.value.decode("utf-8", "replace") if ask(device, buffer, _TEXT_BYTES) == 0 else ""
