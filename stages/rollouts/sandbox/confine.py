"""Giving up, for ever, what a program must not have: the layers of the sandbox, in the order they need."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from stages.rollouts.sandbox import landlock, limits, seccomp
from stages.rollouts.sandbox.kernel import Offer, checked
from stages.rollouts.sandbox.syscalls import NUMBERS

LIBRARY = (Path(os.__file__).parent, Path("/usr/share/zoneinfo"))
"""What programs may read: Python's own modules, and the time zones that they ask for."""
DEVICES_READ = (Path("/dev/urandom"), Path("/dev/random"), Path("/dev/zero"))
DEVICES_USED = (Path("/dev/null"),)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 4, 24, 36
CAPABILITY_VERSION = 0x20080522
LAST_CAPABILITY = 63


@dataclass(frozen=True)
class Layers:
    """Which layers there are on this machine; all but the namespaces, or the sandbox was told `unsafe`."""

    landlock_abi: int
    seccomp: str | None
    """The machine whose system calls are filtered."""

    @classmethod
    def of(cls, offer: Offer) -> Layers:
        """Every layer that the kernel offers."""
        return cls(offer.landlock_abi, offer.machine if offer.seccomp and offer.machine in NUMBERS else None)


def confine_server(layers: Layers, folder: Path) -> None:
    """The fork server: no capabilities, its library, its folder, and /proc where programs may leave others running."""
    drop_capabilities()
    checked("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    checked("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    landlock.no_new_privileges()
    if layers.landlock_abi:
        read = (*LIBRARY, *DEVICES_READ, *([] if layers.seccomp else [Path("/proc")]))
        landlock.restrict(layers.landlock_abi, read=read, use=(folder, *DEVICES_USED))


def confine_program(layers: Layers, folder: Path, bounds: limits.Limits, *, count_threads: bool) -> None:
    """The process of one program, started by the fork server. It ends with it."""
    end_with_parent()
    checked("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    limits.apply(bounds, count_threads=count_threads)
    landlock.no_new_privileges()
    if layers.landlock_abi:
        use = (folder, *DEVICES_USED)
        landlock.restrict(layers.landlock_abi, read=(*LIBRARY, *DEVICES_READ), use=use)
    if layers.seccomp:
        seccomp.install(layers.seccomp, os.getpid())


def end_with_parent() -> None:
    """This process is killed when the one that started it ends."""
    checked("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def drop_capabilities() -> None:
    """None left, and none to be had again."""
    with contextlib.suppress(OSError):  # one that does not exist, or that it had not to begin with
        for capability in range(LAST_CAPABILITY + 1):
            checked("prctl", PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = ctypes.create_string_buffer(CAPABILITY_VERSION.to_bytes(4, "little") + bytes(4))
    checked("capset", header, ctypes.create_string_buffer(24))
