"""Planted bugs: each must make the campaign that looks for its kind find something, and without it that campaign must
find nothing. They are patched in while they are tried; no file of the tree changes.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from artifacts import checkpoints, durable, materialize
from artifacts.errors import StoreError
from artifacts.files import Publication
from artifacts.folder import differences, hash_folder, scan, sizes
from artifacts.local import LocalFiles
from artifacts.remote import RemoteFiles
from flows import supervise
from tests.campaigns import cancels, corruption, interposed, power_loss, resuming, storage_faults, store_kills
from tests.campaigns.interposed import Fault
from tests.campaigns.operations import NAMED
from tests.campaigns.outcome import Outcome

Hunt = Callable[[], list[str]]


@dataclass(frozen=True)
class Mutant:
    """`plant` puts the bug in for a while; `hunt` is what must find it."""

    name: str
    plant: Callable[[], AbstractContextManager[Any]]
    hunt: Hunt


# what looks for them


def power_cuts(*names: str) -> Hunt:
    """Power cuts in the named operations, one after the other."""

    def hunt() -> list[str]:
        given = power_loss.recorded([NAMED[name] for name in names])
        return [text for wrong in power_loss.wrongs(given, 10, random.Random(0)) for text in wrong]

    return hunt


def deaths() -> list[str]:
    """Deaths at every call to a store in memory."""
    outcome = Outcome(0)
    with tempfile.TemporaryDirectory() as folder, store_kills.every_holder_is_dead():
        for _ in store_kills.kills(store_kills.Memory(Path(folder)), outcome, random.Random(0)):
            if outcome.anomalies:
                break
    return outcome.anomalies


def failures(fault: Fault, every: int = 5, for_ever: bool = False) -> Hunt:
    """One fault on the remote store, once or from then on."""

    def hunt() -> list[str]:
        outcome = Outcome(0)
        with storage_faults.trials() as both:
            storage_faults.systematic(both[0][0], (fault,), outcome, step=every, for_ever=(for_ever,))
        return outcome.anomalies

    return hunt


REFUSED_LISTS = Fault("a list is refused", interposed.FORBIDDEN.act, interposed.LISTS, passes=False)
"""The order of other calls is that of threads, so every so manieth of all would be a list by luck."""


def damages() -> list[str]:
    """Damage of contents on a local disk."""
    outcome = Outcome(0)
    with corruption.benches() as both:
        corruption.contents(both[0], outcome, random.Random(0), flips=8)
    return outcome.anomalies


def changed_bytes() -> list[str]:
    """Every so manieth byte of what is sealed."""
    outcome = Outcome(0)
    with corruption.benches() as both:
        corruption.every_byte(both[0], outcome, random.Random(0), step=7)
    return outcome.anomalies


def cancelled() -> list[str]:
    """Cancels of processes that resist."""
    return cancels.campaign(2, seed=0).anomalies


# the bugs; those of what a checkpoint holds are beside what looks for them


def _no_payload_sync() -> AbstractContextManager[Any]:
    return mock.patch.object(LocalFiles, "take_in", lambda self, folder: hash_folder(folder))


def _no_folder_sync() -> AbstractContextManager[Any]:
    return mock.patch.object(durable, "sync_upwards", lambda *arguments: None)


def _marker_first() -> AbstractContextManager[Any]:
    publish = LocalFiles.publish

    def early(self: LocalFiles, publication: Publication) -> None:
        self.write(f"{publication.key}/{publication.marker[0]}", publication.marker[1])
        publish(self, publication)

    return mock.patch.object(LocalFiles, "publish", early)


def _written_in_place() -> AbstractContextManager[Any]:
    def write(self: LocalFiles, key: str, data: bytes) -> None:
        path = self.path(key)
        durable.ensure_folder(self._disk, path.parent)
        with contextlib.suppress(FileNotFoundError):
            self._disk.unlink(path)
        durable.write_new(self._disk, path, data)
        durable.sync_upwards(self._disk, path.parent, self.root)

    return mock.patch.object(LocalFiles, "write", write)


def _deleted_before_saved() -> AbstractContextManager[Any]:
    save = checkpoints.Checkpoints.save

    def early(self: checkpoints.Checkpoints, step: int, folder: Path) -> None:
        self.clear()
        save(self, step, folder)

    return mock.patch.object(checkpoints.Checkpoints, "save", early)


def _files_deleted_before_the_marker() -> AbstractContextManager[Any]:
    remove = RemoteFiles.remove
    return mock.patch.object(RemoteFiles, "remove", lambda self, key, first=None: remove(self, key))


def _refusal_taken_as_a_miss() -> AbstractContextManager[Any]:
    tree = RemoteFiles.tree

    def blind(self: RemoteFiles, key: str) -> Any:
        try:
            return tree(self, key)
        except StoreError:
            return {}

    return mock.patch.object(RemoteFiles, "tree", blind)


def _early_miss_believed() -> AbstractContextManager[Any]:
    return mock.patch.object(RemoteFiles, "_is_listed", lambda self, key: False)


def _failed_calls_are_not_repeated() -> AbstractContextManager[Any]:
    return mock.patch("artifacts.retry._may_pass", lambda error: False)


def _writes_not_read_back() -> AbstractContextManager[Any]:
    return mock.patch.object(RemoteFiles, "_pipe_and_check", RemoteFiles._pipe)


def _contents_not_hashed() -> AbstractContextManager[Any]:
    def by_size(folder: Path, expected: Any, ignore: tuple[str, ...] = ()) -> list[str]:
        return differences({path: sizes(status) for path, status in scan(folder).items()}, expected)

    return mock.patch.object(materialize, "check_folder", by_size)


@contextlib.contextmanager
def _seals_not_checked() -> Iterator[None]:
    def trusting(data: bytes, where: str) -> Any:
        value: dict[str, Any] = json.loads(data)
        value.pop("seal")
        return value

    with mock.patch("artifacts.index.unseal", trusting), mock.patch("artifacts.reading._is_sealed", lambda data: True):
        yield


@contextlib.contextmanager
def _only_the_group_is_ended() -> Iterator[None]:
    """A supervisor, in a file of its own, that ends the launcher's group and looks for nothing else."""
    source = Path(supervise.__file__).read_text(encoding="utf-8")
    line = "    killed, late_status = _kill_descendants(launcher.pid)\n"
    assert line in source
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "supervise.py"
        group = "    killed, late_status = 0, None\n    os.killpg(launcher.pid, signal.SIGKILL)\n"
        changed.write_text(source.replace(line, group), encoding="utf-8")
        with mock.patch.object(supervise, "__file__", str(changed)):
            yield


