"""The memory that there is: the machine's, as far as its control group lets us, and its GPUs'."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from stages.training.memory_training import Setup

GB = 10**9
_MIB = 2**20
_UNLIMITED = 2**60
"""What version 1 of control groups writes for no limit is a number above this."""
_SECONDS = 10


@dataclass(frozen=True)
class Machine:
    """Bytes of the whole machine, and of one GPU where there is one."""

    ram_bytes: int
    gpu_bytes: int | None = None

    @classmethod
    def here(cls, gpu_gb: float | None = None) -> Machine:
        """This machine; `gpu_gb`: the memory of one GPU, of this or another machine, instead of what is found."""
        gpu_bytes = smallest_gpu() if gpu_gb is None else int(gpu_gb * GB)
        return cls(available_ram(), gpu_bytes)

    def for_each(self, setup: Setup) -> int:
        """What one process may have: a GPU of its own, or a share of the machine."""
        if setup.device == "cuda" and self.gpu_bytes is not None:
            return self.gpu_bytes
        return self.ram_bytes // setup.processes


def available_ram(root: Path = Path("/")) -> int:
    """Physical memory, or the least limit of the control groups that this process is in."""
    return min([int(psutil.virtual_memory().total), *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            yield from _upwards(groups, group, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _upwards(groups / "memory", group, "memory.limit_in_bytes")


def _upwards(top: Path, group: str, name: str) -> Iterator[int]:
    """The limits of a group and of all it lies in; a container may see its own group as the root."""
    parts = Path(group.lstrip("/")).parts
    for count in range(len(parts), -1, -1):
        try:
            text = top.joinpath(*parts[:count], name).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < _UNLIMITED:
            yield int(text)


def smallest_gpu() -> int | None:
    """Bytes of the GPU that has least; None: there is none, or nothing tells."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    sizes = [int(line) for line in done.stdout.split() if line.isdigit()]
    return min(sizes) * _MIB if done.returncode == 0 and sizes else None
