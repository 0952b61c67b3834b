"""One works, the others wait; a holder that died or went silent loses its lease. No test waits: the store's
ages and the holder's clock are turned by hand."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from artifacts import RequestError, open_store, seal, unseal
from artifacts.leases import Lease
from artifacts.locks import exclusively
from artifacts.owner import is_dead, owner_tag
from tests.waiting import LIMIT_SECONDS

FINGERPRINT = "ab" * 32
KEY = f"work/{FINGERPRINT}/lease.json"


@pytest.fixture
def aged(store, monkeypatch):
    """`aged[0] = seconds` makes every lease that old, by the store's clock."""
    extra = [0.0]
    real = store.files.age
    monkeypatch.setattr(store.files, "age", lambda key: None if real(key) is None else real(key) + extra[0])
    return extra


def elsewhere(store):
    """Moves the holder to another machine, where nobody can see whether it lives."""
    body = unseal(store.files.read(KEY), "")
    store.files.write(KEY, seal({**body, "process": "othermachine-1-1"}))


def test_one_holds_and_gives_back(store):
    one, two = store.lease(FINGERPRINT, "one"), store.lease(FINGERPRINT, "two")
    assert one.holder() is None and not one.held and not one.renew()
    assert one.acquire() and one.held and not two.acquire() and not two.held
    assert two.holder()["owner"] == "one" and one.acquire() and one.renew()
    one.release()
    assert not one.held and two.holder() is None
    assert two.acquire() and two.holder()["owner"] == "two"
    # the number only grows, so that an old holder can be told from the present one
    assert two.holder()["number"] > 1
    one.release()
    assert one.holder()["owner"] == "two"


def test_a_silent_holder_loses_it_after_its_time_and_not_before(store, aged):
    one, two = store.lease(FINGERPRINT, "one", 60), store.lease(FINGERPRINT, "two", 60)
    assert one.acquire()
    aged[0] = 59.0
    assert not two.acquire() and two.holder()["owner"] == "one"
    aged[0] = 67.0
    assert two.holder() is None and two.acquire()
    aged[0] = 0.0
    # the one that wakes up notices at its next renewal
    assert not one.renew() and not one.held and not one.acquire()
    one.release()
    assert two.renew() and two.holder()["owner"] == "two"


def test_a_holder_counts_itself_out_before_others_may_take_it(store):
    now = [1000.0]
    lease = Lease(store.files, FINGERPRINT, "one", 60, clock=lambda: now[0])
    assert lease.acquire() and lease.renew_every == 10
    now[0] += 44.9
    assert lease.held
    now[0] += 0.2
    assert not lease.held
    assert lease.renew() and lease.held


def test_a_dead_holder_on_this_machine_is_noticed_at_once(tmp_path):
    url = str(tmp_path / "store")
    code = (
        f"from artifacts import open_store; import os; "
        f"assert open_store({url!r}).lease({FINGERPRINT!r}, 'dead', 3600).acquire(); os._exit(9)"
    )
    store = open_store(url)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert store.files.read(KEY)
    lease = store.lease(FINGERPRINT, "next")
    assert lease.holder() is None and lease.acquire() and lease.holder()["number"] == 2


def test_a_holder_elsewhere_is_waited_for(store, aged):
    one, two = store.lease(FINGERPRINT, "one"), store.lease(FINGERPRINT, "two")
    assert one.acquire()
    elsewhere(store)
    assert not two.acquire()
    aged[0] = 100.0
    assert two.acquire()


def test_a_damaged_lease_binds_nobody(store):
    for body in (b"", b"{}", b"not json", seal({"owner": "x"}), seal({"number": "7"})):
        store.files.write(KEY, body)
        lease = store.lease(FINGERPRINT, "one")
        assert lease.holder() is None and lease.acquire() and lease.holder()["owner"] == "one"


def test_of_many_that_want_it_at_once_one_gets_it(store):
    for start in ("free", "expired"):
        leases = [store.lease(FINGERPRINT, str(index)) for index in range(6)]
        if start == "expired":
            store.files.write(KEY, b"damaged")
        ready = threading.Barrier(len(leases))
        got = []

        def want(lease, ready=ready, got=got):
            ready.wait()
            if lease.acquire():
                got.append(lease)

        threads = [threading.Thread(target=want, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1 and got[0].held
        got[0].release()


def test_processes_are_told_apart():
    tag = owner_tag()
    assert not is_dead(tag)
    machine, pid, start = tag.split("-")
    assert is_dead(f"{machine}-{pid}-{int(start) - 1}"), "another process had this id before"
    assert not is_dead(f"elsewhere-{pid}-1") and not is_dead("") and not is_dead("a-b-c")
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    started = subprocess.run(["cat", f"/proc/{child}/stat"], capture_output=True, text=True, check=True).stdout
    ticks = started.rsplit(")", 1)[1].split()[19]
    assert is_dead(f"{machine}-{child}-{ticks}"), "a zombie writes nothing any more"
    os.waitpid(child, 0)
    assert is_dead(f"{machine}-{child}-{ticks}")


def test_a_lease_needs_a_fingerprint_and_time(store):
    with pytest.raises(RequestError):
        store.lease("x", "one")
    with pytest.raises(RequestError):
        store.lease(FINGERPRINT, "one", 0)


def test_a_process_that_is_stopped_in_the_lock_holds_nobody_up(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import os, signal; from pathlib import Path; from artifacts.locks import exclusively\n"
        f"with exclusively(Path({str(path)!r})):\n"
        "    print('in', flush=True); os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    stopped = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert stopped.stdout is not None and stopped.stdout.readline() == "in\n"
        with exclusively(path, patience_seconds=0.1):
            inside = []
            others = [threading.Thread(target=lambda: _enter(path, inside)) for _ in range(3)]
            for other in others:
                other.start()
            time.sleep(0.05)
            assert inside == [], "the new lock holds the others, and the old one nobody"
        for other in others:
            other.join()
        assert len(inside) == 3
    finally:
        stopped.send_signal(signal.SIGCONT)
        assert stopped.wait(LIMIT_SECONDS) == 0


def _enter(path, inside):
    with exclusively(path):
        inside.append(1)
