"""Stores that somebody else wrote to do harm: what was done to a good one, and the words that each command must say.

A good store holds a dataset, a model made from it, a record, an alias, a run, a checkpoint and a shard. Each way of
spoiling it gets the store's folder; whatever it leads to lies in the folder `outside` beside it.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from artifacts import Artifact, Record, Store, open_store, seal, sha256_bytes
from artifacts.claims import SWEEPER
from artifacts.digest import FileEntry, digest_of
from artifacts.manifest import Manifest

FINGERPRINT = "ab" * 32
DAY = 86400.0
Spoil = Callable[["Hostile"], None]


class Payload:
    """Whoever unpickles it makes a folder `ran` in the working folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


class Hostile:
    """A good store in `folder`/store, to be spoiled. All its times are ten days old, so that `gc` would delete."""

    def __init__(self, folder: Path) -> None:
        self.root, self.outside = folder / "store", folder / "outside"
        self.outside.mkdir(parents=True)
        (self.outside / "secret").write_bytes(b"of somebody else")
        (self.outside / "folder").mkdir()
        (self.outside / "folder" / "file").write_bytes(b"of somebody else")
        store = open_store(str(self.root))
        self.dataset = self._put(store, "dataset", {"rows.jsonl": b"{}\n"}, {})
        made = {"stage": "sft", "version": 1, "config": {}, "inputs": {"dataset": self.dataset.digest}}
        self.model = self._put(store, "model", {"config.json": b"{}", "sub/weights": b"w" * 50}, made)
        store.append_record(Record("sft", FINGERPRINT, made, {"model": self.model}, provenance={"run": "r1"}))
        store.set_alias("team/model", self.model)
        store.write_run("r1", {"run": "r1", "recipe": "small", "state": "ok", "stages": {}})
        checkpoint = self._filled(folder / "checkpoint", {"state": b"s"})
        store.checkpoints(FINGERPRINT).save(7, checkpoint)
        store.shards(FINGERPRINT).save("piece", b"piece")

    def age(self) -> None:
        """Everything but what says that it is of the future is ten days old."""
        # folders may be nested deeper than Python's own functions go
        touch = ["-exec", "touch", "-h", "-d", "10 days ago", "{}", "+"]
        command = ["find", str(self.root), str(self.outside), "!", "-newermt", "tomorrow", *touch]
        subprocess.run(command, check=False, capture_output=True)

    def remove(self) -> None:
        """All of the store, however deep."""
        subprocess.run(["rm", "-rf", str(self.root)], check=True)

    def payload(self, name: str = "sub/weights") -> Path:
        return self.root / self.model.key / "files" / name

    @property
    def manifest(self) -> Path:
        return self.root / self.model.key / "manifest.json"

    @property
    def record(self) -> Path:
        return next((self.root / "index" / "sft" / FINGERPRINT).iterdir())

    @property
    def checkpoint(self) -> Path:
        return next((self.root / "work" / FINGERPRINT / "checkpoints").iterdir())

    def link(self, path: Path, target: str) -> None:
        """In the place of a file or folder, a link to something outside."""
        if path.exists():
            path.rename(self.outside / "moved")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(self.outside / target)

    def _put(self, store: Store, kind: str, files: dict[str, bytes], producer: dict[str, Any]) -> Artifact:
        return store.put(kind, self._filled(self.outside.parent / kind, files), producer=producer)

    @staticmethod
    def _filled(folder: Path, files: dict[str, bytes]) -> Path:
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        return folder


def resealed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A sealed file with other content, sealed again: a seal keeps out damage, and nobody who means harm."""
    value = json.loads(path.read_text())
    value.pop("seal")
    change(value)
    _write(path, seal(value))


def _write(path: Path, data: bytes) -> None:
    if path.exists() or path.is_symlink():
        path.unlink()
    path.write_bytes(data)


def manifest(**values: Any) -> Spoil:
    """Other values in the model's manifest."""
    return lambda hostile: resealed(hostile.manifest, lambda value: value.update(values))


def first_file(**values: Any) -> Spoil:
    """Other values of the first file of the model's manifest."""
    return lambda hostile: resealed(hostile.manifest, lambda value: value["files"][0].update(values))


