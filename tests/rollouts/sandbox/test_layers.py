"""Each layer by itself, and the refusal to run without them."""

import errno
import os
import re
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from artifacts.errors import RequestError
from stages.rollouts import code_reward
from stages.rollouts.code_reward import Code
from stages.rollouts.sandbox import seccomp
from stages.rollouts.sandbox.folder import empty, too_full
from stages.rollouts.sandbox.kernel import Offer, SandboxError, probe
from stages.rollouts.sandbox.limits import Limits
from stages.rollouts.sandbox.sandbox import Sandbox
from stages.rollouts.sandbox.syscalls import CONDITIONAL, NUMBERS
from tests.rollouts.sandbox.users import processes_of

confined = pytest.mark.usefixtures("confining_kernel")
FULL = Offer("linux", "x86_64", 7, True)
LACKING = {
    "landlock": (replace(FULL, landlock_abi=0), "no Landlock, which confines files (Linux 5.13 or newer"),
    "seccomp": (replace(FULL, seccomp=False), "no seccomp filters, which confine system calls"),
    "machine": (replace(FULL, machine="riscv64"), "no a seccomp filter for riscv64 (there are x86_64, aarch64)"),
    "system": (replace(FULL, system="darwin"), "no Linux (this is darwin)"),
}


@pytest.mark.parametrize(("offer", "said"), LACKING.values(), ids=LACKING)
def test_it_refuses_to_run_and_says_what_is_missing(monkeypatch, offer, said):
    with pytest.raises(SandboxError) as refused:
        Sandbox(offer=offer)
    assert said in str(refused.value)
    monkeypatch.setattr(code_reward, "probe", lambda: offer)
    with pytest.raises(RequestError, match="Parameter unsafe: true") as refused:
        Code().prepare()
    assert said in str(refused.value)


def test_everything_that_is_missing_is_said_at_once():
    assert len(replace(FULL, landlock_abi=0, seccomp=False).missing()) == 2
    assert FULL.missing() == []


@confined
def test_unsafe_runs_with_what_there_is(monkeypatch):
    monkeypatch.setattr(code_reward, "probe", lambda: LACKING["landlock"][0])
    Code(unsafe=True).prepare()
    with Sandbox(unsafe=True, offer=LACKING["landlock"][0], namespaces=False) as sandbox:
        found = sandbox.values("import os\ndef f(p): return open(p).read()[:0], os.fork()", ["f('/etc/passwd')"])
        assert found[0].error == "PermissionError: [Errno 1] Operation not permitted"  # the filter is still there
    with Sandbox(unsafe=True, offer=LACKING["seccomp"][0], namespaces=False) as sandbox:
        found = sandbox.values("import socket\ndef f(p): socket.socket().close(); open(p)", ["f('/etc/passwd')"])
        assert found[0].error.startswith("PermissionError: [Errno 13]")  # Landlock is still there
    with pytest.raises(SandboxError, match="no Linux"):
        Sandbox(unsafe=True, offer=LACKING["system"][0])


@confined
def test_a_program_that_cannot_be_confined_does_not_run():
    """Without a free descriptor no Landlock rule can be made."""
    with Sandbox(Limits(open_files=0)) as sandbox, pytest.raises(SandboxError, match=r"confined.*Too many open files"):
        sandbox.values("", ["1"])


WITHOUT_NAMESPACES = f"""#!{sys.executable}
import json, os, socket, sys
if json.loads(sys.argv[-1])["namespaces"]:
    socket.socket(fileno=0).send(json.dumps({{"no_namespaces": "unshare: not permitted"}}).encode())
else:
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
"""


@confined
def test_where_namespaces_are_not_permitted_the_other_layers_do(tmp_path):
    """A fork server as most containers make it fail; it may be half inside, so another one is started."""
    python = tmp_path / "python"
    python.write_text(WITHOUT_NAMESPACES)
    python.chmod(0o755)
    with Sandbox(python=str(python)) as sandbox:
        assert sandbox.values("", ["1"])[0].data == 1
        assert sandbox.no_namespaces == "unshare: not permitted"
        assert len(processes_of(str(sandbox.folder))) == 1
        confined = sandbox.values("import os\ndef f(call, *a): call(*a)", ["f(os.fork)", "f(open, '/etc/passwd')"])
        assert [answer.error.split(":")[0] for answer in confined] == ["PermissionError"] * 2


