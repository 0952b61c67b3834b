"""What one run of a stage uses: processors, GPUs, energy, memory. For the ledger; no artifact holds it."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from stages.nvml import Gpu, gpus

_KILOBYTES = 1 if sys.platform == "darwin" else 1024
"""Bytes in the unit of `ru_maxrss`."""


class Meter:
    """Measures from its making to `read`. `processes`: so many run the stage together, this one among them."""

    def __init__(self, processes: int = 1, read_gpus: Callable[[], list[Gpu]] = gpus) -> None:
        self._processes = processes
        self._read_gpus = read_gpus
        self._started = time.monotonic()
        # several processes were started for this alone, one may have had a life before
        self._cpu_seconds = cpu_seconds() if processes == 1 else 0.0
        self._millijoules = {gpu.uuid: gpu.millijoules for gpu in read_gpus()}

    def read(self) -> dict[str, float]:
        """`seconds` by the clock, `cpu_seconds` of all processes, `peak_memory_gb` of this one (resident), and where
        GPUs were used `gpu_seconds` (of each, summed) and, where they count it, `energy_joules`."""
        seconds = time.monotonic() - self._started
        used = cpu_seconds() if self._processes == 1 else launched_cpu_seconds()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KILOBYTES / 1e9
        found = {"seconds": seconds, "cpu_seconds": used - self._cpu_seconds, "peak_memory_gb": peak}
        devices = used_gpus(self._processes)
        if devices:
            found["gpu_seconds"] = seconds * len(devices)
            joules = self._joules(devices)
            if joules is not None:
                found["energy_joules"] = joules
        return found

    def _joules(self, devices: list[str]) -> float | None:
        """What these GPUs used meanwhile, whoever else worked on them; None: one does not count."""
        after = {gpu.uuid: gpu.millijoules for gpu in self._read_gpus()}
        total = 0
        for uuid in devices:
            before, now = self._millijoules.get(uuid), after.get(uuid)
            if before is None or now is None:
                return None
            total += now - before
        return total / 1000


def cpu_seconds() -> float:
    """User and system time of this process and all that it started, ended or not."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    return total + sum(_tree_seconds(psutil.Process()))


def launched_cpu_seconds() -> float:
    """The same of all processes that the launcher above this one started."""
    launcher = psutil.Process(os.getppid())
    times = launcher.cpu_times()
    return float(times.children_user + times.children_system + sum(_tree_seconds(launcher)))


def _tree_seconds(process: psutil.Process) -> Iterator[float]:
    """Of everything alive below a process; what has ended below it counts with its parent."""
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            yield times.user + times.system + times.children_user + times.children_system


def used_gpus(processes: int) -> list[str]:
    """Uuids of the GPUs that the stage computed on: one a process. Empty where torch was not loaded or used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return []
    first = torch.cuda.current_device() if processes == 1 else 0
    count = min(processes, torch.cuda.device_count())
    return [f"GPU-{torch.cuda.get_device_properties(first + index).uuid}" for index in range(count)]


def machine_facts() -> dict[str, Any]:
    """What of this machine can show in the last bits of a result; no name and no address."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": cores,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [gpu.name for gpu in gpus()],
    }


def _processor() -> str:
    """`AMD EPYC 7B13`, as the kernel names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
