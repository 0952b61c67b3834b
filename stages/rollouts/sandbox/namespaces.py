"""Namespaces: an outer layer where the kernel lets this user have one (most containers do not).

A process number space of its own, whose first process takes all others with it when it ends; no network interface but a
loopback that is down; no shared memory or queues; a file system in memory, with a bound, for the folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from stages.rollouts.sandbox.kernel import checked

USER, MOUNT, CGROUP, UTS, IPC, PID, NETWORK = (
    *(0x10000000, 0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x20000000, 0x40000000),
)
ALL = MOUNT | CGROUP | UTS | IPC | PID | NETWORK
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000


def enter() -> None:
    """Put this process into namespaces of its own, and its next child into a process number space. Raises OSError.

    The user keeps its number: what it owns outside is what it owns inside.
    """
    user, group = os.getuid(), os.getgid()
    checked("unshare", USER | ALL)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path("/proc/self", name).write_text(text, encoding="ascii")


def bounded_folder(folder: Path, size: int, files: int) -> None:
    """Lay a file system in memory over a folder, seen by these namespaces only. Bytes, entries. Raises OSError."""
    checked("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    options = f"size={size},nr_inodes={files},mode=0700".encode()
    checked("mount", b"none", os.fsencode(folder), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
