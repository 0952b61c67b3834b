"""Things outside the recipe that a configuration names: data files, Hub repositories, user code."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from artifacts.digest import sha256_bytes, sha256_file
from artifacts.errors import DataError, PosttrainError, RequestError, StageError
from stages.data.files import Located, SourceFile, files_below, locate
from stages.hub import hub_revision
from stages.names import nearest
from stages.raised import raised

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
    if _module_file(source) is None:
        raise RequestError(f"no module named {source!r}; write file.py:name or an importable package.module:name")
    return text


def _require_function(path: Path, name: str) -> None:
    """Checked on the syntax tree, so that planning runs no code of the user."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        raise RequestError(f"{path}:{error.lineno}: not valid Python: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:  # no text, or nested without end
        raise RequestError(f"{path}: not valid Python: {error}") from error
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    defined = [node.name for node in tree.body if isinstance(node, kinds)]
    if name not in defined:
        raise RequestError(
            f"{path} defines no function {name!r}{nearest(name, defined)}; it has: {', '.join(defined) or 'none'}"
        )


def load_code(reference: str) -> Callable[..., Any]:
    """The function that `file.py:name` or `package.module:name` names."""
    source, name = reference.rsplit(":", 1)
    if source.endswith(".py"):
        path = Path(source).resolve()
        spec = importlib.util.spec_from_file_location(_module_name(source), path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))  # so that the file can import its neighbours
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
    else:
        module = importlib.import_module(source)
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
    return f"posttrain_user_{Path(source).stem}" if source.endswith(".py") else source


def code_identity(reference: str) -> Any:
    """The source of the named function's file and of the neighbours it imports; a built-in name stays a name."""
    if ":" not in reference:
        return reference
    source, name = reference.rsplit(":", 1)
    path = Path(source) if source.endswith(".py") else _module_file(source)
    if path is None:
        raise RequestError(f"no module named {source!r}")
    digest = hashlib.sha256()
    for file in _with_neighbours(path):
        digest.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return {"function": name, "sha256": digest.hexdigest()}


def _module_file(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _with_neighbours(path: Path) -> list[Path]:
    """The file and the modules beside it that it imports, directly or not, in the order of their names."""
    found: dict[str, Path] = {}
    pending = [path]
    while pending:
        file = pending.pop()
        if file.name in found or not file.is_file():
            continue
        found[file.name] = file
        pending.extend(file.parent / f"{name}.py" for name in _imported_names(file))
    return [found[name] for name in sorted(found)]


def _imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


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
