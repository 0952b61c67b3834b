"""What a cache counts is what it holds, and its limit keeps, however many copies there are, whoever is killed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from artifacts import Artifact, Store, holds, open_store
from artifacts import cache as copies
from tests.waiting import LIMIT_SECONDS

SIZE = 20_000
COPIES = 1000
HANDLES = 64
USER = """
import os, resource, sys
from pathlib import Path
from artifacts import Store
from artifacts.remote import RemoteFiles
from tests.campaigns.objects import Objects
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
objects = Objects()
store = Store(RemoteFiles("memory://many", "/many", lambda: objects), Path(os.environ["POSTTRAIN_CACHE"]))
made = Path(sys.argv[1]) / "made"
for number in range(int(sys.argv[3])):
    made.mkdir()
    (made / "a").write_bytes(number.to_bytes(4, "big"))
    store.materialize(store.put("model", made, producer={}))
    (made / "a").unlink()
    made.rmdir()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def remote_store(tmp_path: Path) -> Store:
    return open_store(f"memory://{tmp_path.name}")


@pytest.fixture(autouse=True)
def end():
    yield
    forget()


def forget() -> None:
    """This process uses nothing any more, as if it had ended."""
    for descriptor in holds._held.values():
        os.close(descriptor)
    holds._held.clear()


def put(store: Store, fill, numbers) -> list[Artifact]:
    """Two files each, of SIZE bytes together."""
    half = SIZE // 2
    return [
        store.put("model", fill({"a": bytes([number]) * half, "b/c": b"!" * half}), producer={}) for number in numbers
    ]


def there(cache: Path) -> list[str]:
    return sorted(copy.key for copy in copies.copies(cache))


def set_limit(monkeypatch, number: float) -> None:
    monkeypatch.setenv(copies.VARIABLE, str(number * SIZE / 1e9))


def bytes_in(folder: Path) -> int:
    """Of every file there is, finished or not."""
    return sum((Path(at) / name).lstat().st_size for at, _, names in os.walk(folder) for name in names)


def test_a_thousand_copies_in_use_take_one_handle_and_stay_until_their_user_is_killed(tmp_path, cache, monkeypatch):
    command = [sys.executable, "-c", USER, str(tmp_path), str(HANDLES), str(COPIES)]
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    user = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert user.stdout is not None and user.stdout.readline() == "ready\n"
    assert len(os.listdir(f"/proc/{user.pid}/fd")) < 10
    set_limit(monkeypatch, 1e-6)
    copies.make_room(cache)
    assert len(there(cache)) == COPIES
    user.send_signal(signal.SIGKILL)
    user.wait()
    copies.make_room(cache)
    assert there(cache) == []
    assert [path.name for path in (cache / copies.USES).iterdir() if "=" in path.name] == []
    user.communicate()


def test_far_from_the_limit_a_fetch_looks_at_no_file_of_other_copies(remote_store, fill, cache, monkeypatch):
    first, second = put(remote_store, fill, range(2))
    remote_store.materialize(first)
    monkeypatch.setattr(copies, "copies", lambda cache: pytest.fail("walked"))
    monkeypatch.setattr(copies, "_used", lambda cache, copy: pytest.fail("looked at its time"))
    listed: list[Path] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": listed.append(Path(path)) or scandir(path))
    folder = remote_store.materialize(second)
    other = cache / first.key
    assert (folder / "b/c").exists() and not any(path.is_relative_to(other) for path in listed)


def test_copies_of_the_old_layout_count_and_go_by_their_time(remote_store, fill, cache, monkeypatch):
    made = put(remote_store, fill, range(4))
    for artifact in made:
        remote_store.materialize(artifact)
    forget()
    shutil.rmtree(cache / copies.USES)
    (cache / copies.USES).mkdir()
    # as it was: one file a copy, without a size; the third was used first, the fourth is not known to have been used
    for turn, number in enumerate((2, 0, 1), 100):
        use = cache / copies.USES / made[number].key.replace("/", "+")
        use.touch()
        os.utime(use, (turn, turn))
    left = cache / "artifacts/model" / f".new-{_dead_owner()}-0123456789ab"
    left.mkdir()
    order = [made[number].key for number in (3, 2, 0, 1)]
    new = put(remote_store, fill, [9])[0]
    for room in (4, 3, 2, 1):
        set_limit(monkeypatch, room + 0.5)
        remote_store.materialize(new)
        copies.make_room(cache)
        assert there(cache) == sorted([new.key, *order[5 - room :]])
    assert not left.exists()


