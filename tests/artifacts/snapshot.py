"""What a power cut may leave: a disk that records its steps, the states they allow, and a store on such a state.

The model: contents of a file reach the disk in any order until its fsync, names in a folder in any order until
the folder's fsync, and a rename is a new name and a lost name that may be kept or lost each on its own.
Stricter than ext4, as POSIX is.
"""

import itertools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from artifacts.disk import Disk
from artifacts.files import Stored

BLOCK = 4096
ROOT = 0


class RecordingDisk(Disk):
    """A real disk that writes down every step with the identities of files and folders."""

    def __init__(self, root: Path) -> None:
        self.steps: list[tuple] = []
        self.syncs = True
        self._ids = {os.stat(root).st_ino: ROOT}
        self._next = 1

    def adopt(self, folder: Path, synced: bool) -> None:
        """Files that another program wrote there."""
        for path in (folder, *sorted(folder.rglob("*"))):
            if path.stat().st_ino in self._ids:
                continue
            self._log("link", self._id(path.parent), path.name, self._new(path), path.is_dir())
            if path.is_file():
                self._log("write", self._id(path), path.read_bytes())
            if synced:
                self._log("fsync", self._id(path))
                self._log("fsync_folder", self._id(path.parent))

    def mark(self, text: str) -> None:
        """From here on, `text` has been promised."""
        self._log("mark", text)

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self._log("link", self._id(path.parent), path.name, self._new(path), True)

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._log("link", self._id(path.parent), path.name, self._new(path), False)
        return descriptor

    def write(self, descriptor: int, data: bytes) -> None:
        super().write(descriptor, data)
        self._log("write", self._ids[os.fstat(descriptor).st_ino], bytes(data))

    def fsync(self, descriptor: int) -> None:
        self._log("fsync", self._ids[os.fstat(descriptor).st_ino])

    def fsync_folder(self, path: Path) -> None:
        self._log("fsync_folder", self._id(path))

    def rename(self, old: Path, new: Path) -> None:
        moved, is_folder = self._id(old), old.is_dir()
        super().rename(old, new)
        self._log("link", self._id(new.parent), new.name, moved, is_folder)
        self._log("unlink", self._id(old.parent), old.name)

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._log("unlink", self._id(path.parent), path.name)

    def _log(self, *step: object) -> None:
        self.steps.append(step)

    def _id(self, path: Path) -> int:
        return self._ids[os.lstat(path).st_ino]

    def _new(self, path: Path) -> int:
        self._ids[os.lstat(path).st_ino] = self._next
        self._next += 1
        return self._next - 1


@dataclass
class _Effect:
    """One thing that is on the disk or not: a name, a lost name, a block, or a length."""

    kind: str
    owner: int
    value: tuple
    sure: bool = False


@dataclass
class _History:
    effects: list[_Effect] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)

    def add(self, step: tuple) -> None:
        kind, owner, *rest = step
        if kind in ("link", "unlink"):
            self.effects.append(_Effect(kind, owner, tuple(rest)))
        elif kind == "write":
            start = self.lengths.get(owner, 0)
            data = rest[0]
            for offset in range(0, len(data), BLOCK):
                piece = data[offset : offset + BLOCK]
                self.effects.append(_Effect("block", owner, (start + offset, piece)))
            self.lengths[owner] = start + len(data)
            self.effects.append(_Effect("length", owner, (start + len(data),)))
        else:
            kinds = ("block", "length") if kind == "fsync" else ("link", "unlink")
            for effect in self.effects:
                if effect.owner == owner and effect.kind in kinds:
                    effect.sure = True


def states(steps: list[tuple], samples: int, seed: int) -> Iterator[tuple[set[str], dict[str, bytes]]]:
    """(what was promised, path -> content) of every state looked at: after each step, all subsets of what was
    not sure yet where there are few, else none, all, all but one, only one and `samples` random ones."""
    rng = random.Random(seed)
    history, promised = _History(), set()
    for step in (None, *steps):
        if step is not None and step[0] == "mark":
            promised.add(step[1])
            continue
        if step is not None:
            history.add(step)
        unsure = [index for index, effect in enumerate(history.effects) if not effect.sure]
        for kept in _subsets(len(unsure), samples, rng):
            lost = {index for index, keep in zip(unsure, kept, strict=True) if not keep}
            effects = [effect for index, effect in enumerate(history.effects) if index not in lost]
            yield set(promised), _content(effects)


def _subsets(count: int, samples: int, rng: random.Random) -> Iterator[tuple[bool, ...]]:
    if count <= 5:
        yield from itertools.product((False, True), repeat=count)
        return
    yield (False,) * count
    yield (True,) * count
    for index in range(count):
        yield tuple(other == index for other in range(count))
        yield tuple(other != index for other in range(count))
    for _ in range(samples):
        yield tuple(rng.random() < 0.5 for _ in range(count))


def _content(effects: list[_Effect]) -> dict[str, bytes]:
    names: dict[int, dict[str, tuple[int, bool]]] = {}
    lengths: dict[int, int] = {}
    blocks: dict[int, list[tuple[int, bytes]]] = {}
    for effect in effects:
        if effect.kind == "link":
            name, child, is_folder = effect.value
            names.setdefault(effect.owner, {})[name] = (child, is_folder)
        elif effect.kind == "unlink":
            names.setdefault(effect.owner, {}).pop(effect.value[0], None)
        elif effect.kind == "length":
            lengths[effect.owner] = effect.value[0]
        else:
            blocks.setdefault(effect.owner, []).append(effect.value)
    found: dict[str, bytes] = {}

    def descend(folder: int, prefix: str) -> None:
        for name, (child, is_folder) in names.get(folder, {}).items():
            if is_folder:
                descend(child, f"{prefix}{name}/")
                continue
            data = bytearray(lengths.get(child, 0))
            for offset, piece in blocks.get(child, []):
                piece = piece[: max(0, len(data) - offset)]
                data[offset : offset + len(piece)] = piece
            found[prefix + name] = bytes(data)

    descend(ROOT, "")
    return found


class SnapshotFiles:
    """The reading half of the Files protocol on a state."""

    url = "snapshot"
    local_root = None

    def __init__(self, content: dict[str, bytes]) -> None:
        self.content = content

    def read(self, key: str) -> bytes:
        if key not in self.content:
            raise FileNotFoundError(key)
        return self.content[key]

    def children(self, key: str) -> list[str]:
        prefix = f"{key}/"
        return sorted({p[len(prefix) :].split("/")[0] for p in self.content if p.startswith(prefix)})

    def tree(self, key: str) -> dict[str, Stored]:
        prefix = f"{key}/"
        return {
            path[len(prefix) :]: Stored(len(data), 0.0)
            for path, data in self.content.items()
            if path.startswith(prefix)
        }

    def stream(self, key: str, size: int) -> Iterator[bytes]:
        yield self.read(key)


Mutant = Callable[[list[tuple]], list[tuple]]


def without(*kinds: str) -> Mutant:
    """A protocol that forgets some kinds of steps."""
    return lambda steps: [step for step in steps if step[0] not in kinds]
