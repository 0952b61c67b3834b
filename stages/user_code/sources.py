"""What a file of the user's consists of: itself, and what it imports from the folder that its imports count from."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from artifacts.digest import sha256_bytes
from artifacts.errors import RequestError
from stages.ast_race import again_where_threads_met
from stages.user_code.places import Found, Place, find_module

Dotted = tuple[str, ...]

_IMPORTERS = ("import_module", "__import__")


def sources(place: Place) -> dict[str, str]:
    """Path from the root -> SHA-256 of every file that is run when it is imported, or may be when it is called.

    Imports are followed wherever they stand, by name only: neither what a computed name leads to, nor what lies
    elsewhere than below the root, is seen. Raises RequestError for what is no Python.
    """
    found: dict[str, str] = {}
    pending = [place.file, *_on_the_way(place.root, place.file.relative_to(place.root).parent.parts)]
    while pending:
        file = pending.pop()
        name = file.relative_to(place.root).as_posix()
        if name in found:
            continue
        data = _read(file)
        found[name] = sha256_bytes(data)
        if file.suffix == ".py":
            pending.extend(_imported(parsed(file, data), place, file))
    return dict(sorted(found.items()))


def parsed(file: Path, data: bytes | None = None) -> ast.Module:
    """The syntax tree of a file. Raises RequestError for what is no Python."""
    try:
        source = _read(file) if data is None else data
        return again_where_threads_met(lambda: ast.parse(source, filename=str(file)))
    except SyntaxError as error:
        raise RequestError(f"{file}:{error.lineno}: not valid Python: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:  # no text, or nested without end
        raise RequestError(f"{file}: not valid Python: {error}") from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {file}: {error.strerror}") from error


def _imported(tree: ast.Module, place: Place, file: Path) -> Iterator[Path]:
    package = file.relative_to(place.root).parent.parts
    for level, module, names in _imports(tree):
        if level > len(package) + 1:  # beyond the root, where Python refuses it too
            continue
        dotted = (*package[: len(package) + 1 - level], *module) if level else module
        if level == 0 and not place.counts(dotted[0]):
            continue
        yield from _on_the_way(place.root, dotted)
        for name in names:
            yield from _all_of(place.root, dotted) if name == "*" else _on_the_way(place.root, (*dotted, name))


def _imports(tree: ast.Module) -> Iterator[tuple[int, Dotted, list[str]]]:
    """(dots before it, module, names taken from it) of every import, also within functions."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((0, tuple(alias.name.split(".")), []) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                yield level, tuple(module.split(".")) if module else (), [alias.name for alias in names]
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]
            ):
                if called in _IMPORTERS and (bare := name.lstrip(".")):
                    yield len(name) - len(bare), tuple(bare.split(".")), []


def _on_the_way(root: Path, dotted: Dotted) -> Iterator[Path]:
    """The files of a dotted module and of the packages that it is in, as far as they are there."""
    yield from (found.file for found in _steps(root, dotted) if found.file is not None)


def _steps(root: Path, dotted: Dotted) -> Iterator[Found]:
    folder: Path | None = root
    for name in dotted:
        found = None if folder is None else find_module(folder, name)
        if found is None:
            return
        yield found
        folder = found.folder


def _all_of(root: Path, dotted: Dotted) -> Iterator[Path]:
    """What `import *` may take of a package: any of its modules, for `__all__` can be computed."""
    steps = list(_steps(root, dotted))
    if len(steps) == len(dotted) and steps and (folder := steps[-1].folder) is not None:
        names = {path.name.partition(".")[0] for path in folder.iterdir()}
        yield from (path for name in sorted(names) for path in _on_the_way(folder, (name,)))
