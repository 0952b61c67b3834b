"""Stages that die in the middle, in the process of the tests or in one of their own, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from artifacts import Shards
from stages.context import Context
from tests.stages.small_models import output
from tests.warm import Warm

ROOT = Path(__file__).parents[2]
_PROGRAM = """
import os, signal, sys
import stages.__main__
from stages.training.loop import Trainer

step = Trainer.step

def deadly(self, number, total, window):
    if number == {number}:
        {before}
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, total, window)

Trainer.step = deadly
sys.exit(stages.__main__.main([sys.argv[1]]))
"""


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the stage sees it."""


@contextmanager
def killed_in(owner: Any, name: str, *, calls: int, after: bool = False) -> Iterator[None]:
    """The process dies in place of one of the calls, or right `after` it."""
    original, done = getattr(owner, name), []

    def deadly(*arguments: Any, **keywords: Any) -> Any:
        done.append(name)
        result = original(*arguments, **keywords) if after or len(done) != calls else None
        if len(done) == calls:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, deadly)
        yield


def kill_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Die right after so many shards are saved."""
    original, done = Shards.save, []

    def save(self: Shards, name: str, data: bytes) -> None:
        original(self, name, data)
        done.append(name)
        if len(done) == saves:
            raise Killed

    monkeypatch.setattr(Shards, "save", save)


def process_killed_in_step(
    context: Context, number: int, spec: Path, warm: Warm | None = None, *, saved: bool = True
) -> None:
    """SIGKILL to a process that works on it, in place of the step of that number; `saved`: once the state before is
    written, which may else be torn. `spec`: where what it is told is put. `warm`: whom it is asked of; None: it is
    started from nothing."""
    spec.write_text(json.dumps(asdict(context.spec)))
    program = _PROGRAM.format(number=number, before="self.saver.background.wait()" if saved else "pass")
    killed = (warm.run if warm else _run)("-c", program, str(spec))
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def files_of(folder: Path, *, leave: Sequence[str] = ()) -> dict[str, bytes]:
    """Relative path -> content, but for files of these names."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in leave)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same(context: Context, whole: Context, name: str = "model") -> None:
    """The output has the bytes of the other one's."""
    found, expected = (files_of(output(one, name)) for one in (context, whole))
    assert found.keys() == expected.keys()
    assert [path for path in found if found[path] != expected[path]] == []
