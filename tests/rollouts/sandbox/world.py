"""What there is outside a sandbox, laid out as bait: whatever touches it is seen from here."""

import contextlib
import ctypes
import itertools
import os
import shutil
import socket
import subprocess
from pathlib import Path

CANARY = "canary-4be1c7"
"""Stands in every secret, and in nothing that a program is given."""
ESCAPED = "ESCAPED"
"""What a program returns that got what it must not get, where only it can see that."""


_KEYS = itertools.count()


class World:
    """Files, listeners and a process of `user`, who runs the sandbox. Attacks get `targets`."""

    def __init__(self, base: Path, user: int) -> None:
        self.folder = base / "outside"
        self.folder.mkdir()
        self.folder.chmod(0o777)
        self._file("secret", CANARY, 0o644)
        self.victim = self._file("victim", "untouched", 0o666)
        self._file(f"named-{CANARY}", "", 0o644)
        (self.folder / "link").symlink_to(f"/nowhere/{CANARY}")
        for path in (*self.folder.iterdir(), self.folder):
            os.chown(path, user, user, follow_symlinks=False)
        self.shared = Path(f"/dev/shm/posttrain-test-{os.getpid()}-{base.name}")
        self.shared.write_text(CANARY)
        self.shared.chmod(0o666)
        as_user = {} if user == os.getuid() else {"user": user, "group": user, "extra_groups": []}
        self.process = subprocess.Popen(["sleep", "infinity"], env={"SECRET": CANARY}, cwd="/", **as_user)
        self._memory = _shared_memory(CANARY)
        self._listeners = self._listen()
        self.library = Path(os.__file__)
        self._before = self._state()
        self.targets = {
            "folder": str(self.folder),
            "secret": str(self.folder / "secret"),
            "victim": str(self.victim),
            "link": str(self.folder / "link"),
            "shared": str(self.shared),
            "victim_pid": self.process.pid,
            "driver_pid": 0,
            "ports": {
                name: self._listeners[name].getsockname()[1]
                for name in ("tcp", "tcp6", "udp")
                if name in self._listeners
            },
            "socket_path": self._listeners["path"].getsockname(),
            "abstract": _abstract(self._listeners["abstract"]),
            "abstract_datagram": _abstract(self._listeners["abstract_datagram"]),
            "memory": self._memory,
        }

    def changes(self) -> list[str]:
        """What is not as it was at first, and which listeners have been heard since the last time."""
        now = self._state()
        found = [f"{name}: {now[name]} after {before}" for name, before in self._before.items() if now[name] != before]
        found += [f"heard at {name}" for name, listener in self._listeners.items() if _heard(listener)]
        return found

    def close(self) -> None:
        """Take all away."""
        for listener in self._listeners.values():
            listener.close()
        self.process.kill()
        self.process.wait()
        self.shared.unlink()
        ctypes.CDLL(None).shmctl(ctypes.CDLL(None).shmget(self._memory, 100, 0), 0, None)
        shutil.rmtree(self.folder)

    def _file(self, name: str, text: str, mode: int) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(mode)
        return path

    def _state(self) -> dict[str, object]:
        with contextlib.suppress(OSError):
            victim = self.victim.stat()
            file = (self.victim.read_text(), victim.st_mode, victim.st_uid, victim.st_mtime_ns, victim.st_nlink)
            attributes = os.listxattr(self.victim)
            return {
                "files": sorted(path.name for path in self.folder.iterdir() if not path.is_socket()),
                "the victim's file": (*file, attributes),
                "shared memory": self.shared.read_text(),
                "Python's library": (self.library.stat().st_mode, sorted(self.library.parent.glob("written*"))),
                "the victim's process": _process_state(self.process.pid),
            }
        return dict.fromkeys(self._before, "gone")

    def _listen(self) -> dict[str, socket.socket]:
        name = f"posttrain-test-{os.getpid()}-{self.process.pid}"
        places = {
            "tcp": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "tcp6": (socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0)),
            "udp": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "path": (socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "socket")),
            "abstract": (socket.AF_UNIX, socket.SOCK_STREAM, f"\0{name}"),
            "abstract_datagram": (socket.AF_UNIX, socket.SOCK_DGRAM, f"\0{name}-datagram"),
        }
        listeners = {}
        for name, (family, kind, address) in places.items():
            listener = socket.socket(family, kind)
            try:
                listener.bind(address)
            except OSError:
                if family != socket.AF_INET6:  # not every machine has it
                    raise
                listener.close()
                continue
            listener.setblocking(False)
            if kind == socket.SOCK_STREAM:
                listener.listen()
            listeners[name] = listener
        (self.folder / "socket").chmod(0o777)
        return listeners


def _heard(listener: socket.socket) -> bool:
    """Somebody has connected or sent something. It is taken, so that the next one counts alone."""
    heard = False
    with contextlib.suppress(BlockingIOError):
        while True:
            if listener.type == socket.SOCK_STREAM:
                listener.accept()[0].close()
            else:
                listener.recv(100)
            heard = True
    return heard


def _abstract(listener: socket.socket) -> str:
    return listener.getsockname()[1:].decode()


def _process_state(pid: int) -> tuple[str, str, str]:
    """Whether it lives (not T stopped, Z ended), its nice value and the processors that it may use."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "lives" if fields[0] in "RSD" else fields[0], fields[16], str(sorted(os.sched_getaffinity(pid)))


def _shared_memory(text: str) -> int:
    """The key of a System V segment that anybody may use."""
    libc = ctypes.CDLL(None)
    libc.shmat.restype = ctypes.c_void_p
    key = 0x51000000 + os.getpid() % 2**16 * 64 + next(_KEYS)
    segment = libc.shmget(key, 100, 0o1666)
    address = libc.shmat(segment, None, 0)
    ctypes.memmove(address, text.encode(), len(text))
    libc.shmdt(ctypes.c_void_p(address))
    return key