def record(**values: Any) -> Spoil:
    return lambda hostile: resealed(hostile.record, lambda value: value.update(values))


def raw(where: str, data: bytes) -> Spoil:
    """A file of the hostile store (an attribute of it) with just these bytes."""
    return lambda hostile: _write(getattr(hostile, where), data)


def linked(place: str, target: str) -> Spoil:
    """A link in a place of the store; `{model}` is the model's key."""
    return lambda hostile: hostile.link(hostile.root / place.format(model=hostile.model.key), target)


def special(make: Callable[[Path], object], where: str = "payload") -> Spoil:
    def spoil(hostile: Hostile) -> None:
        path = hostile.payload() if where == "payload" else hostile.manifest
        path.unlink()
        make(path)

    return spoil


def make_socket(path: Path) -> None:
    # its path may have 108 bytes at most
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def make_huge(path: Path) -> None:
    """A file of a terabyte that takes no room."""
    with open(path, "wb") as file:
        file.truncate(2**40)


def extra(name: str) -> Spoil:
    return lambda hostile: hostile.payload(name).write_bytes(b"import os; os.mkdir('ran')") and None


def deep_folders(hostile: Hostile) -> None:
    before = os.getcwd()
    os.chdir(hostile.payload("sub"))
    try:
        for _ in range(40):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
        Path("file").write_bytes(b"")
    finally:
        os.chdir(before)


def whole(hostile: Hostile, files: dict[str, bytes], producer: Any = None) -> Artifact:
    """An artifact that is all right by its digests, of whatever files."""
    entries = tuple(FileEntry(path, len(data), sha256_bytes(data)) for path, data in sorted(files.items()))
    made = Artifact("model", digest_of(entries))
    hostile._filled(hostile.root / made.key / "files", files)
    (hostile.root / made.key / "manifest.json").write_bytes(Manifest("model", entries, producer or {}).to_bytes())
    return made


def a_pickle(hostile: Hostile) -> None:
    whole(hostile, {"config.json": b"{}", "pytorch_model.bin": pickle.dumps(Payload())})


def made_from_each_other(hostile: Hostile) -> None:
    """Thirty artifacts of which each was made twice from the one before: a tree of a billion."""
    before = hostile.model.digest
    for number in range(30):
        inputs = {"model": before, "teacher": before}
        made = whole(hostile, {"n": str(number).encode()}, {"stage": "sft", "inputs": inputs})
        before = made.digest
    resealed(hostile.root / "aliases" / "team" / "model.json", lambda value: value.update(made.to_json()))


def alias(name: str, /, **values: Any) -> Spoil:
    def spoil(hostile: Hostile) -> None:
        path = hostile.root / "aliases" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(seal({"name": name, **hostile.model.to_json(), **values}))

    return spoil


def run(name: str, /, **values: Any) -> Spoil:
    return lambda hostile: (hostile.root / "runs" / f"{name}.json").write_bytes(seal(values)) and None


def claim(**values: Any) -> Spoil:
    def spoil(hostile: Hostile) -> None:
        (hostile.root / "claims").mkdir()
        (hostile.root / "claims" / "c.json").write_bytes(seal(values))

    return spoil


def lease_for_ever(hostile: Hostile) -> None:
    """Of whoever collects garbage, and of the model's work, as if written tomorrow and good for a thousand years."""
    body = {"owner": "x", "nonce": "y", "number": 10**300, "ttl_seconds": 1e11, "process": "elsewhere-1-1"}
    for fingerprint in (SWEEPER, FINGERPRINT):
        path = hostile.root / "work" / fingerprint / "lease.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(seal({**body, "free": False, "written": "z"}))
        os.utime(path, (time.time() + 3650 * DAY,) * 2)


def marker(**values: Any) -> Spoil:
    return lambda hostile: resealed(hostile.checkpoint / "DONE.json", lambda value: value.update(values))


def sub_link_in_tmp(hostile: Hostile) -> None:
    (hostile.root / "tmp" / "left").symlink_to(hostile.outside / "folder")
