"""Names are held by processes until they end, with one handle for all names, whatever ends the processes."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from artifacts import holds
from artifacts.holds import FILES, alone, hold
from tests.waiting import LIMIT_SECONDS

HOLDER = """
import os, sys
from pathlib import Path
from artifacts import holds
holds.BYTES_CAN_BE_LOCKED = sys.argv[2] == "True"
for number in range(int(sys.argv[3])):
    holds.hold(Path(sys.argv[1]), f"name {number}")
print(len(os.listdir("/proc/self/fd")), flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=[True, False], ids=["bytes", "whole files"], autouse=True)
def way(request, monkeypatch) -> bool:
    """Both ways of locking; the second is that of systems that cannot lock a byte for an open file."""
    monkeypatch.setattr(holds, "BYTES_CAN_BE_LOCKED", request.param)
    return request.param


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """What a test holds ends with it."""
    mine: dict[Path, int] = {}
    monkeypatch.setattr(holds, "_held", mine)
    yield mine
    for descriptor in mine.values():
        os.close(descriptor)


def is_free(folder: Path, name: str) -> bool:
    with alone(folder, name) as free:
        return free


def test_what_a_process_holds_is_free_once_it_is_killed_and_takes_few_handles(tmp_path, way):
    command = [sys.executable, "-c", HOLDER, str(tmp_path), str(way), "500"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    # its three streams, the listing itself, and the lock files
    assert int(other.stdout.readline()) == 4 + (1 if way else FILES)
    assert not any(is_free(tmp_path, f"name {number}") for number in range(500))
    assert is_free(tmp_path, "another") is way
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert all(is_free(tmp_path, f"name {number}") for number in range(500))
    other.communicate()


def test_a_process_keeps_what_it_holds_from_itself_too(tmp_path):
    hold(tmp_path, "a")
    hold(tmp_path, "a")
    assert not is_free(tmp_path, "a") and is_free(tmp_path, "c")
    with alone(tmp_path, "c") as free:
        assert free and not is_free(tmp_path, "c")
    assert is_free(tmp_path, "c") and not is_free(tmp_path, "a")


def test_threads_share_the_handles(tmp_path, fresh, way):
    def work(first: int) -> None:
        for number in range(first, first + 100):
            hold(tmp_path, str(number))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(0, 800, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(is_free(tmp_path, str(number)) for number in range(800))
    assert len(fresh) == (1 if way else FILES)


def test_what_a_parent_holds_stays_while_its_child_lives_and_what_the_child_holds_ends_with_it(tmp_path, fresh):
    hold(tmp_path, "the parent's")
    child, orders = _child(lambda: hold(tmp_path, "the child's"))
    assert not is_free(tmp_path, "the child's")
    for path in list(fresh):
        os.close(fresh.pop(path))
    assert not is_free(tmp_path, "the parent's")
    os.close(orders)
    os.waitpid(child, 0)
    assert is_free(tmp_path, "the parent's") and is_free(tmp_path, "the child's")


def _child(act) -> tuple[int, int]:
    """A child that has acted, and what to close so that it ends."""
    done, says = os.pipe()
    listens, orders = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(orders)
        try:
            act()
            os.write(says, b".")
            os.read(listens, 1)
        finally:
            os._exit(0)
    os.close(listens)
    assert os.read(done, 1) == b"."
    return child, orders


def test_who_wants_to_hold_a_name_waits_for_who_is_alone_with_it(tmp_path):
    done = tmp_path / "done"
    seen: list[bool] = []

    def wait_and_look() -> None:
        hold(tmp_path, "a")
        seen.append(done.exists())

    with alone(tmp_path, "a") as free:
        assert free
        thread = threading.Thread(target=wait_and_look)
        thread.start()
        thread.join(0.1)
        assert seen == []
        done.touch()
    thread.join(LIMIT_SECONDS)
    assert seen == [True]


def handles_in(folder: Path) -> int:
    """Of this process; others come and go with threads and garbage of other tests."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{name}").startswith(f"{folder}/")
    return found


def test_a_lock_file_that_was_deleted_is_made_anew(tmp_path, fresh):
    for number in range(50):
        hold(tmp_path, "a")
        assert not is_free(tmp_path, "a")
        for path in tmp_path.iterdir():
            path.rename(tmp_path / "moved") if number % 2 else path.unlink()
    hold(tmp_path, "c")
    # what was held in the file that is gone went with it
    assert is_free(tmp_path, "a")
    assert not is_free(tmp_path, "c")
    assert handles_in(tmp_path) == len(fresh) > 0
