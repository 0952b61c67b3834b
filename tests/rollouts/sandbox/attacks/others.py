"""Attacks on other processes, to end them or look into them, and on rights.

`w`: `victim_pid` (a process of the same user, with a secret in its environment), `driver_pid` (the sandbox's).
"""

# ruff: noqa: SIM115

import contextlib
import ctypes
import os
import platform
import resource
import signal

libc = ctypes.CDLL(None, use_errno=True)


def call(x86_64, aarch64, *arguments):
    number = x86_64 if platform.machine() == "x86_64" else aarch64
    return libc.syscall(number, *(ctypes.c_long(value) if isinstance(value, int) else value for value in arguments))


def kill_the_parent(w):
    os.kill(os.getppid() or 1, signal.SIGKILL)


def kill_the_victim(w):
    os.kill(w["victim_pid"], signal.SIGKILL)


def kill_everybody(w):
    os.kill(-1, signal.SIGKILL)


def kill_the_group(w):
    os.killpg(0, signal.SIGKILL)


def kill_a_thread_of_the_victim(w):
    call(234, 131, w["victim_pid"], w["victim_pid"], 9)
    call(200, 130, w["victim_pid"], 9)


def queue_a_signal(w):
    call(129, 138, w["victim_pid"], 9, ctypes.create_string_buffer(b"\x09\0\0\0\0\0\0\0\xff\xff\xff\xff" + bytes(116)))


def signal_by_descriptor(w):
    signal.pidfd_send_signal(os.pidfd_open(w["victim_pid"]), signal.SIGKILL)


def signal_by_input(w):
    """The owner of a pipe is told by a signal when there is something to read."""
    import fcntl

    reading, writing = os.pipe()
    fcntl.fcntl(reading, fcntl.F_SETOWN, w["victim_pid"])
    fcntl.fcntl(reading, 10, signal.SIGKILL)
    fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)
    os.write(writing, b"x")


def limit_the_victim(w):
    resource.prlimit(w["victim_pid"], resource.RLIMIT_CPU, (0, 0))
    return "ESCAPED"


def slow_the_victim_down(w):
    os.setpriority(os.PRIO_PROCESS, w["victim_pid"], 19)
    return "ESCAPED"


def move_the_victim_to_another_processor(w):
    os.sched_setaffinity(w["victim_pid"], {0})
    return "ESCAPED"


def environment_of_others(w):
    found = [dict(os.environ)]
    for process in (w["victim_pid"], w["driver_pid"], os.getppid(), "self", "thread-self", 1):
        with contextlib.suppress(OSError):
            found.append(open(f"/proc/{process}/environ").read())
    return found


def command_lines_of_others(w):
    return ["ESCAPED " + open(f"/proc/{entry}/cmdline").read() for entry in os.listdir("/proc") if entry.isdigit()]


def memory_of_others(w):
    for process in (w["victim_pid"], w["driver_pid"], os.getppid()):
        with contextlib.suppress(OSError):
            os.open(f"/proc/{process}/mem", os.O_RDONLY)
            return "ESCAPED"


def memory_by_system_call(w):
    class Piece(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    piece = Piece(ctypes.addressof(ctypes.create_string_buffer(8)), 8)
    for process in (w["victim_pid"], os.getppid()):
        if libc.process_vm_readv(process, ctypes.byref(piece), 1, ctypes.byref(piece), 1, 0) >= 0:
            return "ESCAPED"


def trace_others(w):
    for process in (w["victim_pid"], w["driver_pid"], os.getppid()):
        if libc.ptrace(16, process, None, None) == 0 or libc.ptrace(0x4206, process, None, None) == 0:
            return "ESCAPED"


def descriptors_of_others(w):
    for process in (w["victim_pid"], w["driver_pid"], os.getppid()):
        with contextlib.suppress(OSError):
            return "ESCAPED", [call(438, 438, os.pidfd_open(process), number, 0) for number in range(8)]


def another_user(w):
    for change in (
        lambda: os.setuid(1),
        lambda: os.setresuid(0, 0, 0),
        lambda: os.setgroups([0]),
        lambda: os.setgid(1),
    ):
        with contextlib.suppress(OSError):
            change()
            return "ESCAPED"


def namespaces_of_its_own(w):
    for flags in (0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x10020000):
        if libc.unshare(flags) == 0:
            return "ESCAPED"


def namespaces_of_others(w):
    for name in ("mnt", "net", "pid", "user"):
        with contextlib.suppress(OSError):
            if libc.setns(os.open(f"/proc/1/ns/{name}", os.O_RDONLY), 0) == 0:
                return "ESCAPED"


def mounts(w):
    os.mkdir("place")
    if libc.mount(b"/", b"place", None, 4096, None) == 0 or libc.mount(b"none", b"place", b"tmpfs", 0, None) == 0:
        return "ESCAPED"
    if libc.umount2(b"/proc", 2) == 0 or libc.chroot(b".") == 0 or call(155, 41, b".", b".") == 0:
        return "ESCAPED"


def raise_its_limits(w):
    for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return "ESCAPED"
