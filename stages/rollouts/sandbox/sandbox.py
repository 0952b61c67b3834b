"""The trusted side: starts a fork server, hands it programs, reads what comes back, and ends what takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.rollouts.sandbox import folder
from stages.rollouts.sandbox.answers import Answer, answers
from stages.rollouts.sandbox.confine import Layers
from stages.rollouts.sandbox.kernel import Offer, SandboxError, probe, sealed_file
from stages.rollouts.sandbox.limits import Limits
from stages.rollouts.sandbox.server import FAILED, KILL, READY, RUN

ROOT = Path(__file__).parents[3]
START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from stages.rollouts.sandbox.server import start; start(sys.argv[2])"
)
OPTIONS = ("-s", "-S", "-P", "-B", "-X", "utf8", "-W", "ignore")
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""All there is; one seed, so that a program that prints a set prints the same every time."""
START_SECONDS = 120.0
END_SECONDS = 30.0
"""A fork server that takes longer is broken."""


@dataclass(frozen=True)
class Printed:
    """What a main program wrote to its standard output, and why it did not end well (None: it did)."""

    text: str
    problem: str | None


@dataclass(frozen=True)
class _Result:
    sent: bytes
    printed: bytes
    problem: str | None


class Sandbox:
    """Runs one untrusted Python program at a time. Close it, or use it in `with`."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        unsafe: bool = False,
        offer: Offer | None = None,
        namespaces: bool = True,
        python: str = sys.executable,
    ) -> None:
        """Raises SandboxError where the kernel (`offer`; None: ask it) lacks what confines programs, unless `unsafe`.

        unsafe: run with the layers that there are. namespaces: have the outer layer too where that is possible.
        """
        offer = offer or probe()
        if (lacks := offer.missing()) and not (unsafe and offer.system == "linux"):
            raise SandboxError(f"generated code cannot be confined here; there is no {'; and no '.join(lacks)}")
        self.limits = limits or Limits()
        self._layers = Layers.of(offer)
        self._python = python
        self.no_namespaces: str | None = None if namespaces else "not asked for"
        """Why the outer layer is not there; None: it is."""
        self.folder: Path | None = None
        """What the fork server works in, while it runs."""
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def values(self, source: str, expressions: Sequence[str]) -> list[Answer]:
        """Run the source as a module and give the value of every expression in it. Raises SandboxError."""
        with open(os.devnull, "wb") as nowhere:
            result = self._run({"source": source, "expressions": list(expressions)}, "", nowhere.fileno(), None)
        return answers(result.sent, len(expressions), result.problem)

    def output(self, source: str, standard_input: str) -> Printed:
        """Run the source as a main program. Raises SandboxError."""
        reading, writing = os.pipe()
        try:
            result = self._run({"source": source}, standard_input, writing, reading)
        finally:
            os.close(reading)
        return Printed(result.printed.decode("utf-8", "replace"), result.problem)

    def close(self) -> None:
        """End the fork server and all it started, and remove its folder."""
        self._stop()

    def _run(self, job: dict[str, Any], standard_input: str, standard_output: int, printed: int | None) -> _Result:
        """Hand over the job, read both outputs to their end. Closes a pipe given as `standard_output`."""
        control = self._started()
        reading, writing = os.pipe()
        given = standard_input.encode("utf-8", "surrogatepass")
        job_file, input_file = sealed_file(json.dumps(job).encode()), sealed_file(given)
        handed = [job_file, input_file, standard_output, writing]
        try:
            with contextlib.suppress(OSError):  # a server that is gone shows below
                socket.send_fds(control, [RUN], handed)
        finally:
            for descriptor in handed if printed is not None else [job_file, input_file, writing]:
                os.close(descriptor)
        try:
            return self._read(control, reading, printed)
        except BaseException:
            self._stop()
            raise
        finally:
            os.close(reading)

    def _read(self, control: socket.socket, sent: int, printed: int | None) -> _Result:
        streams = {sent: bytearray(), **({} if printed is None else {printed: bytearray()})}
        poll = select.poll()
        for descriptor in (control.fileno(), *streams):
            poll.register(descriptor, select.POLLIN)

        def take(seconds: float) -> dict[str, Any] | None:
            """Read what comes within the time; not None: all programs have ended."""
            ending = None
            for descriptor, _ in poll.poll(max(0.0, seconds) * 1000):
                if descriptor == control.fileno():
                    ending = self._ending(control)
                elif not self._take(descriptor, streams[descriptor]):
                    poll.unregister(descriptor)
            return ending

        problem, deadline = None, time.monotonic() + self.limits.wall_seconds
        while (ending := take(deadline - time.monotonic())) is None:
            over = sum(map(len, streams.values())) > self.limits.output_bytes
            late = time.monotonic() >= deadline
            if late and problem is not None:
                raise SandboxError(f"the fork server did not end a program within {END_SECONDS:g} s")
            if problem is None and (late or over):
                wrote = f"wrote or returned more than {self.limits.output_bytes} bytes"
                problem = wrote if over else f"ran longer than {self.limits.wall_seconds:g} s"
                deadline = time.monotonic() + END_SECONDS
                with contextlib.suppress(OSError):  # a server that is gone shows in its silence
                    control.send(KILL)
        # who could write has ended; not until the end of the pipes, whose other ends a fork of this process may hold
        poll.unregister(control.fileno())
        while poll.poll(0):
            take(0)
        start, answer = bytes(streams[sent][:1]), bytes(streams[sent][1:])
        if start != READY:
            why = answer.decode("utf-8", "replace") if start == FAILED else f"it ended at once ({ending})"
            raise SandboxError(f"a program's process could not be confined: {why}")
        return _Result(answer, bytes(streams.get(printed or -1, b"")), problem or self._explained(ending))

    def _take(self, descriptor: int, into: bytearray) -> bool:
        """Read some; False at the end. What is over the limit is read and forgotten."""
        data = os.read(descriptor, 65536)
        if len(into) <= self.limits.output_bytes:
            into += data
        return bool(data)

    def _ending(self, control: socket.socket) -> dict[str, Any]:
        message = b""
        with contextlib.suppress(ConnectionError):  # of one that ended before it read what it was sent
            message = control.recv(4096)
        if not message:
            raise SandboxError("the fork server ended while a program ran")
        return dict(json.loads(message))

    def _explained(self, ending: dict[str, Any]) -> str | None:
        if ending["full"]:
            return f"filled its folder with more than {self.limits.folder_mb} MB or {self.limits.folder_files} files"
        status = int(ending["status"])
        if status == -signal.SIGKILL:
            return f"used more than {self.limits.cpu_seconds:g} s of processor time"
        if status < 0:
            return f"ended by signal {-status}"
        return f"ended with exit code {status}" if status else None

    def _started(self) -> socket.socket:
        if self._control is None and self.no_namespaces is None:
            self.no_namespaces = self._start(namespaces=True).get("no_namespaces")
            if self.no_namespaces is not None:
                self._stop()
        if self._control is None:
            self._start(namespaces=False)
        assert self._control is not None
        return self._control

    def _start(self, *, namespaces: bool) -> dict[str, Any]:
        """Start a fork server; what it says of itself."""
        self.folder = Path(tempfile.mkdtemp(prefix="posttrain-sandbox-"))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "folder": str(self.folder),
            "limits": asdict(self.limits),
            "layers": asdict(self._layers),
            "namespaces": namespaces,
        }
        self._control = ours
        with theirs:
            self._server = subprocess.Popen(
                [self._python, *OPTIONS, "-c", START, str(ROOT), json.dumps(settings)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        ours.settimeout(START_SECONDS)
        try:
            message = ours.recv(4096)
        except TimeoutError:
            message = b""
        if not message:
            self._stop()
            raise SandboxError(f"the fork server ({self._python}) did not start")
        ours.settimeout(None)
        return dict(json.loads(message))

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._server is not None:
            try:
                self._server.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._server.kill()  # what it started is killed with it
                self._server.wait()
            self._server = None
        if self.folder is not None:
            with contextlib.suppress(OSError):  # a program may still be ending if its server had to be killed
                folder.empty(self.folder)
                self.folder.rmdir()
            self.folder = None
