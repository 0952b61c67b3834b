"""DeepSpeed's compiled parts, which are built where they are first used."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

_OF_CPU = "deepspeed_shm_comm"
_THEIRS = "lock"
"""Torch's builder makes this file, and waits for ever where it is: who was killed while building has left it there."""
_OURS = ".posttrain-lock"


def build_for_cpu() -> None:
    """What DeepSpeed exchanges tensors with on CPUs; afterwards this process has it. One process after the other, and
    none waits for one that is dead."""
    from deepspeed.comm.torch import build_shm_op
    from torch.utils.cpp_extension import _get_build_directory

    build_alone(Path(_get_build_directory(_OF_CPU, verbose=False)), build_shm_op)


def build_alone(folder: Path, build: Callable[[], Any]) -> None:
    """`build` in the folder of its results, under a lock that ends with its holder."""
    with open(folder / _OURS, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / _THEIRS).unlink(missing_ok=True)
        build()
