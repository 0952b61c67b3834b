"""Which files of a folder are opened, listed or changed by this process, told by Python's audit events."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FOLLOWING = {"os.listdir": 1, "os.scandir": 1, "os.truncate": 1, "os.chmod": 1, "os.utime": 1, "os.chown": 1}
_ITSELF = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2}
"""Event -> how many of its arguments are paths; those of `_ITSELF` mean a link where there is one."""
_watched: dict[str, list[str]] = {}
_installed: list[bool] = []


@contextlib.contextmanager
def touches(folder: Path) -> Iterator[list[str]]:
    """Events that reached below `folder`, also through links and from above it."""
    if not _installed:
        sys.addaudithook(_hear)  # cannot be taken away again
        _installed.append(True)
    _watched[str(folder.resolve())] = found = []
    try:
        yield found
    finally:
        _watched.clear()


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event == "open":
        path, _, flags = arguments
        _enter(event, _reached(path, follows=not (isinstance(flags, int) and flags & os.O_NOFOLLOW)))
    elif event in _FOLLOWING or event in _ITSELF:
        count = _FOLLOWING.get(event) or _ITSELF[event]
        for argument in arguments[:count]:
            _enter(event, _reached(argument, follows=event in _FOLLOWING))


def _reached(argument: Any, follows: bool) -> str:
    if isinstance(argument, int):
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{argument}")
        return ""
    if argument is None:
        return os.getcwd()
    path = os.path.abspath(os.fsdecode(argument))
    if follows:
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _enter(event: str, path: str) -> None:
    for folder, found in _watched.items():
        if path == folder or path.startswith(f"{folder}/"):
            found.append(f"{event} {path}")