DAEMON = """
import os, time
def leave():
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                while True: time.sleep(0.01)
            os._exit(0)
def bomb():
    for _ in range(5): os.fork()
    while True: pass
"""


@confined
@pytest.mark.parametrize("namespaces", [True, False])
@pytest.mark.parametrize("call", ["leave()", "bomb()"])
def test_processes_end_even_where_no_filter_keeps_them_from_being_born(namespaces, call):
    """Without seccomp it is the number space, or the fork server as the parent of every orphan, that ends them."""
    limits = Limits(cpu_seconds=1, wall_seconds=2)
    with Sandbox(limits, unsafe=True, offer=replace(probe(), seccomp=False), namespaces=namespaces) as sandbox:
        sandbox.values("", ["1"])
        folder = str(sandbox.folder)
        before = processes_of(folder)
        sandbox.values(DAEMON, [call])
        assert processes_of(folder) == before
    assert processes_of(folder) == []


@confined
def test_a_fork_server_that_is_killed_takes_its_program_along_and_is_replaced():
    with Sandbox() as sandbox:
        assert sandbox.values("", ["1"])[0].data == 1
        first = sandbox.folder
        sandbox._server.kill()
        with pytest.raises(SandboxError, match=r"ended|not be confined"):
            sandbox.values("while True: pass", ["1"])
        while processes_of(str(first)):
            time.sleep(0.01)
        assert sandbox.values("", ["2"])[0].data == 2


