"""Which commits of a Hub repository the local cache has, and which one a branch was when it was last seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

MAIN = "main"

_notes: ContextVar[list[str] | None] = ContextVar("notes on the Hub", default=None)


@contextmanager
def noted() -> Iterator[list[str]]:
    """What is to be told of how the names of the Hub were understood inside."""
    notes: list[str] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def note(text: str) -> None:
    """Tell whoever listens, once."""
    notes = _notes.get()
    if notes is not None and text not in notes:
        notes.append(text)


def cached_commit(name: str, kind: str) -> str | None:
    """The commit in the cache that the main branch was when something was last fetched by its name."""
    found = (revision for revision in _revisions(name, kind) if MAIN in revision.refs)
    return next((str(revision.commit_hash) for revision in found), None)


def cached_commits(name: str, kind: str) -> list[str]:
    """All that the cache has of the repository."""
    return sorted(str(revision.commit_hash) for revision in _revisions(name, kind))


def remember(name: str, kind: str, commit: str, branch: str = MAIN) -> None:
    """Note in the cache that the branch is that commit, as the client does where it is asked for a branch: we ask for
    commits. Nothing is noted of a commit that the cache does not have; one that cannot be written is not needed."""
    folder = _folder(name, kind)
    if not (folder / "snapshots" / commit).is_dir():
        return
    with suppress(OSError):
        path = folder / "refs" / branch
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit, encoding="utf-8")


def _folder(name: str, kind: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"


def _revisions(name: str, kind: str) -> list[Any]:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    return [revision for one in found if one.repo_id == name and one.repo_type == kind for revision in one.revisions]
