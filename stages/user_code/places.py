"""Where a module of the user's lies: one rule for what is loaded and for what counts as its source."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

_SUFFIXES = (*EXTENSION_SUFFIXES, ".py")
_OURS = Path(__file__).resolve().parents[2]
_OUR_PACKAGES = ("artifacts", "flows", "stages")


@dataclass(frozen=True)
class Found:
    """A module. `file` None: a folder without `__init__.py`. `folder`: that of a package."""

    file: Path | None
    folder: Path | None = None


def find_module(folder: Path, name: str) -> Found | None:
    """The module `name` of a folder, in Python's order: package, file, plain folder."""
    inner = folder / name
    for suffix in _SUFFIXES:
        if (inner / f"__init__{suffix}").is_file():
            return Found(inner / f"__init__{suffix}", inner)
    for suffix in _SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return Found(folder / f"{name}{suffix}")
    return Found(None, inner) if inner.is_dir() else None


def is_beside(folder: Path, name: str) -> bool:
    """Whether `import name` means something in the folder: never for a name of the standard library, and a folder
    without `__init__.py` (often of data) gives way to what is installed."""
    if name in sys.stdlib_module_names:
        return False
    found = find_module(folder, name)
    return found is not None and (found.file is not None or not _is_installed(name))


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # it is there, and of an unusual kind
        return True


@dataclass(frozen=True)
class Place:
    """A file of code, the folder that its imports count from, and the packages there that are no source of it."""

    file: Path
    root: Path
    only: str | None = None
    """The one package that counts; None: all but `without`."""
    without: tuple[str, ...] = ()

    def counts(self, name: str) -> bool:
        """Whether a module or package of the root belongs to the source."""
        return name not in self.without and self.only in (None, name) and name not in sys.stdlib_module_names


def place_of(source: str) -> Place | None:
    """Of `file.py`, or of an importable module, found without running any code. None: there is none."""
    if source.endswith(".py"):
        return Place(Path(source), Path(source).parent)
    top, *rest = source.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations is None:
        file = Path(spec.origin) if spec.origin else None
        return _of_module(top, file, file.parent) if file is not None and not rest else None
    for location in map(Path, spec.submodule_search_locations):
        found: Found | None = find_module(location.parent, location.name)
        for name in rest:
            found = find_module(found.folder, name) if found is not None and found.folder is not None else None
        if found is not None and found.file is not None:
            return _of_module(top, found.file, location.parent)
    return None


def _of_module(top: str, file: Path, root: Path) -> Place | None:
    """Of what is installed only the package itself counts, of our own checkout what is not ours."""
    if file.suffix != ".py":
        return None
    installed = {"site-packages", "dist-packages"} & set(root.parts) or root == Path(sysconfig.get_path("stdlib"))
    return Place(file, root, top if installed else None, _OUR_PACKAGES if root.resolve() == _OURS else ())
