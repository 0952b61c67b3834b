"""Attacks on the machine's time, memory or disk, or on what reads the answer. `printing_...`: main programs."""

import asyncio
import contextlib
import ctypes
import mmap
import os
import re
import signal
import sys
import threading
import time
import zlib


def endless_loop(w):
    while True:
        pass


def endless_sleep(w):
    time.sleep(3600)


async def _never():
    await asyncio.Event().wait()


def wait_for_ever(w):
    asyncio.run(_never())


def loop_that_ignores_signals_and_errors(w):
    for number in range(1, 32):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, lambda *_: None)
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass


def stop_itself(w):
    os.kill(os.getpid(), signal.SIGSTOP)


def end_by_a_signal_without_a_name(w):
    os.kill(os.getpid(), 40)


def end_by_a_fault(w):
    return ctypes.string_at(0)


def one_huge_allocation(w):
    return len(bytearray(10**11))


def many_allocations(w):
    kept = []
    while True:
        kept.append(bytearray(10**7))


def huge_mapping(w):
    return "ESCAPED", len(mmap.mmap(-1, 2**34))


def memory_in_a_c_function(w):
    ctypes.CDLL(None).malloc.restype = ctypes.c_void_p
    kept = [ctypes.CDLL(None).malloc(10**7) for _ in range(1000)]
    return "ESCAPED" if all(kept) else None


def unpacked_zeros(w):
    packed = zlib.compress(bytes(10**8))
    return [zlib.decompress(packed) for _ in range(100)]


def fork_bomb(w):
    while True:
        os.fork()


def fork_bomb_that_goes_on(w):
    while True:
        with contextlib.suppress(OSError):
            os.fork()


def thread_bomb(w):
    threading.stack_size(32768)
    while True:
        threading.Thread(target=time.sleep, args=(3600,)).start()


def file_bomb(w):
    for number in range(10**6):
        open(f"file{number}", "w").close()


def folder_bomb(w):
    """Each inside the one before, out of the reach of what follows paths, with no rights on it."""
    for _ in range(10**6):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)


def locked_folders(w):
    os.mkdir("locked")
    open("locked/file", "w").close()
    os.mkdir("locked/inner", 0)
    os.mkdir("locked2", 0)


def large_file(w):
    with open("file", "wb") as file:
        while True:
            file.write(bytes(10**7))


def large_files(w):
    for number in range(10**4):
        with open(f"file{number}", "wb") as file:
            file.write(bytes(10**7))


def file_full_of_holes(w):
    os.ftruncate(os.open("file", os.O_CREAT | os.O_RDWR), 2**45)


def reserved_file(w):
    os.posix_fallocate(os.open("file", os.O_CREAT | os.O_RDWR), 0, 2**40)


def recursion(w):
    sys.setrecursionlimit(10**9)
    return recursion(w)


def recursion_of_the_c_stack(w):
    nested = []
    for _ in range(10**6):
        nested = [nested]
    sys.setrecursionlimit(10**9)
    return repr(nested)


def nested_value(w):
    nested = []
    for _ in range(10**5):
        nested = [nested]
    return nested


def value_that_holds_itself(w):
    mine = []
    mine.append(mine)
    return mine


def huge_value(w):
    return "x" * 10**8


def huge_number(w):
    return 1 << 10**9


def power_of_powers(w):
    return 9**9**9


def slow_expression(w):
    return re.fullmatch(r"(a+)+b", "a" * 60)


def endless_iterator(w):
    class Endless(list):
        def __iter__(self):
            while True:
                yield 1

    return Endless()


def gigabyte_in_the_channel(w):
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            for _ in range(1000):
                os.write(descriptor, bytes(10**6))


def deeply_nested_answer(w):
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(descriptor, b'{"value": ' + b"[" * 10**5 + b"\n")
            os._exit(0)


def number_with_very_many_digits(w):
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(descriptor, b'{"value": ' + b"9" * 10**5 + b"}\n")
            os._exit(0)


def printing_a_gigabyte(w):
    while True:
        sys.stdout.write("x" * 10**6)


def printing_by_descriptor(w):
    while True:
        os.write(1, bytes(10**6))


def printing_and_waiting(w):
    print("x", flush=True)
    time.sleep(3600)


def printing_little_by_little(w):
    """There is always something to read, and never much."""
    while True:
        os.write(1, b"x")
        time.sleep(0.0005)


def printing_bytes_that_are_no_text(w):
    os.write(1, bytes(range(256)))


def printing_after_closing_everything(w):
    os.closerange(0, 100)
    while True:
        pass
