"""A store's files in the memory of this process, for tests and trials."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

from artifacts.remote import RemoteFiles

CALLS = ("ls", "find", "info", "cat_file", "pipe_file", "cp_file", "modified", "makedirs", "rm", "rm_file")
_one_thread = threading.RLock()
"""All file systems in memory share one dictionary, which fsspec goes through while other threads add to it."""


def memory_files(url: str) -> RemoteFiles:
    """Files in memory, the same ones for everybody in this process who gives this URL."""
    base = "/" + url.removeprefix("memory://").strip("/")
    return RemoteFiles(url, base, locked_memory)


def locked_memory() -> Any:
    """fsspec's files in memory, one call at a time whatever the thread."""
    from fsspec.implementations.memory import MemoryFileSystem

    fs = MemoryFileSystem(skip_instance_cache=True)
    for name in CALLS:
        setattr(fs, name, _alone(getattr(fs, name)))
    return fs


def _alone(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with _one_thread:
            return call(*args, **kwargs)

    return locked
