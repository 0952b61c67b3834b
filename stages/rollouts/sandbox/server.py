"""The fork server: a confined process that has Python's library loaded and starts one process for each program.

It sees neither programs nor values: the sandbox hands it open files, which it gives to the process that it starts.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from stages.rollouts.sandbox import folder, namespaces, program
from stages.rollouts.sandbox.confine import Layers, confine_program, confine_server, end_with_parent
from stages.rollouts.sandbox.kernel import process_file
from stages.rollouts.sandbox.limits import MEGABYTE, Limits

RUN, KILL = b"run", b"kill"
READY, FAILED = b"R", b"E"
"""First byte on a program's channel: it is confined and starts, or it could not be confined (the reason follows)."""
WATCH_SECONDS = 0.05
"""How often a folder is looked at that has no bound of its own."""
PARENT_SECONDS = 1.0
"""How often it is looked whether the sandbox's process still lives. Its socket says so at once, but a copy of the
socket may live on in another process that it forked."""
COMMON = (
    *("abc", "argparse", "ast", "asyncio", "base64", "bisect", "calendar", "cmath", "collections", "colorsys"),
    *("concurrent.futures", "contextlib", "copy", "csv", "ctypes", "dataclasses", "datetime", "decimal", "difflib"),
    *("enum", "fractions", "functools", "hashlib", "heapq", "html", "inspect", "io", "itertools", "json", "logging"),
    *("math", "numbers", "operator", "pathlib", "pickle", "pprint", "queue", "random", "re", "shutil", "sqlite3"),
    *("statistics", "string", "struct", "tempfile", "textwrap", "threading", "timeit", "traceback", "types"),
    *("typing", "unicodedata", "unittest", "urllib.parse", "uuid", "xml.etree.ElementTree", "zlib", "zoneinfo"),
)
"""Loaded before programs start; they can import the rest of the library themselves, but for its compiled modules."""


def serve(control: socket.socket, settings: dict[str, Any]) -> None:
    """Start programs as the sandbox asks for them, until it closes its end. Says first which layers it has."""
    work = Path(settings["folder"])
    limits = Limits(**settings["limits"])
    layers = Layers(**settings["layers"])
    _load_library()
    if settings["namespaces"] and (why_not := _enter_namespaces(work, limits)) is not None:
        control.send(json.dumps({"no_namespaces": why_not}).encode())
        return  # it may be half inside
    confine_server(layers, work)
    control.send(json.dumps({}).encode())
    server = _Server(control, work, limits, layers, settings["namespaces"])
    while server.next():
        pass


class _Server:
    def __init__(
        self, control: socket.socket, work: Path, limits: Limits, layers: Layers, own_namespaces: bool
    ) -> None:
        self._control = control
        self._work = work
        self._limits = limits
        self._layers = layers
        self._own_namespaces = own_namespaces

    def next(self) -> bool:
        """Run one program. False: the sandbox has closed its end."""
        message, descriptors, _, _ = socket.recv_fds(self._control, 64, 4)
        if message != RUN:
            return bool(message)  # to kill a program that has just ended by itself
        place = self._work / "program"
        place.mkdir(mode=0o700)
        child = os.fork()
        if child == 0:
            self._start(place, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        connected, full = self._wait(child, place)
        _, status = os.waitpid(child, 0)
        self._end_others()
        folder.empty(place)
        place.rmdir()
        if connected:
            self._control.send(json.dumps({"status": os.waitstatus_to_exitcode(status), "full": full}).encode())
        return connected

    def _start(self, place: Path, descriptors: list[int]) -> NoReturn:
        try:
            job, standard_input, standard_output, channel = descriptors
            asked = self._prepare(place, job, standard_input, standard_output, channel)
            if "expressions" in asked:
                program.call(asked["source"], asked["expressions"], channel)
                os._exit(0)
            os.close(channel)
            os._exit(program.main(asked["source"]) & 0xFF)
        finally:
            os._exit(1)  # nothing that a program raises may come back into the server's code

    def _prepare(
        self, place: Path, job: int, standard_input: int, standard_output: int, channel: int
    ) -> dict[str, Any]:
        """Confine this process; what it is to run."""
        try:
            self._control.close()
            _connect_streams(standard_input, standard_output)
            with open(job, encoding="utf-8") as opened:
                asked: dict[str, Any] = json.load(opened)
            os.chdir(place)
            count_threads = self._own_namespaces and os.getuid() != 0
            confine_program(self._layers, place, self._limits, count_threads=count_threads)
        except BaseException as error:
            os.write(channel, FAILED + f"{type(error).__name__}: {error}".encode())
            raise
        os.write(channel, READY)
        return asked

    def _wait(self, child: int, place: Path) -> tuple[bool, bool]:
        """Until the program has ended or been killed: still connected to the sandbox, killed for a full folder."""
        ended = process_file(child)
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        try:
            while True:
                events = dict(poll.poll(None if self._own_namespaces else WATCH_SECONDS * 1000))
                if ended in events:
                    return True, False
                if events:
                    os.kill(child, signal.SIGKILL)
                    return bool(self._control.recv(64)), False
                if folder.too_full(place, self._limits):
                    os.kill(child, signal.SIGKILL)
                    return True, True
        finally:
            os.close(ended)

    def _end_others(self) -> None:
        """Kill what a program has left running. The filter lets none be born: this is for when there is no filter."""
        while True:
            with contextlib.suppress(ProcessLookupError):
                if self._own_namespaces:
                    os.kill(-1, signal.SIGKILL)  # the first process of a number space is the one that this spares
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                return
            if not self._own_namespaces:
                _kill_children()
            time.sleep(0.001)


def _kill_children() -> None:
    """Children of this process, which as a subreaper gets every orphan below it."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                state = Path("/proc", entry, "stat").read_text(encoding="utf-8", errors="replace")
                if int(state.rpartition(")")[2].split()[1]) == os.getpid():
                    os.kill(int(entry), signal.SIGKILL)


def _connect_streams(standard_input: int, standard_output: int) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor, target in ((standard_input, 0), (standard_output, 1), (nothing, 2)):
        os.dup2(descriptor, target)
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    random.seed(0)


def _load_library() -> None:
    """What programs use, and every compiled module: they cannot load machine code themselves."""
    compiled = Path(os.__file__).parent / "lib-dynload"
    names = sorted(path.name.split(".")[0] for path in compiled.glob("*.so"))
    for name in (*COMMON, *(name for name in names if "test" not in name)):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _enter_namespaces(work: Path, limits: Limits) -> str | None:
    """None: this process is now the first of its own. Otherwise why it cannot be."""
    try:
        namespaces.enter()
        if child := os.fork():
            _stand_by(child)
        end_with_parent()
        namespaces.bounded_folder(work, limits.folder_mb * MEGABYTE, limits.folder_files)
    except OSError as error:
        return str(error)
    return None


def _stand_by(child: int) -> NoReturn:
    """Live as long as the first process of the namespaces, which ends with this one, as this one with the sandbox's."""
    parent = os.getppid()
    ended = process_file(child)
    os.closerange(0, ended)
    os.closerange(ended + 1, 64)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    while os.getppid() == parent and not poll.poll(PARENT_SECONDS * 1000):
        pass
    os._exit(0)


def start(settings: str) -> None:
    """The whole life of the process: `settings` as JSON, the sandbox's socket as standard input."""
    sys.path.pop(0)
    os.environ.clear()
    serve(socket.socket(fileno=os.dup(0)), json.loads(settings))
