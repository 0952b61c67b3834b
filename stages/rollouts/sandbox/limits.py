"""What a program in the sandbox may use, and the kernel's limits that hold it to that."""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass

MEGABYTE = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds of one program."""

    cpu_seconds: float = 5.0
    """Processor time; rounded up to whole seconds, which is what the kernel counts in."""
    wall_seconds: float = 20.0
    """Time on the clock: for programs that wait. Much more than `cpu_seconds`, or verdicts depend on the load."""
    memory_mb: int = 512
    """Address space."""
    output_bytes: int = 2**20
    """What it may print or return in all."""
    folder_mb: int = 16
    """All files in its folder together, and each."""
    folder_files: int = 512
    """Files and folders in its folder."""
    open_files: int = 64
    threads: int = 64
    """Of an ordinary user where namespaces can be had; otherwise `memory_mb` bounds the number of threads."""


def apply(limits: Limits, *, count_threads: bool) -> None:
    """Hold this process to the limits; it cannot raise them again. Raises OSError or ValueError."""
    bounds = {
        resource.RLIMIT_CPU: math.ceil(limits.cpu_seconds),
        resource.RLIMIT_AS: limits.memory_mb * MEGABYTE,
        resource.RLIMIT_FSIZE: limits.folder_mb * MEGABYTE,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_STACK: 8 * MEGABYTE,
    }
    if count_threads:
        bounds[resource.RLIMIT_NPROC] = limits.threads
    for kind, bound in bounds.items():
        _, hard = resource.getrlimit(kind)
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, bound))
