"""A store's files in the memory of this process, for tests and trials."""

from __future__ import annotations

from artifacts.remote import RemoteFiles


def memory_files(url: str) -> RemoteFiles:
    """Files in memory, the same ones for everybody in this process who gives this URL."""
    from fsspec.implementations.memory import MemoryFileSystem

    base = "/" + url.removeprefix("memory://").strip("/")
    return RemoteFiles(url, base, lambda: MemoryFileSystem(skip_instance_cache=True))
