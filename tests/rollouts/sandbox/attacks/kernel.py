"""Attacks on the kernel and on the network. A connection or message at a listener of the test is an escape.

`w`: `ports` by family, `socket_path`, `abstract` (names of listeners), `queue` and `memory` (IPC keys of the test).
"""

import asyncio
import contextlib
import ctypes
import os
import platform
import socket
import urllib.request

libc = ctypes.CDLL(None, use_errno=True)
COLUMN = {"x86_64": 0, "aarch64": 1}[platform.machine()]
CALLS = {
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "personality": (135, 92),
    "init_module": (175, 105),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "sethostname": (170, 161),
    "settimeofday": (164, 170),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "fanotify_init": (300, 262),
    "kcmp": (312, 272),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "timer_create": (222, 107),
    "prctl": (157, 167),
    "seccomp": (317, 277),
    "capset": (126, 91),
    "landlock_restrict_self": (446, 446),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "move_mount": (429, 429),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "set_mempolicy": (238, 237),
    "vhangup": (153, 58),
    "setsid": (112, 157),
    "sync": (162, 81),
    "mlockall": (151, 230),
}


def dangerous_system_calls(w):
    """No one is reached: a call that the kernel looks at fails with something else than EPERM, or does not fail."""
    reached = []
    for name, numbers in CALLS.items():
        ctypes.set_errno(0)
        result = libc.syscall(ctypes.c_long(numbers[COLUMN]), *[ctypes.c_long(-1)] * 6)
        if result != -1 or ctypes.get_errno() != 1:
            reached.append(name)
    return f"ESCAPED {reached}" if reached else None


def every_number_of_a_system_call(w):
    """Only those can be reached that a calculation needs; what changes others is not among them (see CALLS)."""
    for number in {numbers[COLUMN] for numbers in CALLS.values()} | set(range(512, 1024)):
        if libc.syscall(ctypes.c_long(number), *[ctypes.c_long(0)] * 6) != -1:
            return f"ESCAPED {number}"


def connect_by_ipv4(w):
    socket.create_connection(("127.0.0.1", w["ports"]["tcp"]), 1)


def connect_by_ipv6(w):
    socket.create_connection(("::1", w["ports"]["tcp6"]), 1)


def send_a_datagram(w):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", w["ports"]["udp"]))


def connect_to_a_socket_in_a_folder(w):
    socket.socket(socket.AF_UNIX).connect(w["socket_path"])


def connect_to_an_abstract_socket(w):
    socket.socket(socket.AF_UNIX).connect("\0" + w["abstract"])


def datagram_to_an_abstract_socket(w):
    socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"x", "\0" + w["abstract_datagram"])


def datagram_from_a_pair(w):
    """A pair needs no socket(), and its halves can send elsewhere."""
    for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
        with contextlib.suppress(OSError):
            one, _ = socket.socketpair(socket.AF_UNIX, kind)
            one.sendto(b"x", "\0" + w["abstract_datagram"])


def connect_by_raw_calls(w):
    descriptor = libc.socket(2, 1, 0)
    address = b"\x02\0" + w["ports"]["tcp"].to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
    libc.connect(descriptor, address, 16)


def connect_with_asyncio(w):
    asyncio.run(asyncio.wait_for(asyncio.open_connection("127.0.0.1", w["ports"]["tcp"]), 1))


def fetch_an_address(w):
    urllib.request.urlopen(f"http://127.0.0.1:{w['ports']['tcp']}/", timeout=1)


def look_up_a_name(w):
    return "ESCAPED", socket.getaddrinfo("localhost", 80), socket.gethostbyname("example.org")


def every_family(w):
    """Internet, netlink, packets, virtual machines, the kernel's ciphers, Bluetooth, ..."""
    made = []
    for family in range(1, 46):
        for kind in (1, 2, 3, 5):
            with contextlib.suppress(OSError):
                socket.socket(family, kind).close()
                made.append((family, kind))
            with contextlib.suppress(OSError):
                socket.socketpair(family, kind)
                made.extend([(family, kind)] if (family, kind) != (1, 1) else [])
    return f"ESCAPED {made}" if made else None


def listen(w):
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return "ESCAPED"


def sockets_that_are_open(w):
    """Of the processes that it was forked from."""
    for descriptor in range(64):
        with contextlib.suppress(OSError):
            socket.socket(fileno=os.dup(descriptor)).send(b"x")
            return "ESCAPED"


def shared_memory_segment(w):
    libc.shmat.restype = ctypes.c_void_p
    address = libc.shmat(libc.shmget(w["memory"], 100, 0), None, 0)
    if address not in (None, ctypes.c_void_p(-1).value):
        return ctypes.string_at(address, 100)


def ring_of_requests(w):
    """io_uring makes its calls where no filter sees them."""
    if libc.syscall(ctypes.c_long(425), ctypes.c_long(8), ctypes.create_string_buffer(120)) >= 0:
        return "ESCAPED"


def more_than_the_bound_descriptors(w):
    opened = []
    with contextlib.suppress(OSError):
        while len(opened) < 10000:
            opened.append(os.dup(0))
    return f"ESCAPED {len(opened)}" if len(opened) > 64 else None
