"""Programs that try to break out: what they were after is looked at from outside, after each of them."""

import ast
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.rollouts.sandbox.users import MODES, processes_of
from tests.rollouts.sandbox.world import CANARY, ESCAPED

FILES = {path.stem: path.read_text() for path in sorted(Path(__file__).with_name("attacks").glob("*.py"))}
HELPERS = {"made_node", "call", "live_on"}
ATTACKS = [
    (kind, node.name)
    for kind, source in FILES.items()
    for node in ast.parse(source).body
    if isinstance(node, ast.FunctionDef) and node.name not in HELPERS
]
LASTING = [mode for mode in ("root", "ordinary-bare") if MODES[mode].ordinary or os.getuid() == 0]
"""Modes for attacks on time and memory, which differ in what bounds these. They last long, so they run side by side."""
MEMORY_MB = 150
"""More than a driver needs, and less than it would need if it kept what programs send."""


def cases():
    return [
        pytest.param(mode, kind, name, id=f"{mode}-{kind}-{name}")
        for mode in MODES
        for kind, name in ATTACKS
        if kind != "resources"
    ]


def attacked(driver, world, kind, name):
    """What the attack gave back, as text."""
    if name.startswith("printing"):
        return str(driver.output(f"{FILES[kind]}\n{name}(None)"))
    return str(driver.values(FILES[kind], [f"{name}({world.targets!r})"]))


def escapes(driver, world, answer):
    """Everything that shows that a program got out."""
    found = world.changes()
    found += [answer[:300]] if any(sign in answer for sign in (CANARY, CANARY.encode().hex(), ESCAPED)) else []
    # the fork server, and where there are namespaces the process that stands by it
    expected = 1 if driver.no_namespaces else 2
    found += [f"processes {left}" for left in [processes_of(driver.folder)] if len(left) != expected]
    # in namespaces the files are in memory that only they see
    found += [f"left in its folder: {left}" for left in [list(Path(driver.folder).iterdir())] if left]
    resident = int(Path(f"/proc/{driver.process.pid}/statm").read_text().split()[1]) * 4096
    found += [f"the driver holds {resident} bytes"] if resident > MEMORY_MB * 2**20 else []
    return found


def test_there_are_attacks_enough():
    assert len(ATTACKS) >= 60


def assert_nothing_got_out(driver, world, kind, name):
    answer = attacked(driver, world, kind, name)
    assert escapes(driver, world, answer) == []
    # a program that did nothing of all that finds nothing of it
    check = "import os, threading\ndef found(): return os.listdir('.'), dict(os.environ), threading.active_count()"
    assert driver.values(check, ["found()"]) == [[{"tuple": [[], {"dict": []}, 1]}, None]]


@pytest.mark.parametrize(("mode", "kind", "name"), cases())
def test_nothing_gets_out(place, mode, kind, name):
    assert_nothing_got_out(*place(mode), kind, name)


@pytest.mark.parametrize("name", [name for kind, name in ATTACKS if kind == "resources"])
def test_nothing_is_used_up(place, name):
    places = [place(mode) for mode in LASTING]
    with ThreadPoolExecutor(len(places)) as pool:
        list(pool.map(lambda there: assert_nothing_got_out(*there, "resources", name), places))


@pytest.mark.parametrize("name", ["root", "ordinary"])
def test_nothing_is_left_when_it_is_closed(start_driver, name):
    driver = start_driver(name)
    driver.values("", ["1"])
    assert processes_of(driver.folder) and Path(driver.folder).exists()
    assert driver.close() == 0
    assert processes_of(driver.folder) == [] and not Path(driver.folder).exists()


SEEN = {
    "files": ["write_outside", "append_to_a_file", "change_mode", "read_the_secret", "list_a_folder", "read_a_link"],
    "others": ["environment_of_others", "slow_the_victim_down", "kill_the_victim"],
    "processes": ["subprocess_call"],
    "kernel": ["connect_by_ipv4", "connect_to_an_abstract_socket", "send_a_datagram", "shared_memory_segment"],
}


NO_LAYERS = {"system": "linux", "machine": "unknown", "landlock_abi": 0, "seccomp": False}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in SEEN.items() for name in names])
def test_an_attack_is_seen_where_nothing_confines_it(start_driver, start_world, kind, name):
    """The same observer, and a sandbox without layers: every one of these gets out."""
    driver, world = start_driver("ordinary-bare", unsafe=True, offer=NO_LAYERS), start_world("ordinary-bare")
    world.targets["driver_pid"] = driver.process.pid
    answer = attacked(driver, world, kind, name)
    deadline = time.monotonic() + 30
    while not (seen := escapes(driver, world, answer)) and time.monotonic() < deadline:
        time.sleep(0.01)  # who is killed dies when the kernel comes to it
    assert seen != []
    driver.close()
