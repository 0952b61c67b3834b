"""Attacks by processes: to start some that live on, or other programs. `w`: `folder` (anybody may write there)."""

# ruff: noqa: SIM115

import atexit
import contextlib
import ctypes
import gc
import mmap
import os
import platform
import signal
import subprocess
import sys
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == "x86_64"


def call(x86_64, aarch64, *arguments):
    number = x86_64 if X86 else aarch64
    return libc.syscall(number, *(ctypes.c_long(value) if isinstance(value, int) else value for value in arguments))


def live_on(w):
    """What a process does that should not be there."""
    while True:
        with contextlib.suppress(OSError):
            open(f"{w['folder']}/alive", "w").close()
        time.sleep(0.05)


def daemon(w):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            live_on(w)
        os._exit(0)


def forked_child(w):
    if os.fork() == 0:
        live_on(w)


def virtual_fork(w):
    if libc.vfork() == 0:
        live_on(w)


def cloned_process(w):
    if call(56, 220, signal.SIGCHLD, 0, 0, 0, 0) == 0:
        live_on(w)


def cloned_process_that_shares_memory(w):
    stack = ctypes.create_string_buffer(65536)
    main = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: live_on(w))
    return libc.clone(main, ctypes.byref(stack, 65000), 0x100 | signal.SIGCHLD, None)


def clone3_process(w):
    arguments = (ctypes.c_uint64 * 11)(0, 0, 0, 0, signal.SIGCHLD)
    if call(435, 435, arguments, ctypes.sizeof(arguments)) == 0:
        live_on(w)


def fork_in_a_thread(w):
    thread = threading.Thread(target=daemon, args=(w,))
    thread.start()
    thread.join()


def fork_at_exit(w):
    atexit.register(forked_child, w)
    atexit._run_exitfuncs()


def endless_thread(w):
    threading.Thread(target=live_on, args=(w,)).start()


def fork_server(w):
    import multiprocessing

    multiprocessing.get_context("fork").Process(target=live_on, args=(w,)).start()


def shell(w):
    os.system(f"touch {w['folder']}/written")


def subprocess_call(w):
    subprocess.Popen(["/bin/touch", f"{w['folder']}/written"])


def spawn(w):
    os.posix_spawn("/bin/touch", ["touch", f"{w['folder']}/written"], {})


def replace_the_program(w):
    os.execv("/bin/touch", ["touch", f"{w['folder']}/written"])


def execute_a_file_in_memory(w):
    memory = os.memfd_create("program")
    os.write(memory, open("/bin/touch", "rb").read())
    os.execve(memory, ["touch", f"{w['folder']}/written"], {})


def execute_a_file_of_its_own(w):
    descriptor = os.open("program", os.O_CREAT | os.O_WRONLY, 0o777)
    os.write(descriptor, f"#!/bin/sh\ntouch {w['folder']}/written\n".encode())
    os.close(descriptor)
    os.execv("./program", ["program"])


def execute_by_descriptor(w):
    descriptor = os.open("/bin/touch", os.O_PATH)
    arguments = (ctypes.c_char_p * 3)(b"touch", f"{w['folder']}/written".encode(), None)
    call(322, 281, descriptor, b"", arguments, None, 0x1000)


def machine_code(w):
    """Code of its own in memory, which no filter of functions sees: `mov eax, 7; ret`."""
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(b"\xb8\x07\0\0\0\xc3")
    return "ESCAPED"


def machine_code_made_executable(w):
    memory = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if libc.mprotect(ctypes.c_void_p(address), 4096, 7) == 0:
        return "ESCAPED"


def library_of_its_own(w):
    import _ctypes

    shared = next(path for path in open("/proc/self/maps").read().split() if path.endswith(".so"))
    open("own.so", "wb").write(open(shared, "rb").read())
    _ctypes.dlopen("./own.so", 2)
    return "ESCAPED"


def old_system_calls(w):
    """x86-64's second ABI has the same calls under other numbers."""
    if X86 and libc.syscall(ctypes.c_long(0x40000000 + 57)) == 0:
        live_on(w)


def the_servers_frames_and_files(w):
    """Write orders of the sandbox to every open file, and to every socket that the collector knows."""
    frame = sys._getframe()
    while frame is not None:
        for value in list(frame.f_locals.values()):
            with contextlib.suppress(Exception):
                value._control.send(b"run")
        frame = frame.f_back
    for found in gc.get_objects():
        if type(found).__name__ == "socket":
            with contextlib.suppress(Exception):
                found.send(b"run")
    for descriptor in range(64):
        with contextlib.suppress(OSError):
            os.write(descriptor, b'run\n{"status": 0}\n')


def close_everything(w):
    os.closerange(0, 1000)


def loop_in_a_signal_handler(w):
    signal.signal(signal.SIGALRM, lambda *_: live_on(w))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    time.sleep(1)
