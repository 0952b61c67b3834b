"""What is in use, said to whoever deletes; and what is about to be deleted, said to whoever uses.

Each side speaks first and looks afterwards. A user makes an artifact young or claims it, then reads what is
condemned; `gc` condemns, then reads claims and ages. In whatever order they meet, one of them sees the other: gc
spares the artifact, or the user waits until it is gone and makes it again. No lock is needed for that.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from artifacts.digest import sha256_bytes
from artifacts.disk import temporary_name
from artifacts.errors import DamagedError, RequestError
from artifacts.files import Files
from artifacts.leases import Lease
from artifacts.manifest import Artifact
from artifacts.owner import owner_tag
from artifacts.reading import read_sealed
from artifacts.sealed import seal, unseal
from artifacts.shapes import shown

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}")
CONDEMNED = "gc/condemned.json"
SWEEPER = sha256_bytes(b"posttrain gc")
"""Stands for a fingerprint: its lease says who collects garbage."""
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Claim:
    """Artifacts that somebody works with. `process`: who, as in a lease; `modified`: when it was last said."""

    name: str
    process: str
    artifacts: tuple[Artifact, ...]
    modified: float


def write(files: Files, name: str, artifacts: Iterable[Artifact]) -> None:
    """Claims artifacts under a name; an earlier claim of that name is replaced."""
    named = [artifact.to_json() for artifact in dict.fromkeys(artifacts)]
    files.write(_key(name), seal({"name": name, "process": owner_tag(), "artifacts": named}))


def drop(files: Files, name: str) -> None:
    """Takes a claim back."""
    files.delete(_key(name))


def read_all(files: Files) -> list[Claim]:
    """Every claim. Raises DamagedError: who cannot read a claim must not delete."""
    found = []
    for path, stored in sorted(files.tree("claims").items()):
        where = f"{files.url}/claims/{shown(path)}"
        try:
            value = unseal(read_sealed(files, f"claims/{path}"), where)
            artifacts = tuple(Artifact.from_json(item) for item in value["artifacts"])
            name, process = path.removesuffix(".json"), value["process"]
            if not NAME.fullmatch(name) or not isinstance(process, str):
                raise TypeError
            found.append(Claim(name, process, artifacts, stored.modified))
        except FileNotFoundError:
            continue  # taken back since it was listed
        except (DamagedError, KeyError, TypeError, RequestError):
            raise DamagedError(f"{where} is not a claim, or damaged; delete it when no run is going on") from None
    return found


def condemn(files: Files, artifacts: Iterable[Artifact]) -> None:
    """Says that these are going to be deleted; only the holder of the lease of SWEEPER may."""
    files.write(CONDEMNED, seal({"artifacts": [artifact.to_json() for artifact in artifacts]}))


def acquit(files: Files) -> None:
    """Says that nothing is going to be deleted any more."""
    files.delete(CONDEMNED)


def await_sweep(files: Files, artifacts: Collection[Artifact]) -> bool:
    """Returns when none of these is being deleted. True: one was, so look again whether it is there."""
    waited = False
    while _condemned(files, artifacts) and Lease(files, SWEEPER, "").holder() is not None:
        waited = True
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return waited


@contextlib.contextmanager
def publishing(files: Files, artifact: Artifact) -> Iterator[None]:
    """Nothing below the artifact's key is deleted while its files are put there. Where nothing lies yet there is
    nothing to claim, only the last moments of a deletion to wait for."""
    name = f"put-{temporary_name()}" if files.children(artifact.key) else None
    try:
        if name is not None:
            write(files, name, [artifact])  # where it fails, half of it may be there, and nobody could delete
        await_sweep(files, [artifact])
        yield
    finally:
        if name is not None:
            drop(files, name)


def _condemned(files: Files, artifacts: Collection[Artifact]) -> bool:
    try:
        named = {item["id"] for item in unseal(files.read(CONDEMNED), CONDEMNED)["artifacts"]}
    except FileNotFoundError:
        return False
    except (DamagedError, KeyError, TypeError):
        return True
    return any(artifact.id in named for artifact in artifacts)


def _key(name: str) -> str:
    if not NAME.fullmatch(name):
        raise RequestError(f"not the name of a claim (letters, digits, '.', '_' and '-'): {name!r}")
    return f"claims/{name}.json"
