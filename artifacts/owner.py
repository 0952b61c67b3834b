"""Who writes: a process, named so that another one can tell whether it is still alive."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

PROC = Path("/proc")


@functools.cache
def machine() -> str:
    """Names this boot of this machine and this process namespace: process ids mean something only inside.
    Where the system does not say, the host's name stands for it."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip().replace("-", "")
        namespace = os.readlink(PROC / "self/ns/pid").strip("pid:[]")
    except OSError:
        return "host" + "".join(letter for letter in platform.node() if letter.isalnum())
    return f"{boot}.{namespace}"


def start_time(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; tells it from a later one of the same id. None: no such
    process, or a zombie, which writes nothing any more."""
    try:
        status = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = status.rsplit(")", 1)[1].split()
    return None if fields[0] in ("Z", "X") else fields[19]


def owner_tag() -> str:
    """`<machine>-<pid>-<start time>` of this process; not cached, because a fork changes it."""
    pid = os.getpid()
    return f"{machine()}-{pid}-{start_time(pid) if PROC.is_dir() else ''}"


def is_dead(tag: str) -> bool:
    """True only for an owner that certainly is no more: a process of this boot of this machine that is gone,
    or one of an earlier boot of it. Owners elsewhere may be alive."""
    parts = tag.split("-")
    if len(parts) < 3 or parts[0] != machine() or not parts[1].isdigit() or not (PROC / "self/stat").exists():
        return False
    return start_time(int(parts[1])) != parts[2]


def lives_here(tag: str) -> bool:
    """True only for a process of this boot of this machine that certainly lives."""
    parts = tag.split("-")
    if len(parts) < 3 or parts[0] != machine() or not parts[1].isdigit() or not (PROC / "self/stat").exists():
        return False
    return start_time(int(parts[1])) == parts[2]
