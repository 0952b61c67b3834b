"""System calls that Python has no function for, and what this kernel offers for a sandbox."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stages.rollouts.sandbox.syscalls import NUMBERS

LANDLOCK_CREATE_RULESET = 444
LANDLOCK_RULESET_VERSION = 1
SECCOMP = {"x86_64": 317, "aarch64": 277}
SECCOMP_GET_ACTION_AVAIL = 2
SECCOMP_RET_KILL_PROCESS = 0x80000000

PIDFD_OPEN = 434
MEMFD_CREATE = {"x86_64": 319, "aarch64": 279}
MFD_CLOEXEC, MFD_ALLOW_SEALING = 1, 2
ADD_SEALS, ALL_SEALS = 1033, 0b1111


class SandboxError(Exception):
    """The sandbox cannot do its work: never a verdict on a program."""


@dataclass(frozen=True)
class Offer:
    """What the kernel has of what a sandbox needs."""

    system: str
    """`sys.platform`"""
    machine: str
    """As `uname -m` says it."""
    landlock_abi: int
    """0: none."""
    seccomp: bool

    def missing(self) -> list[str]:
        """What is needed and not there, each with a remedy. Empty: programs can be confined."""
        if self.system != "linux":
            return [f"Linux (this is {self.system}); score code on a Linux machine"]
        lacks = []
        if self.landlock_abi < 1:
            lacks.append(
                "Landlock, which confines files (Linux 5.13 or newer, with landlock in the kernel's list of security "
                "modules: boot with lsm=landlock,...; in a container its seccomp profile must allow landlock_*)"
            )
        if self.machine not in NUMBERS:
            lacks.append(f"a seccomp filter for {self.machine} (there are {', '.join(NUMBERS)})")
        elif not self.seccomp:
            lacks.append("seccomp filters, which confine system calls (a kernel with CONFIG_SECCOMP_FILTER)")
        return lacks


def probe() -> Offer:
    """Ask the kernel. Changes nothing."""
    machine = platform.machine()
    linux = sys.platform == "linux"
    return Offer(sys.platform, machine, _landlock_abi() if linux else 0, linux and _has_seccomp(machine))


def _landlock_abi() -> int:
    try:
        return system_call(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_RULESET_VERSION)
    except OSError:
        return 0


def _has_seccomp(machine: str) -> bool:
    if machine not in SECCOMP:
        return False
    try:
        action = ctypes.byref(ctypes.c_uint32(SECCOMP_RET_KILL_PROCESS))
        return system_call(SECCOMP[machine], SECCOMP_GET_ACTION_AVAIL, 0, action) == 0
    except OSError:
        return False


def system_call(number: int, *arguments: Any) -> int:
    """The result of a system call. Raises OSError."""
    return checked("syscall", number, *arguments)


def process_file(pid: int) -> int:
    """Can be read once the process has ended. Not every Python has `os.pidfd_open`. Raises OSError."""
    return system_call(PIDFD_OPEN, pid, 0)


def sealed_file(data: bytes) -> int:
    """A file in memory that nobody can change. Not every Python has `os.memfd_create`. Raises OSError."""
    number = MEMFD_CREATE.get(platform.machine(), MEMFD_CREATE["aarch64"])
    descriptor = system_call(number, b"job", MFD_CLOEXEC | MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, ADD_SEALS, ALL_SEALS)
    return descriptor


def checked(name: str, *arguments: Any) -> int:
    """The result of a function of the C library that returns -1 and sets errno when it fails. Raises OSError."""
    function: Callable[..., int] = getattr(ctypes.CDLL(None, use_errno=True), name)
    result = function(*(ctypes.c_long(value) if isinstance(value, int) else value for value in arguments))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}({', '.join(map(str, arguments))}): {os.strerror(number)}")
    return result
