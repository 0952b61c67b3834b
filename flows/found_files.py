"""Files and folders found by content: manifests name them by digest, for paths are of one machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from artifacts.errors import PosttrainError, RequestError
from flows.changes import is_external
from flows.fields import slots_at
from flows.found_remote import Fetched, shown
from stages.external import code_identity, content_of, folder_digest
from stages.stage import Config, External

_PASSED_OVER = ("node_modules", "site-packages", "__pycache__")


def with_references(
    model: type[Config], config: Mapping[str, Any], hints: Mapping[str, Any], folders: Sequence[Path], fetched: Fetched
) -> dict[str, Any]:
    """The configuration of a manifest with a path in the place of every content that it names.

    `hints`: the configuration as some machine had it, whose paths are tried first; `folders` and then `fetched`: where
    to search. What is taken has the digest that the manifest names. Raises RequestError with everything that was not
    found.
    """
    missing: list[str] = []

    def restore(value: Any, hint: Any, place: tuple[str | int, ...]) -> Any:
        if is_external(value) and (kind := _mark(model, place)) is not None:
            try:
                return _found(kind, value, hint, folders, fetched)
            except RequestError as error:
                missing.append(f"with.{'.'.join(map(str, place))}: {error}")
                return ""
        if isinstance(value, Mapping):
            inner = hint if isinstance(hint, Mapping) else {}
            return {key: restore(entry, inner.get(key), (*place, key)) for key, entry in value.items()}
        if isinstance(value, list):
            several = hint if isinstance(hint, list) and len(hint) == len(value) else [None] * len(value)
            return [restore(entry, several[index], (*place, index)) for index, entry in enumerate(value)]
        return value

    restored = restore(config, hints, ())
    if missing:
        raise RequestError("; ".join(missing))
    return dict(restored)


def find_folder(digest: str, hint: str | None, folders: Sequence[Path], fetched: Fetched) -> Path:
    """A folder of that digest (`folder_digest`). Raises RequestError."""

    def search() -> Iterator[Path]:
        yield from _candidates(hint, folders, lambda folder, names: [folder])
        yield from _candidates(None, fetched.folders(), lambda folder, names: [folder])

    for path in search():
        if path.is_dir() and _same(folder_digest, path, digest):
            return path
    raise RequestError(
        f"no folder with the content {digest[:12]} under {_named(folders, fetched)}; name where it lies by --files"
    )


def _mark(model: type[Config], place: tuple[str | int, ...]) -> str | None:
    """Within arguments of the user's code, of any depth, that of the argument."""
    while place and not (found := slots_at(model, place)):
        place = place[:-1]
    marks = [mark for slot in found for mark in slot.metadata if isinstance(mark, External)] if place else []
    return marks[0].kind if marks else None


def _found(kind: str, wanted: Mapping[str, Any], hint: Any, folders: Sequence[Path], fetched: Fetched) -> str:
    if "hub" in wanted:
        return f"hub:{wanted['hub']}"
    if kind == "code":
        return _code(wanted, hint, folders, fetched)
    suffix = wanted.get("suffix")
    hinted = hint if isinstance(hint, str) else None
    remote = [hinted] if hinted is not None and "://" in hinted else []

    def files(folder: str, names: list[str]) -> list[str]:
        """One file has a suffix; what has none was a folder or several files."""
        return [folder] if suffix is None else [os.path.join(folder, name) for name in names if name.endswith(suffix)]

    def search() -> Iterator[str]:
        yield from remote
        yield from map(os.path.abspath, _candidates(None if remote else hinted, folders, files))
        if kind == "data":
            yield from fetched.places(suffix)
        else:  # the user's code opens it
            yield from map(os.path.abspath, _candidates(None, fetched.folders(suffix or ""), files))

    for place in search():
        if _same(partial(content_of, kind), place, dict(wanted)):
            return place
    raise RequestError(
        f"no data with SHA-256 {wanted['sha256'][:12]}{f' ({suffix})' if suffix else ''} under "
        f"{_named(folders, fetched)}; name where it lies by --files"
    )


def _code(wanted: Mapping[str, Any], hint: Any, folders: Sequence[Path], fetched: Fetched) -> str:
    function = str(wanted["function"])
    if isinstance(hint, str) and _same(code_identity, hint, dict(wanted)):
        return hint

    def modules(folder: str, names: list[str]) -> list[str]:
        return [os.path.join(folder, name) for name in names if name.endswith(".py")]

    def search() -> Iterator[Path]:
        yield from _candidates(None, folders, modules)
        yield from _candidates(None, fetched.folders(".py"), modules)

    for path in search():
        if path.is_file() and f"def {function}(" in path.read_text(encoding="utf-8", errors="replace"):
            reference = f"{path}:{function}"
            if _same(code_identity, reference, dict(wanted)):
                return reference
    raise RequestError(
        f"no code of a function {function} with SHA-256 {wanted['sha256'][:12]} under {_named(folders, fetched)}; the "
        "file and those beside it that it imports must be as they were: name where they lie by --files"
    )


def _candidates(
    hint: str | None, folders: Iterable[Path], choose: Callable[[str, list[str]], list[str]]
) -> Iterator[Path]:
    if hint:
        yield Path(hint)
    for top in folders:
        if top.is_file():
            yield top
            continue
        for folder, inner, names in os.walk(top):
            inner[:] = sorted(name for name in inner if not name.startswith(".") and name not in _PASSED_OVER)
            yield from (Path(path) for path in choose(folder, sorted(names)))


def _same(read: Callable[[Any], Any], what: Any, wanted: Any) -> bool:
    """What cannot be read, or is no such thing, is another one."""
    try:
        return bool(read(what) == wanted)
    except (PosttrainError, OSError, ValueError, SyntaxError):
        return False


def _named(folders: Sequence[Path], fetched: Fetched) -> str:
    return ", ".join([*map(str, folders), *map(shown, fetched.urls)]) or "any folder"
