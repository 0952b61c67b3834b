"""The local copies of a remote store's artifacts: bounded, by last use, shared, and never the one in use."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from artifacts import Artifact, DamagedError, RequestError, Store, holds, open_store, remote
from artifacts import cache as copies
from artifacts.remote import RemoteFiles
from tests.waiting import LIMIT_SECONDS

SIZE = 100_000


@pytest.fixture
def remote_store(tmp_path: Path) -> Store:
    return open_store(f"memory://{tmp_path.name}")


@pytest.fixture
def made(remote_store, fill):
    return [remote_store.put("model", fill({"a": bytes([number]) * SIZE}), producer={}) for number in range(4)]


def forget() -> None:
    """This process uses nothing any more, as if it had ended."""
    for descriptor in holds._held.values():
        os.close(descriptor)
    holds._held.clear()


def copy_of(artifact: Artifact) -> copies.Copy:
    return copies.Copy(artifact.key, SIZE)


def held(folder: Path) -> list[str]:
    return sorted(copy.key for copy in copies.copies(folder))


def set_limit(monkeypatch, number: float) -> None:
    monkeypatch.setenv(copies.VARIABLE, str(number * SIZE / 1e9))


def test_what_was_used_longest_ago_makes_room(remote_store, made, cache: Path, monkeypatch):
    set_limit(monkeypatch, 2.5)
    used: list[str] = []
    for turn, number in enumerate((0, 1, 0, 2, 3, 0)):
        artifact = made[number]
        assert (remote_store.materialize(artifact) / "a").read_bytes() == bytes([number]) * SIZE
        os.utime(copies.use_file(cache, copy_of(artifact)), (turn, turn))
        used = [key for key in used if key != artifact.key] + [artifact.key]
        forget()
        # an independent model: the last two used
        assert held(cache) == sorted(used[-2:])


def test_what_is_in_use_stays_whatever_the_limit(remote_store, made, cache: Path, monkeypatch, caplog):
    set_limit(monkeypatch, 1.5)
    folders = [remote_store.materialize(artifact) for artifact in made]
    assert all((folder / "a").stat().st_size == SIZE for folder in folders)
    assert "all that is in it is in use" in caplog.text
    forget()
    remote_store.materialize(made[0])
    set_limit(monkeypatch, 1.5)
    copies.make_room(cache)
    assert held(cache) == [made[0].key]


def test_another_process_keeps_what_it_uses(remote_store, made, cache: Path, monkeypatch):
    set_limit(monkeypatch, 1.5)
    remote_store.materialize(made[0])
    forget()
    code = (
        "import sys; from pathlib import Path; from artifacts import cache; "
        f"cache.use(Path({str(cache)!r}), cache.Copy({made[0].key!r}, {SIZE})); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "ready\n"
    remote_store.materialize(made[1])
    assert held(cache) == sorted([made[0].key, made[1].key])
    other.communicate()
    remote_store.materialize(made[2])
    assert made[0].key not in held(cache)


def test_a_copy_is_checked_whenever_it_is_used(remote_store, made, cache: Path):
    file = remote_store.materialize(made[0]) / "a"
    file.chmod(0o644)
    file.write_bytes(b"\1" + bytes(SIZE - 1))
    assert (remote_store.materialize(made[0]) / "a").read_bytes() == bytes(SIZE)
    shutil.rmtree(file.parent)
    remote_store.files.write(f"{made[0].key}/files/a", b"\1" + bytes(SIZE - 1))
    with pytest.raises(DamagedError):
        remote_store.materialize(made[0])


def test_many_processes_share_a_cache_that_is_too_small(remote_store, made, cache: Path, monkeypatch):
    set_limit(monkeypatch, 1.5)

    def work(seed: int) -> None:
        for turn in range(15):
            number = (seed * 7 + turn * 5) % len(made)
            folder = remote_store.materialize(made[number])
            assert (folder / "a").read_bytes() == bytes([number]) * SIZE
            forget()

    children = []
    for seed in range(5):
        child = os.fork()
        if child == 0:
            try:
                work(seed)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)
    copies.make_room(cache)
    assert len(held(cache)) <= 1


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan"])
def test_a_limit_is_a_number_above_0(text, remote_store, made, monkeypatch):
    monkeypatch.setenv(copies.VARIABLE, text)
    with pytest.raises(RequestError, match="POSTTRAIN_CACHE_GB is the size of the cache in GB"):
        remote_store.materialize(made[0])


class Meeting(MemoryFileSystem):
    """Pieces of a file arrive when so many were asked for at once."""

    def __init__(self, pieces: int) -> None:
        super().__init__(skip_instance_cache=True)
        self.barrier = threading.Barrier(pieces)

    def cat_file(self, path, start=None, end=None, **options):
        if start is not None:
            self.barrier.wait(LIMIT_SECONDS)
        return super().cat_file(path, start=start, end=end, **options)


def test_pieces_of_a_large_file_come_side_by_side_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PIECE", 1000)
    content = bytes(range(256)) * 31  # 8 pieces of 1000, the last one shorter
    meeting = Meeting(remote.AHEAD)
    files = RemoteFiles(f"memory://{tmp_path.name}", f"/{tmp_path.name}", lambda: meeting)
    meeting.pipe_file(files.path("x"), content)
    pieces = list(files.stream("x", len(content)))
    assert b"".join(pieces) == content and [len(piece) for piece in pieces] == [1000] * 7 + [936]
    assert list(files.stream("x", 0)) == []
