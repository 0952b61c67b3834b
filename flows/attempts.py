"""Stages that went on from earlier work: at which step, and what the attempts before took that gave nothing.

Each of these left its job folder on this machine.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT = "result.json"
_SIGNS = ("events.jsonl", "log.txt", "exit.json", "error.json", RESULT)
"""Files that a stage's process or its supervisor writes, the last of them at the end."""


@dataclass(frozen=True)
class Attempt:
    """One job folder. Times are of its files, in seconds since 1970."""

    began: float
    ended: float
    """The last sign of life, where the attempt was killed with its supervisor."""
    done: bool


@contextlib.contextmanager
def timed(in_vain: list[float], failure: type[Exception]) -> Iterator[None]:
    """Adds the seconds inside where they end with this failure, which goes on."""
    began = time.monotonic()
    try:
        yield
    except failure:
        in_vain.append(time.monotonic() - began)
        raise


def earlier_seconds(scratch: Path, fingerprint: str, job: Path) -> list[float]:
    """Of each attempt at this fingerprint since the last one that gave a result, but for `job`; none where they were on
    another machine."""
    found = [
        attempt
        for path in scratch.glob("*/*/spec.json")
        if path.parent != job and (attempt := _attempt(path, fingerprint)) is not None
    ]
    since = max((attempt.ended for attempt in found if attempt.done), default=0.0)
    return [attempt.ended - attempt.began for attempt in found if not attempt.done and attempt.began >= since]


def _attempt(spec: Path, fingerprint: str) -> Attempt | None:
    """None: of another stage, or a folder that is being removed."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if json.loads(spec.read_text(encoding="utf-8")).get("fingerprint") != fingerprint:
            return None
        began = spec.stat().st_mtime
        signs = [path.stat().st_mtime for name in _SIGNS if (path := spec.parent / name).exists()]
        return Attempt(began, max([began, *signs]), (spec.parent / RESULT).exists())
    return None


def resumed_at(entry: Mapping[str, Any]) -> int | None:
    """The step at which a stage went on; an entry may be an older version's, or anybody's."""
    step = entry.get("resumed_from")
    return step if isinstance(step, int) else None


def state_in_words(entry: Mapping[str, Any]) -> str:
    """`ran, resumed at step 40`"""
    step = resumed_at(entry)
    return str(entry["state"]) if step is None else f"{entry['state']}, resumed at step {step:,}"


def total_seconds(entry: Mapping[str, Any]) -> float | None:
    """With the attempts before; None: there are none, or they are not known."""
    both = entry.get("seconds"), entry.get("earlier_seconds")
    known = [seconds for seconds in both if isinstance(seconds, int | float)]
    return float(sum(known)) if len(known) == len(both) else None
