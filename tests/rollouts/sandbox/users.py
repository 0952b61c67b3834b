"""Drivers of a sandbox as several users. An ordinary user needs a Python and the sandbox's files where it may read."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import LIMIT_SECONDS

ROOT = Path(__file__).parents[3]
NOBODY = 65534
QUICK = {"cpu_seconds": 1, "wall_seconds": 1.5}
"""Limits for attacks, of which many last as long as they are let."""


@dataclass(frozen=True)
class Mode:
    """Who runs the sandbox."""

    ordinary: bool = False
    without_capabilities: bool = False
    namespaces: bool = True


MODES = {
    "root": Mode(),
    "root-bare": Mode(without_capabilities=True, namespaces=False),
    "ordinary": Mode(ordinary=True),
    "ordinary-bare": Mode(ordinary=True, namespaces=False),
}
"""Bare: as in most containers, which have no namespaces to give."""


def python_for_all(folder: Path) -> str:
    """An interpreter that every user can start: this one, or a copy of it and its library."""
    base = Path(sys.executable).resolve()
    if os.getuid() != 0 or _starts(str(base)):
        return str(base)
    library = Path(os.__file__).parent
    copied = folder / "python"
    (copied / "bin").mkdir(parents=True)
    skipped = shutil.ignore_patterns("site-packages", "test", "tests", "idlelib", "ensurepip", "config-*")
    shutil.copytree(library, copied / "lib" / library.name, ignore=skipped, copy_function=_linked)
    _linked(str(base), str(copied / "bin" / base.name))
    return str(copied / "bin" / base.name)


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _starts(python: str) -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run([python, "-I", "-S", "-c", ""], user=NOBODY, group=NOBODY, cwd="/").returncode == 0
    return False


def copied_sandbox(folder: Path) -> Path:
    """The sandbox's files alone, as another user can read them."""
    for package in ("stages", "stages/rollouts", "stages/rollouts/sandbox"):
        (folder / package).mkdir(parents=True, exist_ok=True)
        sources = (ROOT / package).glob("*.py") if package.endswith("sandbox") else [ROOT / package / "__init__.py"]
        for source in sources:
            shutil.copy(source, folder / package)
    shutil.copy(Path(__file__).with_name("driver.py"), folder)
    return folder


class Driver:
    """A driver process. `secret` stands in its environment."""

    def __init__(self, python: str, files: Path, mode: Mode, secret: str, **settings: object) -> None:
        as_nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if mode.ordinary and not os.getuid() else {}
        whole = {
            "limits": QUICK,
            "offer": None,
            "namespaces": mode.namespaces,
            "without_capabilities": mode.without_capabilities,
            **settings,
        }
        self.process = subprocess.Popen(
            [python, "-S", str(files / "driver.py"), str(files), json.dumps(whole)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"SECRET": secret},
            cwd="/",
            **as_nobody,
        )
        self.folder = ""
        """Of the sandbox."""
        self.no_namespaces: str | None = None

    def values(self, source: str, expressions: list[str]) -> list:
        """[[data, error], ...]"""
        return self._ask({"source": source, "expressions": expressions})

    def output(self, source: str, standard_input: str = "") -> list:
        """[text, problem]"""
        return self._ask({"source": source, "standard_input": standard_input})

    def _ask(self, request: dict) -> list:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the driver is gone"
        about = json.loads(line)
        self.folder, self.no_namespaces = about["folder"], about["no_namespaces"]
        return about["answer"]

    def close(self) -> int:
        """Its exit code."""
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait(LIMIT_SECONDS)


def processes_of(folder: str) -> list[int]:
    """Those with a sandbox's folder in their command line, which what they fork inherits."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                line = Path("/proc", entry, "cmdline").read_bytes()
                if folder.encode() in line and b"stages.rollouts.sandbox" in line:
                    found.append(int(entry))
    return found
