"""Following files that another process appends to."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from artifacts.sealed import scrub
from stages.context import FAILED_LINE

logger = logging.getLogger(__name__)
LONGEST_LINE_BYTES = 100_000
"""A longer one is passed on in pieces; Prefect's log cuts a record at 1 MB."""
_LAST_LINES, _LAST_BYTES = 400, 200_000
"""What is looked at of a log's end; the file may be huge."""

_WARNING = re.compile(r"\b(WARN(ING)?|ERROR|CRITICAL|FATAL)\b|\b\w*(Error|Exception|Warning)\b(:|$)")
_IDLE = re.compile(r"\[real_accelerator\.py:\d+:get_accelerator\] Setting accelerator to CPU\.")
"""DeepSpeed, where it is installed, of every machine without GPU: also of stages that do not use it."""


def is_warning(line: str) -> bool:
    """Whether a line of a stage's output is worth a place in the flow's log."""
    return _WARNING.search(line) is not None and _IDLE.search(line) is None


def follow_lines(path: Path) -> Iterator[list[str]]:
    """Each `next` gives the lines completed since the last; a progress bar's carriage return ends one too."""
    position, rest = 0, b""
    while True:
        rest += _read_from(path, position + len(rest))
        *lines, tail = re.split(rb"[\r\n]+", rest)
        if len(tail) > LONGEST_LINE_BYTES:
            lines, tail = [*lines, tail], b""
        position, rest = position + len(rest) - len(tail), tail
        yield [line.decode("utf-8", "replace") for line in lines if line.strip()]


def before_failure(following: Iterator[list[str]]) -> Iterator[list[str]]:
    """The lines that a stage's process and its launcher write until it fails: what they write of that is not news."""
    failed = False
    for lines in following:
        if not failed and FAILED_LINE in lines:
            yield lines[: lines.index(FAILED_LINE)]
            failed = True
        else:
            yield [] if failed else lines


def follow_json(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Each `next` gives the objects whose line was completed since the last."""
    for lines in follow_lines(path):
        yield [json.loads(line) for line in lines]


def last_lines(path: Path) -> list[str]:
    """The last non-empty lines of a file that may be huge or absent."""
    try:
        start = max(0, path.stat().st_size - _LAST_BYTES)
    except FileNotFoundError:
        return []
    lines = re.split(rb"[\r\n]+", _read_from(path, start))
    return [line.decode("utf-8", "replace") for line in lines if line.strip()][-_LAST_LINES:]


def scrub_file(path: Path) -> None:
    """Takes secrets out of a file that has been written to its end. Stages print none; what starts them, or could not,
    may print its whole environment."""
    clean = path.with_name(f"{path.name}.clean")
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            with open(clean, "w", encoding="utf-8", errors="surrogateescape", newline="") as written:
                changed = [_copied(lines, written) for lines in iter(lambda: file.readlines(2**20), [])]
        if any(changed):
            clean.replace(path)
    except OSError as error:  # a full disk: what failed is said elsewhere
        logger.warning("%s was not looked through for secrets: %s", path, error)
    finally:
        clean.unlink(missing_ok=True)


def _copied(lines: list[str], target: IO[str]) -> bool:
    text = "".join(lines)
    clean = scrub(text)
    target.write(clean)
    return clean != text


def _read_from(path: Path, offset: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read()
    except FileNotFoundError:
        return b""  # the stage has not written yet