def _dead_owner() -> str:
    code = "from artifacts.owner import owner_tag; print(owner_tag())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_a_user_who_deletes_what_is_noted_or_the_copies_does_no_harm(remote_store, fill, cache, monkeypatch):
    made = put(remote_store, fill, range(3))
    set_limit(monkeypatch, 2.5)
    for gone in (copies.USES, f"{copies.USES}/{holds.LOCK}", "artifacts", f"artifacts/model/{made[2].digest}", "."):
        for artifact in made:
            remote_store.materialize(artifact)
            forget()
        shutil.rmtree(cache / gone) if (cache / gone).is_dir() else (cache / gone).unlink()
        for number in (0, 1, 2):
            folder = remote_store.materialize(made[number])
            assert (folder / "a").read_bytes() == bytes([number]) * (SIZE // 2)
            forget()
        assert made[2].key in there(cache) and bytes_in(cache) <= 2.5 * SIZE, gone


def test_what_the_dead_left_aside_goes_before_the_same_is_fetched_again(remote_store, fill, cache):
    artifact, other = put(remote_store, fill, range(2))
    remote_store.materialize(other)
    dead = cache / copies.ASIDE / f"{artifact.key.replace('/', '+')}={_dead_owner()}-0123456789ab"
    mine, others = (
        copies.aside(cache, artifact.key),
        cache / copies.ASIDE / dead.name.replace(artifact.digest, "0" * 64),
    )
    for folder in (dead, mine, others):
        folder.mkdir()
        (folder / "a").write_bytes(b"half of it")
    remote_store.materialize(artifact)
    assert sorted((cache / copies.ASIDE).iterdir()) == sorted([mine, others])


def test_room_is_made_by_one_after_the_other_and_by_the_next_where_one_is_stopped(
    remote_store, fill, cache, monkeypatch
):
    for artifact in put(remote_store, fill, range(3)):
        remote_store.materialize(artifact)
    forget()
    set_limit(monkeypatch, 2.5)
    with holds.alone(cache, copies.ROOM) as free:
        assert free
        waits = threading.Thread(target=copies.make_room, args=(cache,))
        waits.start()
        waits.join(0.2)
        assert waits.is_alive() and len(there(cache)) == 3
    waits.join(LIMIT_SECONDS)
    assert len(there(cache)) == 2
    set_limit(monkeypatch, 1.5)
    monkeypatch.setattr(copies, "PATIENCE_SECONDS", 0.1)
    with holds.alone(cache, copies.ROOM):
        copies.make_room(cache)
    assert len(there(cache)) == 1


class Workers:
    """Processes that use two copies of four of their own at a time, for ever; `artifacts[worker]` are its four."""

    def __init__(self, store: Store, artifacts: list[list[Artifact]], wrong: Path) -> None:
        self.store, self.artifacts, self.wrong = store, artifacts, wrong
        self.processes = [self._start(worker) for worker in range(len(artifacts))]

    def _start(self, worker: int) -> int:
        child = os.fork()
        if child == 0:
            try:
                self._work(worker)
            except BaseException as error:
                self.wrong.write_text(f"worker {worker}: {error!r}")
            os._exit(1)
        return child

    def _work(self, worker: int) -> None:
        draws = random.Random(os.getpid())
        while True:
            forget()
            folders = [self.store.materialize(one) for one in draws.sample(self.artifacts[worker], 2)]
            for folder in folders:
                assert bytes_in(folder) == SIZE, "what is in use has gone"

    def stopped(self) -> None:
        """All of them stand still when this returns."""
        for process in self.processes:
            os.kill(process, signal.SIGSTOP)
        for process in self.processes:
            _, status = os.waitpid(process, os.WUNTRACED)
            assert os.WIFSTOPPED(status), self.wrong.read_text()

    def go_on(self) -> None:
        for process in self.processes:
            os.kill(process, signal.SIGCONT)

    def kill(self, worker: int) -> None:
        os.kill(self.processes[worker], signal.SIGKILL)
        os.waitpid(self.processes[worker], 0)

    def replace(self, worker: int) -> None:
        self.kill(worker)
        self.processes[worker] = self._start(worker)


def test_whoever_is_killed_when_no_byte_too_many_is_there_and_nothing_in_use_goes(
    remote_store, fill, cache, tmp_path, monkeypatch
):
    """Six workers use up to twelve copies of twenty-four; the limit is thirteen. All are stopped again and
    again, what lies there is counted byte by byte, and one of them is killed wherever it is."""
    made = put(remote_store, fill, range(24))
    set_limit(monkeypatch, 13.001)
    draws = random.Random(7)
    workers = Workers(remote_store, [made[first : first + 4] for first in range(0, 24, 4)], tmp_path / "wrong")
    rounds_when_full = 0
    try:
        while rounds_when_full < 40:
            time.sleep(draws.random() * 0.03)
            workers.stopped()
            found = bytes_in(cache)
            assert found <= 13 * SIZE
            rounds_when_full += found > 10 * SIZE
            workers.go_on()
            if rounds_when_full % 2:
                workers.replace(draws.randrange(6))
    finally:
        for worker in range(6):
            workers.kill(worker)
    assert not (tmp_path / "wrong").exists()
    set_limit(monkeypatch, 0.5)
    copies.make_room(cache)
    # nothing is left of the dead, half-fetched or half-deleted
    assert bytes_in(cache) == 0
