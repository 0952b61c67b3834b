"""What a power cut may leave: a disk that records its steps, the states they allow, and a store on such a state.

The model: contents of a file reach the disk in any order until its fsync, names in a folder in any order until
the folder's fsync, and a rename is a new name and a lost name that may be kept or lost each on its own.
Stricter than ext4, as POSIX is.
"""

import itertools
import operator
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

    def mark(self, promise: object) -> None:
        """From here on, this is what has been promised."""
        self._log("mark", promise)

    def restart(self, root: Path) -> list[tuple]:
        """Everything that lies there counts as being on the disk; gives the steps that put it there."""
        self.__init__(root)
        self.adopt(root, synced=True)
        before, self.steps = self.steps, []
        return before

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
        moved, is_folder, replaced = self._id(old), old.is_dir(), _inode(new)
        super().rename(old, new)
        self._ids.pop(replaced, None)  # the number may come again for another file
        self._log("link", self._id(new.parent), new.name, moved, is_folder)
        self._log("unlink", self._id(old.parent), old.name)

    def unlink(self, path: Path) -> None:
        gone = _inode(path)
        super().unlink(path)
        self._ids.pop(gone, None)
        self._log("unlink", self._id(path.parent), path.name)

    def rmtree(self, path: Path, ignore_errors: bool = False) -> None:
        """What stands for shutil.rmtree while steps are recorded."""
        if not path.is_dir():
            return
        for child in sorted(path.iterdir()):
            if child.is_dir():
                self.rmtree(child)
            else:
                self.unlink(child)
        gone = _inode(path)
        path.rmdir()
        self._ids.pop(gone, None)
        self._log("unlink", self._id(path.parent), path.name)

    def _log(self, *step: object) -> None:
        self.steps.append(step)

    def _id(self, path: Path) -> int:
        return self._ids[os.lstat(path).st_ino]

    def _new(self, path: Path) -> int:
        self._ids[os.lstat(path).st_ino] = self._next
        self._next += 1
        return self._next - 1


def _inode(path: Path) -> int | None:
    try:
        return os.lstat(path).st_ino
    except FileNotFoundError:
        return None


@dataclass
class _Effect:
    """One thing that is on the disk or not: a name, a lost name, a block, or a length."""

    kind: str
    owner: int
    value: tuple
    sure: bool = False


@dataclass
class _History:
    """What happened to every file and folder, and what of it is sure to be on the disk."""

    effects: list[_Effect] = field(default_factory=list)
    of: dict[int, list[int]] = field(default_factory=dict)
    """File or folder -> its effects by number."""
    lengths: dict[int, int] = field(default_factory=dict)
    _known: dict[tuple[int, int, tuple[int, ...]], Any] = field(default_factory=dict)

    def add(self, step: tuple) -> None:
        kind, owner, *rest = step
        if kind in ("link", "unlink"):
            self._add(_Effect(kind, owner, tuple(rest)))
        elif kind == "write":
            start = self.lengths.get(owner, 0)
            data = rest[0]
            for offset in range(0, len(data), BLOCK):
                piece = data[offset : offset + BLOCK]
                self._add(_Effect("block", owner, (start + offset, piece)))
            self.lengths[owner] = start + len(data)
            self._add(_Effect("length", owner, (start + len(data),)))
        else:
            kinds = ("block", "length") if kind == "fsync" else ("link", "unlink")
            for number in self.of.get(owner, ()):
                if self.effects[number].kind in kinds:
                    self.effects[number].sure = True

    def unsure(self) -> list[int]:
        return [number for number, effect in enumerate(self.effects) if not effect.sure]

    def content(self, lost: Iterable[int], hidden: tuple[str, ...]) -> dict[str, bytes]:
        """Path -> content if the effects `lost` are not on the disk; without what begins with a hidden name."""
        missing: dict[int, tuple[int, ...]] = {}
        for number in lost:
            owner = self.effects[number].owner
            missing[owner] = (*missing.get(owner, ()), number)
        found: dict[str, bytes] = {}

        def descend(folder: int, prefix: str) -> None:
            for name, (child, is_folder) in self._once(self._names, folder, missing).items():
                if not prefix and name in hidden:
                    continue
                if is_folder:
                    descend(child, f"{prefix}{name}/")
                else:
                    found[prefix + name] = self._once(self._data, child, missing)

        descend(ROOT, "")
        return found

    def _add(self, effect: _Effect) -> None:
        self.of.setdefault(effect.owner, []).append(len(self.effects))
        self.effects.append(effect)

    def _once(self, of: Callable[[list[_Effect]], Any], owner: int, missing: dict[int, tuple[int, ...]]) -> Any:
        """`of` the effects of a file or folder that are not missing; states share most of them."""
        numbers, lost = self.of.get(owner, []), missing.get(owner, ())
        key = (owner, len(numbers), lost)
        if key not in self._known:
            self._known[key] = of([self.effects[number] for number in numbers if number not in lost])
        return self._known[key]

    @staticmethod
    def _names(effects: list[_Effect]) -> dict[str, tuple[int, bool]]:
        names: dict[str, tuple[int, bool]] = {}
        for effect in effects:
            if effect.kind == "link":
                name, child, is_folder = effect.value
                names[name] = (child, is_folder)
            elif effect.kind == "unlink":
                names.pop(effect.value[0], None)
        return names

    @staticmethod
    def _data(effects: list[_Effect]) -> bytes:
        data = bytearray(next((effect.value[0] for effect in reversed(effects) if effect.kind == "length"), 0))
        for effect in effects:
            if effect.kind == "block":
                offset, piece = effect.value
                piece = piece[: max(0, len(data) - offset)]
                data[offset : offset + len(piece)] = piece
        return bytes(data)


def states(
    steps: list[tuple], samples: int, rng: random.Random, before: Sequence[tuple] = (), hidden: tuple[str, ...] = ()
) -> Iterator[tuple[Any, dict[str, bytes]]]:
    """(the last promise, path -> content) of every state looked at, each once: after each step, all subsets of what
    was not sure yet where there are few, else none, all, all but one, only one and `samples` random ones. `before`:
    steps that have reached the disk; `hidden`: folders that nobody reads."""
    history, promise = _History(), None
    for step in before:
        history.add(step)
    for step in steps:
        if step[0] == "mark":
            promise = step[1]
        else:
            history.add(step)
        unsure = history.unsure()
        for kept in dict.fromkeys(_subsets(len(unsure), samples, rng)):
            yield promise, history.content(itertools.compress(unsure, map(operator.not_, kept)), hidden)


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


class SnapshotFiles:
    """The reading half of the Files protocol on a state."""

    url = place = "snapshot"
    local_root = None

    def __init__(self, content: dict[str, bytes]) -> None:
        self.content = content

    def read(self, key: str, most: int = 0) -> bytes:
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
