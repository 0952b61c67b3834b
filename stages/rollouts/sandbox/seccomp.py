"""A seccomp filter: which system calls a process can make, for ever, as a program of the classic packet filter."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Callable, Sequence

from stages.rollouts.sandbox.kernel import SECCOMP, SECCOMP_RET_KILL_PROCESS, system_call
from stages.rollouts.sandbox.syscalls import CONDITIONAL, NUMBERS

SET_MODE_FILTER = 1
ALLOW = 0x7FFF0000
ERRNO = 0x00050000
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x40000000
"""Numbers of x86-64's second ABI, which the kernel calls by the same architecture."""

LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
NUMBER_OFFSET, ARCH_OFFSET, ARGUMENTS_OFFSET = 0, 4, 16

THREAD_FLAGS = (0x3D0F00, 0x7D0F00)
"""clone as glibc and musl call it for a thread: everything shared, so that no process is born."""
TERMINAL_QUESTIONS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Not FIOASYNC: it sends signals."""
DESCRIPTOR_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK, F_SETLKW, F_DUPFD_CLOEXEC. Not F_SETOWN: signals."""
PROT_EXEC = 4
AF_UNIX, SOCK_STREAM, SOCK_TYPE_MASK = 1, 1, 0xF

Instruction = tuple[int, int, int, int]
"""code, jump if true, jump if false, value"""


def _low(argument: int) -> Instruction:
    return (LOAD, 0, 0, ARGUMENTS_OFFSET + 8 * argument)


def _high(argument: int) -> Instruction:
    return (LOAD, 0, 0, ARGUMENTS_OFFSET + 8 * argument + 4)


def _one_of(argument: int, values: Sequence[int]) -> list[Instruction]:
    """Allow if the argument's low word, which is all that the kernel looks at for an int, is one of these."""
    tests = [test for value in values for test in ((EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW))]
    return [_low(argument), *tests]


def _without(argument: int, bits: int) -> list[Instruction]:
    return [_low(argument), (AND, 0, 0, bits), (EQUAL, 0, 1, 0), (RETURN, 0, 0, ALLOW)]


def _stream_pair() -> list[Instruction]:
    """A pair of connected stream sockets, as asyncio wakes itself up with; a datagram one could send elsewhere."""
    return [
        *(_low(0), (EQUAL, 0, 4, AF_UNIX)),
        *(_low(1), (AND, 0, 0, SOCK_TYPE_MASK), (EQUAL, 0, 1, SOCK_STREAM), (RETURN, 0, 0, ALLOW)),
    ]


def _null(argument: int) -> list[Instruction]:
    return [_low(argument), (EQUAL, 0, 3, 0), _high(argument), (EQUAL, 0, 1, 0), (RETURN, 0, 0, ALLOW)]


CONDITIONS: dict[str, Callable[[int], list[Instruction]]] = {
    "clone": lambda pid: _one_of(0, THREAD_FLAGS),
    "clone3": lambda pid: [(RETURN, 0, 0, ERRNO | errno.ENOSYS)],
    "kill": lambda pid: _one_of(0, [pid]),
    "tgkill": lambda pid: _one_of(0, [pid]),
    "prlimit64": lambda pid: _one_of(0, [0]),
    "fcntl": lambda pid: _one_of(1, DESCRIPTOR_COMMANDS),
    "ioctl": lambda pid: _one_of(1, TERMINAL_QUESTIONS),
    "socketpair": lambda pid: _stream_pair(),
    "sendto": lambda pid: _null(4),
    # without new machine code, every attack has to be written with what the C library has
    "mmap": lambda pid: _without(2, PROT_EXEC),
    "mprotect": lambda pid: _without(2, PROT_EXEC),
}
assert set(CONDITIONS) == set(CONDITIONAL)


def program(machine: str, pid: int) -> list[Instruction]:
    """The filter for a process: what is not allowed fails with EPERM, another ABI's call ends the process."""
    kill = (RETURN, 0, 0, SECCOMP_RET_KILL_PROCESS)
    lines: list[Instruction] = [(LOAD, 0, 0, ARCH_OFFSET), (EQUAL, 1, 0, AUDIT_ARCH[machine]), kill]
    lines += [(LOAD, 0, 0, NUMBER_OFFSET), (AT_LEAST, 0, 1, X32_BIT), kill]
    refuse = (RETURN, 0, 0, ERRNO | errno.EPERM)
    for name, number in NUMBERS[machine].items():
        block = [*CONDITIONS[name](pid), refuse] if name in CONDITIONS else [(RETURN, 0, 0, ALLOW)]
        lines += [(EQUAL, 0, len(block), number), *block]
    return [*lines, refuse]


def install(machine: str, pid: int) -> None:
    """Filter this thread's calls and those of what it starts. Needs no_new_privs. Raises OSError."""
    lines = program(machine, pid)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    address = ctypes.create_string_buffer(struct.pack("@HP", len(lines), ctypes.addressof(code)))
    system_call(SECCOMP[machine], SET_MODE_FILTER, 0, address)