def test_a_fork_server_that_ended_before_it_read_its_job_has_ended():
    """Its socket is then reset, and not only closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(b"a job")
    theirs.close()
    with ours, pytest.raises(SandboxError, match="the fork server ended while a program ran"):
        Sandbox()._ending(ours)


@pytest.mark.parametrize("mode", ["root", "ordinary-bare"])
def test_a_sandbox_whose_owner_is_killed_ends_with_its_program(start_driver, mode):
    """No signal reaches it and nobody closes it: its socket is gone."""
    driver = start_driver(mode, limits={"cpu_seconds": 600, "wall_seconds": 600})
    driver.values("", ["1"])
    idle = len(processes_of(driver.folder))
    driver.process.stdin.write('{"source": "while True: pass", "expressions": []}\n')
    driver.process.stdin.flush()
    while len(processes_of(driver.folder)) == idle:
        time.sleep(0.01)
    driver.process.kill()
    driver.process.wait()
    while processes_of(driver.folder):
        time.sleep(0.01)
    assert list(Path(driver.folder).iterdir()) == []
    Path(driver.folder).rmdir()
    driver.process.stdin.close()
    driver.process.stdout.close()


@confined
def test_programs_know_nothing_of_each_other():
    with Sandbox() as sandbox:
        leave = "import os, builtins\nopen('left', 'w').close()\nbuiltins.left = 1\nos.environ['left'] = '1'"
        look = (
            "import os, builtins, random\n"
            "def f(): return os.listdir(), hasattr(builtins, 'left'), len(os.environ), random.random()"
        )
        first = sandbox.values(look, ["f()"])
        sandbox.values(leave, ["1"])
        assert sandbox.values(look, ["f()"]) == first
        assert first[0].data["tuple"][:3] == [[], False, 0]


HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), r"#define __NR_(\w+)\s+(\d+)"),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"), r"#define __NR(?:3264)?_(\w+)\s+(\d+)"),
}
GENERIC_NAMES = {"newfstatat": "fstatat"}


@pytest.mark.parametrize("machine", NUMBERS)
def test_numbers_are_the_kernels(machine):
    path, pattern = HEADERS[machine]
    if not path.exists():
        pytest.skip(f"no {path}")
    kernel = dict(re.findall(pattern, path.read_text()))
    names = {name: GENERIC_NAMES.get(name, name) if machine == "aarch64" else name for name in NUMBERS[machine]}
    assert {name: kernel[names[name]] for name in names} == {n: str(v) for n, v in NUMBERS[machine].items()}
    assert len(set(NUMBERS[machine].values())) == len(NUMBERS[machine])


def run_filter(lines, machine, number, arguments=()):
    """An interpreter of the packet filter's language, as far as the filter uses it: what the kernel would do."""
    words = [number, machine, 0, 0]
    for value in [*arguments, *[0] * (6 - len(arguments))]:
        words += [value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF]
    place = accumulator = 0
    while True:
        code, jump, otherwise, value = lines[place]
        place += 1
        if code == seccomp.LOAD:
            accumulator = words[value // 4]
        elif code == seccomp.AND:
            accumulator &= value
        elif code == seccomp.RETURN:
            return value
        else:
            holds = accumulator == value if code == seccomp.EQUAL else accumulator >= value
            place += jump if holds else otherwise


REFUSED = seccomp.ERRNO | errno.EPERM
KILLED = seccomp.SECCOMP_RET_KILL_PROCESS
PID = 4321
ARGUMENTS = [
    ("clone", (0x3D0F00,), True),
    ("clone", (0x3D0F00 | 0x10000000,), False),
    ("clone", (17,), False),
    ("kill", (PID, 9), True),
    ("kill", (1, 9), False),
    ("kill", (2**64 - 1, 9), False),
    ("tgkill", (PID, PID + 1, 9), True),
    ("tgkill", (PID + 1, PID, 9), False),
    ("prlimit64", (0, 1), True),
    ("prlimit64", (PID, 1), False),
    ("fcntl", (3, 4, 2048), True),
    ("fcntl", (3, 8, PID), False),
    ("fcntl", (3, 10, 9), False),
    ("ioctl", (1, 0x5401), True),
    ("ioctl", (1, 0x5412), False),
    ("socketpair", (1, 1 | 0o2000000 | 0o4000), True),
    ("socketpair", (1, 2), False),
    ("socketpair", (1, 5), False),
    ("socketpair", (2, 1), False),
    ("sendto", (3, 1000, 1, 0, 0, 0), True),
    ("sendto", (3, 1000, 1, 0, 1, 16), False),
    ("sendto", (3, 1000, 1, 0, 2**32, 16), False),
    ("mmap", (0, 4096, 3), True),
    ("mmap", (0, 4096, 7), False),
    ("mprotect", (0, 4096, 1), True),
    ("mprotect", (0, 4096, 5), False),
]


@pytest.mark.parametrize("machine", NUMBERS)
def test_the_filter_allows_what_it_should_and_nothing_else(machine):
    """On every machine that there is a filter for, by an interpreter of its own."""
    lines, arch = seccomp.program(machine, PID), seccomp.AUDIT_ARCH[machine]
    names = {number: name for name, number in NUMBERS[machine].items()}
    assert len(lines) < 4096
    for number in range(0x1000):
        expected = seccomp.ALLOW if number in names else REFUSED
        if names.get(number) not in CONDITIONAL:
            assert run_filter(lines, arch, number) == expected, number
    for name, arguments, allowed in ARGUMENTS:
        expected = seccomp.ALLOW if allowed else REFUSED
        assert run_filter(lines, arch, NUMBERS[machine][name], arguments) == expected, (name, arguments)
    assert run_filter(lines, arch, NUMBERS[machine]["clone3"]) == seccomp.ERRNO | errno.ENOSYS
    assert {name for name, _, _ in ARGUMENTS} | {"clone3"} == set(CONDITIONAL)
    assert run_filter(lines, arch, 0x40000000) == run_filter(lines, arch ^ 1, 0) == KILLED


def test_a_folder_is_emptied_whatever_is_in_it(tmp_path):
    """Deeper than any path can name, with locked folders, and links to what must stay."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    full = tmp_path / "full"
    full.mkdir()
    here = os.open(full, os.O_RDONLY)
    for _ in range(100):
        os.mkdir("d" * 200, dir_fd=here)
        os.symlink(outside, "link", dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.chmod("d" * 200, 0, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    (full / "many").mkdir()
    for number in range(50):
        (full / "many" / str(number) / "inner").mkdir(parents=True)
    empty(full)
    assert list(full.iterdir()) == [] and (outside / "kept").exists()


def test_when_a_folder_is_too_full(tmp_path):
    limits = Limits(folder_mb=1, folder_files=3)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(2**20))
    (tmp_path / "c").touch()
    assert not too_full(tmp_path, limits)  # three entries, one megabyte
    (tmp_path / "c").write_bytes(b"x")
    assert too_full(tmp_path, limits)
    (tmp_path / "c").write_bytes(b"")
    (tmp_path / "a" / "d").touch()
    assert too_full(tmp_path, limits)
