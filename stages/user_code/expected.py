"""Source that a stage was planned with: where it is another one by the time it is loaded, that is an error.

What was loaded stays as it is, so later edits do no harm; but a stage may import more of it hours later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

from artifacts.digest import sha256_bytes
from artifacts.errors import StageError

VARIABLE = "POSTTRAIN_EXPECTED_CODE"
"""Names the JSON file that tells the processes which the user's code starts."""

Explain = Callable[[str], str]
"""Path of a file that was edited -> what is said of it."""


class _Expected:
    def __init__(self, files: Mapping[str, str], packages: Iterable[str], explain: Explain) -> None:
        self.files, self.packages, self.explain = files, frozenset(packages), explain
        self.broken: str | None = None
        """What was said of the first file that was another one, should the user's code have caught it."""


def _of_parent() -> _Expected:
    try:
        told = json.loads(Path(os.environ[VARIABLE]).read_text(encoding="utf-8"))
    except (KeyError, OSError, ValueError):
        told = {"files": {}, "packages": []}
    return _Expected(**told, explain=lambda path: f"{path} has changed since the run was planned; run again")


_current = _of_parent()


@contextmanager
def expecting(files: Mapping[Path, str], packages: Iterable[str], explain: Explain, told: Path) -> Iterator[None]:
    """Within, files that are loaded have these SHA-256, here and in processes that are started, which the file `told`
    tells. `packages`: top-level names of those of them that are imported by Python's own rules."""
    global _current
    before, variable = _current, os.environ.get(VARIABLE)
    _current = _Expected({os.path.realpath(path): sha256 for path, sha256 in files.items()}, packages, explain)
    told.write_text(json.dumps({"files": _current.files, "packages": sorted(_current.packages)}), encoding="utf-8")
    os.environ[VARIABLE] = str(told)
    try:
        yield
    finally:
        _current = before
        os.environ.pop(VARIABLE, None)
        if variable is not None:
            os.environ[VARIABLE] = variable


def expected_sha256(path: str) -> str | None:
    """Of the file as it was planned; None: nobody planned it."""
    return _current.files.get(os.path.realpath(path)) if _current.files else None


def is_of_expected_package(module: str) -> bool:
    """Whether a module may be of a package that was planned."""
    return module.partition(".")[0] in _current.packages


def require_expected(path: str, data: bytes) -> None:
    """Raises StageError where the file is another one than was planned."""
    wanted = expected_sha256(path)
    if wanted is not None and sha256_bytes(data) != wanted:
        _current.broken = _current.broken or _current.explain(path)
        raise StageError(_current.broken)


def require_unbroken() -> None:
    """Raises StageError where something was to be loaded that was not planned."""
    if _current.broken is not None:
        raise StageError(_current.broken)


class SourceLoader(SourceFileLoader):
    """Runs a source as it stands: a compiled one counts as fresh by size and second, so it may be another's."""

    sha256 = ""
    """Of the source that was run."""

    def get_code(self, fullname: str) -> CodeType:
        data = self.get_data(self.path)
        require_expected(self.path, data)
        self.sha256 = sha256_bytes(data)
        code: CodeType = self.source_to_code(data, self.path)
        return code
