"""Things outside the recipe that a configuration names: data files, Hub repositories, user code."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from artifacts.digest import sha256_bytes, sha256_file
from artifacts.errors import DataError, PosttrainError, RequestError, StageError
from stages.data.files import Located, SourceFile, files_below, locate
from stages.hub import hub_revision
from stages.names import nearest
from stages.raised import raised
from stages.user_code.loading import load_file, module_name
from stages.user_code.places import place_of
from stages.user_code.sources import parsed, sources

HUB = "hub:"
_CHUNK_BYTES = 1 << 20


def resolve_reference(kind: str, text: str, base: Path) -> str:
    """The reference with a relative path made absolute. Raises RequestError when it leads nowhere."""
    if kind == "code":
        return _resolve_code(text, base)
    if text.startswith(HUB) or "://" in text:
        return text
    path = Path(os.path.expanduser(text))
    path = path if path.is_absolute() else base / path
    _located(str(path))
    return str(path)


def _resolve_code(text: str, base: Path) -> str:
    if ":" not in text:
        return text
    source, name = text.rsplit(":", 1)
    if source.endswith(".py"):
        path = Path(os.path.expanduser(source))
        path = path if path.is_absolute() else base / path
        if not os.path.isfile(path):  # whatever its characters and length
            raise RequestError(f"no such Python file: {source!r} (looked for {path})")
        _require_function(path, name)
        return f"{path.resolve()}:{name}"
    if place_of(source) is None:
        raise RequestError(f"no module named {source!r}; write file.py:name or an importable package.module:name")
    return text


def _require_function(path: Path, name: str) -> None:
    """Checked on the syntax tree, so that planning runs no code of the user."""
    tree = parsed(path)
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    defined = [node.name for node in tree.body if isinstance(node, kinds)]
    if name not in defined:
        raise RequestError(
            f"{path} defines no function {name!r}{nearest(name, defined)}; it has: {', '.join(defined) or 'none'}"
        )


def load_code(reference: str) -> Callable[..., Any]:
    """The function that `file.py:name` or `package.module:name` names."""
    source, name = reference.rsplit(":", 1)
    module = load_file(Path(source).resolve()) if source.endswith(".py") else importlib.import_module(source)
    found = getattr(module, name, None)
    if not callable(found):
        raise RequestError(f"{source} has no function {name!r}{nearest(name, vars(module))}")
    return found  # type: ignore[no-any-return]


def load_named(what: str, reference: str) -> Callable[..., Any]:
    """`load_code` of a reward, a tool or the like. Raises StageError where its file cannot be run."""
    try:
        return load_code(reference)
    except PosttrainError:
        raise
    except Exception as error:  # the user's code may raise anything
        place = raised(error, _module_name(reference.rsplit(":", 1)[0]))
        raise StageError(f"cannot load {what} {reference}: {place}") from error


def _module_name(source: str) -> str:
    return module_name(Path(source).resolve()) if source.endswith(".py") else source


def code_identity(reference: str) -> Any:
    """The source of the named function's file and of what it imports from there, by paths from the folder that imports
    count from, so that it may lie anywhere; a built-in name stays a name."""
    if ":" not in reference:
        return reference
    source, name = reference.rsplit(":", 1)
    place = place_of(source)
    if place is None:
        raise RequestError(f"no module named {source!r}")
    lines = [f"{path}:{sha256}\n" for path, sha256 in sources(place).items()]
    return {"function": name, "sha256": sha256_bytes("".join(lines).encode())}


def data_identity(reference: str) -> dict[str, str]:
    """The content of a file, folder, glob or URL: names and SHA-256 of its files; never a place or a time."""
    if reference.startswith(HUB):
        name = reference.removeprefix(HUB)
        return {"hub": name, "revision": hub_revision(name, "dataset")}
    located = _located(reference)
    if located.saved is not None:
        return {"sha256": _saved_digest(located.saved)}
    if len(located.files) == 1:
        (file,) = located.files
        return {"sha256": _stream_digest(file), "suffix": file.suffix + (".gz" if file.packed else "")}
    return {"sha256": sha256_bytes("\n".join(f"{file.name}:{_stream_digest(file)}" for file in located.files).encode())}


def _located(reference: str) -> Located:
    try:
        return locate(reference, "auto")
    except DataError as error:
        raise RequestError(str(error)) from error


def _stream_digest(file: SourceFile) -> str:
    digest = hashlib.sha256()
    try:
        with file.filesystem.open(file.path, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except Exception as error:  # every file system has errors of its own
        raise RequestError(f"cannot read {file.shown}: {type(error).__name__}: {error}") from error
    return digest.hexdigest()


def _saved_digest(folder: SourceFile) -> str:
    """`folder_digest` of a folder on any file system."""
    try:
        files = files_below(folder)
    except Exception as error:  # every file system has errors of its own
        raise RequestError(f"cannot list {folder.shown}: {type(error).__name__}: {error}") from error
    return sha256_bytes("\n".join(f"{file.name}:{_stream_digest(file)}" for file in files).encode())


def folder_digest(path: Path) -> str:
    """SHA-256 over the relative names and digests of a folder's files."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        raise RequestError(f"no files in {path}")
    lines = [f"{file.relative_to(path).as_posix()}:{sha256_file(file)}" for file in files]
    return sha256_bytes("\n".join(lines).encode())
