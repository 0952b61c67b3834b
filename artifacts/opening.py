"""Opening a store by its URL."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from urllib.parse import unquote

from artifacts.errors import RequestError, StoreError
from artifacts.files import Files
from artifacts.local import LocalFiles
from artifacts.retry import Patience
from artifacts.sealed import scrub
from artifacts.store import Store

ANSWER_SECONDS = 12.0
"""A store that has not listed its root by then does not answer."""

PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def default_cache() -> Path:
    """$POSTTRAIN_CACHE or ~/.cache/posttrain."""
    named = os.environ.get("POSTTRAIN_CACHE")
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "posttrain"


def default_store() -> str:
    """The folder that is the store where nothing else is said."""
    return str(default_cache() / "store")


def open_store(url: str | None = None, *, answer_seconds: float = ANSWER_SECONDS) -> Store:
    """The store at a local path, `file://`, `s3://bucket/prefix` or, of this process alone, `memory://`; None:
    $POSTTRAIN_STORE or ~/.cache/posttrain/store. Raises RequestError for another URL, StoreError within
    `answer_seconds` if the store does not answer."""
    if url is None:
        url = os.environ.get("POSTTRAIN_STORE") or default_store()
    return Store(_in_time(url, answer_seconds), default_cache())


def require_shared(store: Store) -> None:
    """Raises RequestError for a store that other processes do not see: every stage is a process of its own."""
    if PROTOCOL.match(store.url) and store.url.lower().startswith("memory:"):
        raise RequestError(
            f"{store.url} is in the memory of one process, and stages run in processes of their own, which would not "
            "find there what others stored: give a folder or s3://bucket/folder (memory:// serves Python programs "
            "that open a store and run no stages)"
        )


def _in_time(url: str, seconds: float) -> Files:
    """Opens in a thread: a dead network mount or a server that says nothing would hold this one for ever."""
    result: list[Files] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(_opened(url, seconds))
        except BaseException as error:
            failure.append(error)

    if _protocol(url) == "s3":
        from artifacts.s3 import library

        library()  # before the clock runs: no server is waited for
    thread = threading.Thread(target=work, name="open store", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not result:
        raise StoreError(
            f"cannot open store {scrub(url)}: no answer within {seconds:g} s; check the network, the mount "
            "and AWS_ENDPOINT_URL, or choose another store with --store"
        )
    return result[0]


def _opened(url: str, seconds: float) -> Files:
    protocol = _protocol(url)
    if protocol == "file":
        return LocalFiles(_local_path(url))
    if "@" in url or "?" in url or "#" in url:
        raise RequestError(
            f"the store's URL ({protocol}://...) may hold no credentials and no options: they come from "
            "the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL)"
        )
    if protocol == "memory":
        from artifacts.memory import memory_files

        return memory_files(url)
    if protocol == "s3":
        from artifacts.s3 import S3Files

        files = S3Files(url)
        files.probe(Patience(deadline=seconds / 2))
        return files
    raise RequestError(
        "a store is a local path, file:// or s3://bucket/folder, of Amazon or of any server that speaks S3 (its "
        f"address in AWS_ENDPOINT_URL); found {scrub(url)!r}"
    )


def _protocol(url: str) -> str:
    match = PROTOCOL.match(url)
    return match.group(1).lower() if match else "file"


def _local_path(url: str) -> Path:
    path = unquote(url[len("file://") :]) if url.lower().startswith("file://") else url
    if not path:
        raise RequestError("the store's path is empty")
    return Path(path).expanduser().absolute()
