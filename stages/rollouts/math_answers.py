"""Mathematical answers, compared by math-verify in a process of its own.

sympy can compute for hours on a hostile formula, and math-verify's own limits are signals of a main thread. The
worker's limit is processor time that the kernel counts, so it holds in any thread and however busy the machine is.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from artifacts.errors import RequestError
from stages.rollouts.reward_base import OvertimeError, text_of
from stages.rollouts.verdicts import Verdict

_WORKER = Path(__file__).with_name("math_worker.py")


class Math(Verdict):
    """1 where the answer equals the right one as mathematics (math-verify); None where the right one is unreadable."""

    extraction: Literal["latex", "any"] = "latex"
    """What counts as an answer: LaTeX in a box or after "the final answer is" (TRL's accuracy_reward), or numbers and
    formulas outside LaTeX too."""
    after: str | None = Field(None, min_length=1)
    """Only what follows the last of these, such as "</think>", counts; a completion without it is wrong."""
    comparison_seconds: float = Field(5.0, gt=0)
    """Processor time of one comparison; an answer that takes longer is wrong."""

    def prepare(self) -> None:
        from importlib.util import find_spec

        if find_spec("math_verify") is None:
            raise RequestError("reward math needs the package math-verify; install it")

    def score(
        self, completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None] | list[float | Exception | None]:
        return [
            None if reference is None else self._verdict(reference, text_of(made))
            for made, reference in zip(completions, self.references(columns), strict=True)
        ]

    def _verdict(self, reference: str, text: str) -> float | Exception | None:
        if self.after is not None:
            _before, found, text = text.rpartition(self.after)
            if not found:
                return 0.0
        return WORKER.compare(reference, text, self.extraction, self.comparison_seconds)


class MathWorker:
    """Starts `math_worker.py` when it is needed, and again when a comparison ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def compare(self, reference: str, text: str, extraction: str, seconds: float) -> float | Exception | None:
        """1, 0, None (the reference holds no mathematics), or an error where the reference is what takes too long."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([reference, text, extraction, seconds]) + "\n")
            process.stdin.flush()
            reference_was_read = process.stdout.readline()
            verdict = process.stdout.readline() if reference_was_read else ""
        except BaseException:  # a limit of the caller: an answer that comes later must not count for another text
            self.stop()
            raise
        if verdict:
            found: float | None = json.loads(verdict)
            return found
        self.stop()
        if reference_was_read:
            return 0.0
        return OvertimeError(f"math-verify could not read the right answer {reference!r:.100} in {seconds:g} s")

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={},  # nothing that it could give away
                text=True,
                encoding="utf-8",
            )
        return self._process


WORKER = MathWorker()
atexit.register(WORKER.stop)
