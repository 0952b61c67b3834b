"""What a campaign found: how much was tried, what was wrong, and how to try the same again."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"


@dataclass
class Outcome:
    """`counts`: how many of what were tried ("kills": 200); `notes`: what was measured; `anomalies`: one line each."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    anomalies: list[str] = field(default_factory=list)

    def line(self) -> str:
        """`1,000,000 crash states, 0 anomalies, seed 1, commit 0123abc`"""
        tried = [f"{count:,} {what}" for what, count in self.counts.items()]
        return ", ".join(
            [*tried, *self.notes, f"{len(self.anomalies):,} anomalies, seed {self.seed}, commit {commit()}"]
        )


def commit() -> str:
    """The commit of the source tree, with a + where files of the packages differ from it."""
    try:
        found = _git("rev-parse", "--short", "HEAD").strip()
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "artifacts", "stages", "flows")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{found}{'+' if changed.strip() else ''}"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True).stdout


def append(path: Path, command: str, outcome: Outcome) -> None:
    """One row for RESULTS.md."""
    machine = f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}"
    row = f"| {datetime.now(UTC):%Y-%m-%d %H:%M} | {machine} | `{command}` | {outcome.line()} |\n"
    with open(path, "a", encoding="utf-8") as file:
        file.write(row)
