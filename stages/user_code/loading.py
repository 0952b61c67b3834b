"""Loads the user's files and what lies beside them, each folder's modules apart from those of all others."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

from artifacts.digest import sha256_bytes
from stages.user_code.expected import SourceLoader, expected_sha256, is_of_expected_package, require_expected
from stages.user_code.places import find_module, is_beside

PREFIX = "stages.user_code."
"""Of the names of the user's modules; then their folder, with its dots written out."""

_forgetting = threading.Lock()


def load_file(path: Path) -> ModuleType:
    """The module of a Python file, as its source and that of its neighbours is now."""
    _forget_changed(package_of(path.parent))
    return importlib.import_module(module_name(path))


def module_name(path: Path) -> str:
    """As `sys.modules` has it. Where its bare name would mean something else, it has its suffix too."""
    found = find_module(path.parent, path.stem)
    name = path.stem if found is not None and found.file == path else path.name
    return f"{package_of(path.parent)}.{_quoted(name)}"


def package_of(folder: Path) -> str:
    """The package that the modules of a folder are in."""
    return PREFIX + _quoted(str(folder))


def is_users(module: str) -> bool:
    """Whether a module of that name is one of the user's files."""
    return _folder_of(module) is not None


class Loader(SourceLoader):
    """Runs a file of the user's with its own neighbours."""

    def exec_module(self, module: ModuleType) -> None:
        # functions keep the builtins of their module, so what they import when they are called is found as well
        folder = _folder_of(module.__name__)
        assert folder is not None
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import_from(folder)}
        super().exec_module(module)


class Finder(MetaPathFinder):
    """Finds the modules of the user's folders by their long names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = _folder_of(fullname)
        if folder is None:
            return None
        if fullname == package_of(folder):
            return _package(fullname, folder)
        name = unquote(fullname.rpartition(".")[2])
        for place in map(Path, path or ()):
            if name.endswith(".py"):
                return importlib.util.spec_from_file_location(
                    fullname, place / name, loader=_loader(fullname, place / name)
                )
            found = find_module(place, name)
            if found is None:
                continue
            if found.file is None:
                return _package(fullname, place / name)
            inner = None if found.folder is None else [str(found.folder)]
            loader = _loader(fullname, found.file)
            return importlib.util.spec_from_file_location(
                fullname, found.file, loader=loader, submodule_search_locations=inner
            )
        return None


class Planned(MetaPathFinder):
    """Has the files of importable modules of the user's run as they were planned."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not is_of_expected_package(fullname):
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, Finder | Misled | Planned))
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.origin is None or expected_sha256(spec.origin) is None:
            return None
        if isinstance(spec.loader, SourceFileLoader):
            spec.loader = SourceLoader(fullname, spec.origin)
        else:
            require_expected(spec.origin, Path(spec.origin).read_bytes())
        return spec


class Misled(MetaPathFinder):
    """Says why a neighbour is not found under its short name, which would be one for the whole process."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        frame = sys._getframe(1)
        while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("importlib"):
            frame = frame.f_back
        folder = _folder_of(str(frame.f_globals.get("__name__")))
        if path is None and folder is not None and is_beside(folder, fullname):
            raise ModuleNotFoundError(
                f"{fullname} lies in {folder}, beside the file that asks for it: use an import statement, or "
                f'importlib.import_module(".{fullname}", __package__)',
                name=fullname,
            )
        return None


def _import_from(folder: Path) -> Callable[..., ModuleType]:
    """`__import__` for the modules of a folder."""
    package = package_of(folder)

    def import_(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if level:
            _require_within(package, str((globals or {}).get("__package__")), level)
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        top = name.partition(".")[0]
        if _is_itself(globals, f"{package}.{top}") or not is_beside(folder, top):
            return builtins.__import__(name, globals, locals, fromlist or (), 0)
        found = importlib.import_module(f"{package}.{name}")
        if not fromlist:
            return sys.modules[f"{package}.{top}"]
        return builtins.__import__(found.__name__, globals, locals, fromlist, 0)

    return import_


def _is_itself(globals: Mapping[str, Any] | None, name: str) -> bool:
    """A file that is called as a library and imports it means the library."""
    return globals is not None and globals.get("__name__") == name and "__path__" not in globals


def _require_within(package: str, importing: str, level: int) -> None:
    if level > len(importing.removeprefix(package).split(".")):
        raise ImportError("attempted relative import beyond the folder of the file that the recipe names")


def _forget_changed(package: str) -> None:
    """So that what was edited since is loaded anew, with all of its folder."""
    with _forgetting:
        modules = {name: module for name, module in sys.modules.items() if f"{name}.".startswith(f"{package}.")}
        if any(_has_changed(module) for module in modules.values()):
            for name in modules:
                sys.modules.pop(name, None)


def _has_changed(module: ModuleType) -> bool:
    loader = getattr(module, "__loader__", None)
    if not isinstance(loader, Loader) or not loader.sha256:
        return False
    try:
        # within a stage an edit does not count: what was loaded stays
        return (expected_sha256(loader.path) or sha256_bytes(Path(loader.path).read_bytes())) != loader.sha256
    except OSError:  # it is gone
        return True


def _loader(fullname: str, file: Path) -> Loader | None:
    """None: an extension, which Python loads."""
    if file.suffix == ".py":
        return Loader(fullname, str(file))
    require_expected(str(file), file.read_bytes())
    return None


def _package(fullname: str, folder: Path) -> ModuleSpec:
    spec = ModuleSpec(fullname, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    return spec


def _folder_of(module: str) -> Path | None:
    """The folder whose modules one of that name is among; None: it is not of a user's folder."""
    if not module.startswith(PREFIX):
        return None
    folder = Path(unquote(module.removeprefix(PREFIX).partition(".")[0]))
    return folder if folder.is_absolute() else None


def _quoted(text: str) -> str:
    return text.replace("%", "%25").replace(".", "%2E")
