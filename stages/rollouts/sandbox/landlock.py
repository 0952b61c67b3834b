"""Landlock: which files a process and its children can reach, for ever. https://docs.kernel.org/userspace-api/landlock.html"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

from stages.rollouts.sandbox.kernel import LANDLOCK_CREATE_RULESET, checked, system_call

LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446
RULE_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << bit for bit in range(6))
MAKE_DIR, MAKE_REG, MAKE_SYM = 1 << 7, 1 << 8, 1 << 12
REFER, TRUNCATE = 1 << 13, 1 << 14
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""Number of file rights since an ABI."""
NETWORK_SINCE, NETWORK_RIGHTS = 4, 0b11
"""bind and connect by TCP"""
SCOPES_SINCE, SCOPES = 6, 0b11
"""abstract Unix sockets and signals stay within the domain"""

READ = READ_FILE | READ_DIR
USE = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER | TRUNCATE
ON_FILES = READ_FILE | WRITE_FILE | TRUNCATE
"""Rights that mean something for what is no folder."""


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("rights", ctypes.c_uint64), ("folder", ctypes.c_int32))


def restrict(abi: int, *, read: Iterable[Path], use: Iterable[Path]) -> None:
    """From here on this thread, and what it starts, may read `read`, do everything within `use`, and nothing else.

    Nothing can be executed, and (where the ABI has it) no TCP port bound or connected to, no process outside signalled,
    no abstract socket outside reached. Paths that do not exist are left out. Needs no_new_privs. Raises OSError.
    """
    handled = (1 << max(number for since, number in FILE_RIGHTS.items() if since <= abi)) - 1
    ruleset = _Ruleset(handled, NETWORK_RIGHTS, SCOPES)
    size = 24 if abi >= SCOPES_SINCE else 16 if abi >= NETWORK_SINCE else 8
    descriptor = system_call(LANDLOCK_CREATE_RULESET, ctypes.byref(ruleset), size, 0)
    try:
        for rights, paths in ((READ, read), (USE, use)):
            for path in paths:
                _allow(descriptor, path, rights & handled)
        system_call(LANDLOCK_RESTRICT_SELF, descriptor, 0)
    finally:
        os.close(descriptor)


def no_new_privileges() -> None:
    """No program that this process or a child starts has more rights than it. Raises OSError."""
    checked("prctl", 38, 1, 0, 0, 0)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        rule = _PathBeneath(rights if path.is_dir() else rights & ON_FILES, opened)
        system_call(LANDLOCK_ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(opened)
