"""What a contestant's process notes of its steps: seconds, values for the parity gate, working memory."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds by name: as they pass, or as all threads of the process work."""

SAMPLING_SECONDS = 0.005
KIB = 1024


class Peak(Protocol):
    """Measures from its construction on."""

    method: str

    def stop(self) -> int:
        """Most bytes held at once since, minus the bytes held then."""
        ...


class ResidentPeak:
    """The kernel's own high-water mark of resident memory, set back to the present on construction."""

    method = "peak resident memory, the kernel's mark"

    def __init__(self) -> None:
        """Raises OSError where the kernel does not let the mark be set back."""
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        self.before = _status("VmRSS")
        if _status("VmHWM") > self.before + 16 * KIB * KIB:
            raise OSError("the mark of resident memory stayed where it was")

    def stop(self) -> int:
        """Bytes."""
        return _status("VmHWM") - self.before


class SampledPeak:
    """Looks at the resident memory from a thread, where the kernel's mark cannot be set back."""

    method = f"peak resident memory, looked at every {SAMPLING_SECONDS * 1000:.0f} ms"

    def __init__(self) -> None:
        self.before = self.peak = _status("VmRSS")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLING_SECONDS):
            self.peak = max(self.peak, _status("VmRSS"))

    def stop(self) -> int:
        """Bytes."""
        self._ended.set()
        self._thread.join()
        return max(self.peak, _status("VmRSS")) - self.before


class AllocatedPeak:
    """The CUDA allocator's count."""

    method = "peak allocated on the GPU"

    def __init__(self) -> None:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def stop(self) -> int:
        """Bytes."""
        import torch

        return int(torch.cuda.max_memory_allocated() - self.before)


def start_peak() -> Peak:
    """The best way to measure that this machine has."""
    import torch

    if torch.cuda.is_available():
        return AllocatedPeak()
    gc.collect()
    # what loading left free inside the process goes back, or steps would fill it unseen
    ctypes.CDLL(None).malloc_trim(0)
    try:
        return ResidentPeak()
    except OSError:
        return SampledPeak()


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * KIB
    raise OSError(f"/proc/self/status has no {field}")


def stolen_seconds() -> float:
    """What the host has kept from this machine's processors since it started; 0 where it does not say."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


class Recorder:
    """A contestant calls `begin` just before its first step and `done` after each."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds: list[float] = []
        self.values: list[Mapping[str, Any]] = []
        self.peak: Peak | None = None
        self._last = 0.0
        self._began = self._stolen = 0.0

    def begin(self) -> None:
        """Memory and time count from here."""
        self.peak = start_peak()
        self._began, self._stolen = time.monotonic(), stolen_seconds()
        self._last = self.clock()

    def done(self, values: Mapping[str, Any]) -> None:
        """A step is over; tensors among its values are read after the last step."""
        _synchronize()
        self.seconds.append(self.clock() - self._last)
        self.values.append(values)
        self._last = self.clock()

    def result(self) -> dict[str, Any]:
        """As JSON values."""
        assert self.peak is not None, "no step was begun"
        processor_seconds = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        return {
            "stolen": (stolen_seconds() - self._stolen) / processor_seconds,
            "seconds": self.seconds,
            "working_memory": self.peak.stop(),
            "memory_method": self.peak.method,
            "values": [{name: _plain(value) for name, value in values.items()} for values in self.values],
            "load": os.getloadavg()[0],
        }


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _plain(value: Any) -> list[float]:
    """One number or many, as a list."""
    return [float(one) for one in value] if isinstance(value, list | tuple) else [float(value)]