MUTANTS = (
    Mutant("contents are not synced", _no_payload_sync, power_cuts("put")),
    Mutant("folders are not synced", _no_folder_sync, power_cuts("put", "record")),
    Mutant("the marker comes first", _marker_first, power_cuts("checkpoint")),
    Mutant("files are written in place", _written_in_place, power_cuts("alias", "run")),
    Mutant("checkpoints are deleted before the next is saved", _deleted_before_saved, deaths),
    Mutant("files are deleted before their manifest", _files_deleted_before_the_marker, deaths),
    Mutant("a refusal is taken as a miss", _refusal_taken_as_a_miss, failures(REFUSED_LISTS, 1)),
    Mutant("a miss that comes too early is believed", _early_miss_believed, failures(interposed.NOT_YET, 2)),
    Mutant("failed calls are not repeated", _failed_calls_are_not_repeated, failures(interposed.RESET, 20)),
    Mutant("small writes are not read back", _writes_not_read_back, failures(interposed.SHORT)),
    Mutant("contents are not hashed", _contents_not_hashed, damages),
    Mutant("seals are not checked", _seals_not_checked, changed_bytes),
    Mutant("the optimizer's state is dropped", resuming.moments_dropped, resuming.noise),
    Mutant("a random state is dropped", resuming.noise_dropped, resuming.noise),
    Mutant("the place in a stream of prompts is dropped", resuming.place_dropped, resuming.prompts),
    Mutant("only the launcher's group is ended", _only_the_group_is_ended, cancelled),
)


def campaign(count: int, seed: int) -> Outcome:
    """The first `count` mutants; an anomaly is one that nothing finds, or a hunt that finds something without."""
    outcome = Outcome(seed)
    for mutant in MUTANTS[:count]:
        outcome.counts["planted bugs"] += 1
        if found := mutant.hunt():
            outcome.anomalies.append(f"without {mutant.name!r}: {found[0]}")
            continue
        with mutant.plant():
            found = _found(mutant.hunt)
        if found:
            outcome.counts["caught"] += 1
            print(f"{mutant.name}: {found[0][:150]}", flush=True)
        else:
            outcome.anomalies.append(f"not caught: {mutant.name}")
    return outcome


def _found(hunt: Hunt) -> list[str]:
    """What a hunt reports; a bug that breaks the hunt itself is found as well."""
    try:
        return hunt()
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
