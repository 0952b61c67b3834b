"""Names that people give to artifacts, and how a reference in a recipe or on the command line is resolved."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Collection, Iterable

from artifacts.errors import DamagedError, RequestError
from artifacts.files import Files
from artifacts.manifest import Artifact
from artifacts.reading import read_sealed
from artifacts.sealed import seal, unseal
from artifacts.shapes import shown

logger = logging.getLogger(__name__)
PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
NAME = re.compile(rf"{PART}(/{PART})*")
PREFIX = re.compile(r"[0-9a-f]{8,64}")


def write(files: Files, name: str, artifact: Artifact) -> None:
    """Points a name at an artifact. Raises RequestError for what cannot be a name."""
    if not NAME.fullmatch(name) or PREFIX.fullmatch(name):
        raise RequestError(
            f"not a name for an artifact: {name!r}; use letters, digits, '.', '_', '-' and '/', and not only hex digits"
        )
    files.write(_key(name), seal({"name": name, **artifact.to_json()}))


def read_all(files: Files) -> dict[str, Artifact]:
    """Every alias, sorted. Damaged ones are named in the log and left out."""
    found = {}
    for path in sorted(files.tree("aliases")):
        name = path.removesuffix(".json")
        try:
            artifact = read(files, name)
        except DamagedError as error:
            logger.warning("%s", error)
            continue
        if artifact is not None:
            found[name] = artifact
    return found


def read(files: Files, name: str) -> Artifact | None:
    """What a name means; None: nothing. Raises DamagedError."""
    where = f"{files.url}/{shown(_key(name))}"
    if not NAME.fullmatch(name):
        raise DamagedError(f"{where} has a name that no alias has; delete it")
    try:
        value = unseal(read_sealed(files, _key(name)), where)
    except FileNotFoundError:
        return None
    try:
        if value["name"] != name:
            raise DamagedError(f"{where} is the alias {str(value['name'])[:100]!r}; set it again")
        return Artifact.from_json(value)
    except (KeyError, RequestError):
        raise DamagedError(f"{where} is not an alias; set it again") from None


def find(
    files: Files, reference: str, artifacts: Callable[[str], Iterable[Artifact]], kinds: Collection[str] = ()
) -> Artifact:
    """What a reference means. Raises RequestError: unknown, with the nearest name of these kinds (none given: of any),
    or more than one."""
    name = reference.removeprefix("@")
    if NAME.fullmatch(name):
        artifact = read(files, name)
        if artifact is not None:
            return artifact
    kind, _, digest = name.rpartition("/")
    prefix = digest.removeprefix("sha256:")
    if PREFIX.fullmatch(prefix):
        return _by_prefix(files, reference, kind, artifacts(prefix))
    known = [alias for alias, artifact in read_all(files).items() if not kinds or artifact.kind in kinds]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean @{close[0]}?" if close else ""
    raise RequestError(
        f"there is no artifact {reference!r} in {files.url}{hint}; an id is at least 8 hex digits, and "
        "`posttrain ls` shows all"
    )


def _by_prefix(files: Files, reference: str, kind: str, artifacts: Iterable[Artifact]) -> Artifact:
    matches = [artifact for artifact in artifacts if kind in ("", artifact.kind)]
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise RequestError(f"there is no artifact {reference!r} in {files.url}; `posttrain ls` shows all")
    listed = ", ".join(f"{match.kind}/{match.id}" for match in matches[:5])
    raise RequestError(f"{reference!r} may be {len(matches)} artifacts: {listed}; write more of it")


def _key(name: str) -> str:
    return f"aliases/{name}.json"
