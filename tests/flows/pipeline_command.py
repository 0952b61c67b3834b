"""The tests' recipe in a process of its own, as from a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

HERE = Path(__file__).parent


class Command:
    """The run as a process, reporting to `api`, or else to a temporary Prefect server of its own."""

    def __init__(self, folder: Path, home: Path, *overrides: str, api: str | None = None) -> None:
        env = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "PREFECT_HOME": str(home)}
        env.pop("PREFECT_API_URL", None)
        env |= {"PREFECT_API_URL": api} if api is not None else {}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "pipeline_process.py"), str(folder), *overrides],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)
