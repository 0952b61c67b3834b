"""Things outside the recipe that a configuration names: data files, Hub repositories, user code."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from artifacts.digest import sha256_bytes, sha256_file
from artifacts.errors import DataError, PosttrainError, RequestError, StageError
from stages.data.files import Located, SourceFile, files_below, locate
from stages.hub import hub_revision
from stages.names import nearest
from stages.raised import raised
from stages.user_code.loading import load_file, module_name
from stages.user_code.places import Place, place_of
from stages.user_code.sources import parsed, sources

HUB = "hub:"
_CHUNK_BYTES = 1 << 20


def resolve_reference(kind: str, text: str, base: Path) -> str:
    """The reference with a relative path made absolute. Raises RequestError when it leads nowhere."""
    if kind == "code":
        return _resolve_code(text, base)
    if kind == "argument":
        return _resolve_argument(text, base)
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


def _resolve_argument(text: str, base: Path) -> str:
    """The absolute path, where the text looks like one (it has a `/` or a `.`) and leads to a file or folder; any other
    text is what it is."""
    if not ("/" in text or "." in text.strip(".")):
        return text
    path = os.path.join(base, os.path.expanduser(text))
    return os.path.abspath(path) if is_argument_file(path) else text


def is_argument_file(path: str) -> bool:
    """Whether an argument is the absolute path of a file, or of a folder with some; `/`, which separates, is none."""
    if not os.path.isabs(path) or not path.strip("/"):
        return False
    return os.path.isfile(path) or (os.path.isdir(path) and any(files for _, _, files in os.walk(path)))


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


def content_of(kind: str, where: str) -> Any:
    """What an identity has for something outside. Raises RequestError where it cannot be read."""
    return _CONTENTS[kind](where)


def files_of(kind: str, where: str) -> list[SourceFile]:
    """The files that are its content; none for what has no files of its own. Raises RequestError."""
    if kind == "data":
        return [] if where.startswith(HUB) else _data_files(_located(where))
    if kind == "code":
        return [_local(path, path.name) for path in source_files(where)]
    if kind == "argument" and not is_argument_file(where):
        return []
    return [_local(path, name) for name, path in _files_in(Path(where))]


def code_identity(reference: str) -> Any:
    """The source of the named function's file and of what it imports from there, by paths from the folder that imports
    count from, so that it may lie anywhere; a built-in name stays a name."""
    if ":" not in reference:
        return reference
    return identity_of_sources(reference, source_files(reference))


def identity_of_sources(reference: str, files: Mapping[Path, str]) -> dict[str, str]:
    """`code_identity` of files that were read (`source_files`)."""
    root = _place(reference).root
    lines = [f"{path.relative_to(root).as_posix()}:{sha256}\n" for path, sha256 in files.items()]
    return {"function": reference.rsplit(":", 1)[1], "sha256": sha256_bytes("".join(lines).encode())}


def source_files(reference: str) -> dict[Path, str]:
    """Path -> SHA-256 of the files that are the source of the user's function; none of a built-in name."""
    if ":" not in reference:
        return {}
    place = _place(reference)
    return {place.root / name: sha256 for name, sha256 in sources(place).items()}


def imported_names(reference: str, files: Iterable[Path]) -> set[str]:
    """The top-level names by which Python imports such files; none of `file.py:name`, which is loaded otherwise."""
    place = _place(reference)
    if reference.rsplit(":", 1)[0].endswith(".py"):
        return set()
    return {path.relative_to(place.root).parts[0].partition(".")[0] for path in files}


def _place(reference: str) -> Place:
    source = reference.rsplit(":", 1)[0]
    place = place_of(source)
    if place is None:
        raise RequestError(f"no module named {source!r}")
    return place


def data_identity(reference: str) -> dict[str, str]:
    """The content of a file, folder, glob or URL: names and SHA-256 of its files; never a place or a time."""
    if reference.startswith(HUB):
        name = reference.removeprefix(HUB)
        return {"hub": name, "revision": hub_revision(name, "dataset")}
    located = _located(reference)
    if located.saved is None and len(located.files) == 1:
        (file,) = located.files
        return {"sha256": _stream_digest(file), "suffix": file.suffix + file.packing}
    # of a folder that `datasets` saved this is its `folder_digest`, on whatever file system
    lines = [f"{file.name}:{_stream_digest(file)}" for file in _data_files(located)]
    return {"sha256": sha256_bytes("\n".join(lines).encode())}


def argument_identity(text: str) -> Any:
    """The content of the file or folder that an argument names, as `data_identity` has it; any other text is itself."""
    if not is_argument_file(text):
        return text
    try:
        if os.path.isdir(text):
            return {"sha256": folder_digest(Path(text))}
        return {"sha256": sha256_file(text), "suffix": Path(text).suffix}
    except OSError as error:
        raise RequestError(f"cannot read {text}, which an argument names: {error.strerror or error}") from error


def _located(reference: str) -> Located:
    try:
        return locate(reference, "auto")
    except DataError as error:
        raise RequestError(str(error)) from error


def _data_files(located: Located) -> list[SourceFile]:
    if located.saved is None:
        return list(located.files)
    try:
        return files_below(located.saved)
    except Exception as error:  # every file system has errors of its own
        raise RequestError(f"cannot list {located.saved.shown}: {type(error).__name__}: {error}") from error


def _stream_digest(file: SourceFile) -> str:
    digest = hashlib.sha256()
    try:
        with file.filesystem.open(file.path, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except Exception as error:  # every file system has errors of its own
        raise RequestError(f"cannot read {file.shown}: {type(error).__name__}: {error}") from error
    return digest.hexdigest()


def folder_digest(path: Path) -> str:
    """SHA-256 over the relative names and digests of a folder's files."""
    if not (files := _files_in(path)):
        raise RequestError(f"no files in {path}")
    lines = [f"{name}:{sha256_file(file)}" for name, file in files]
    return sha256_bytes("\n".join(lines).encode())


def _files_in(path: Path) -> list[tuple[str, Path]]:
    """Relative name and path of every file of a folder, or of a file itself."""
    if path.is_file():
        return [(path.name, path)]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [(file.relative_to(path).as_posix(), file) for file in files]


def _local(path: Path, name: str) -> SourceFile:
    from fsspec.implementations.local import LocalFileSystem

    return SourceFile(LocalFileSystem(), str(path), str(path), name)


_CONTENTS: dict[str, Callable[[str], Any]] = {
    "code": code_identity,
    "data": data_identity,
    "argument": argument_identity,
    "folder": lambda where: folder_digest(Path(where)),
}
