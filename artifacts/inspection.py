"""Checking everything in a store: artifacts and checkpoints byte by byte, and every small file by its seal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from artifacts import aliases, claims, runs
from artifacts.contents import MANIFEST
from artifacts.digest import is_sha256
from artifacts.errors import DamagedError, MissingError, RequestError
from artifacts.index import Record
from artifacts.store import Store


@dataclass(frozen=True)
class Checked:
    """One thing that was looked at: what it is, its name, and what is wrong with it, one line each."""

    what: str
    name: str
    problems: tuple[str, ...]


def inspect(store: Store) -> Iterator[Checked]:
    """Looks at all there is, one thing after the other."""
    for artifact in store.artifacts():
        yield Checked("artifact", artifact.id, tuple(store.verify(artifact)))
    for stage in store.files.children("index"):
        yield from _records(store, stage)
    for path in sorted(store.files.tree("aliases")):
        yield _checked("alias", f"aliases/{path}", partial(_read_alias, store, path))
    for path in sorted(store.files.tree("runs")):
        yield _checked("run", f"runs/{path}", partial(_read_run, store, path))
    if store.files.children("claims"):
        yield _checked("claim", "claims", partial(claims.read_all, store.files))
    yield from _work(store)


def _records(store: Store, stage: str) -> Iterator[Checked]:
    try:
        found = sorted(store.files.tree(f"index/{stage}"))
    except DamagedError as error:
        yield Checked("record", f"index/{stage}", (str(error),))
        return
    for path in found:
        key = f"index/{stage}/{path}"
        yield _checked("record", key, partial(_read_record, store, key, stage))


def _checked(what: str, name: str, read: Callable[[], object]) -> Checked:
    try:
        read()
    except FileNotFoundError:
        return Checked(what, name, ())  # deleted since it was listed
    except (DamagedError, MissingError, RequestError) as error:
        return Checked(what, name, (str(error),))
    return Checked(what, name, ())


def _read_record(store: Store, key: str, stage: str) -> None:
    record = Record.from_bytes(store.files.read(key), f"{store.url}/{key}")
    if (record.stage, record.fingerprint) != (stage, key.split("/")[-2]):
        raise DamagedError(f"{store.url}/{key} is a record of {record.stage} {record.fingerprint[:12]}; delete it")


def _read_alias(store: Store, path: str) -> None:
    artifact = aliases.read(store.files, path.removesuffix(".json"))
    if artifact is not None and MANIFEST not in store.files.children(artifact.key):
        raise MissingError(f"@{path.removesuffix('.json')} names {artifact}, which is not there; set it again")


def _read_run(store: Store, path: str) -> None:
    runs.read(store.files, path.removesuffix(".json"))


def _work(store: Store) -> Iterator[Checked]:
    for fingerprint in store.files.children("work"):
        if not is_sha256(fingerprint):
            continue
        try:
            yield from _unfinished(store, fingerprint)
        except DamagedError as error:  # a link, behind which nothing is looked at
            yield Checked("checkpoint", f"work/{fingerprint}", (str(error),))


def _unfinished(store: Store, fingerprint: str) -> Iterator[Checked]:
    for name, problems in store.checkpoints(fingerprint).verify().items():
        yield Checked("checkpoint", f"work/{fingerprint}/checkpoints/{name}", tuple(problems))
    shards = store.shards(fingerprint)
    for name in sorted(shards.names()):
        key = f"work/{fingerprint}/shards/{name}"
        yield _checked("shard", key, partial(shards.load, name))
