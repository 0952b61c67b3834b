"""What DeepSpeed compiles on CPUs is built by one process after the other, whoever of them was killed."""

import subprocess
import sys
from pathlib import Path

from stages.training.compiled import build_alone

BUILDER = """
import os, sys
from pathlib import Path
from stages.training.compiled import build_alone

def build():
    (Path(sys.argv[1]) / "lock").touch()  # as torch's builder does
    print("building", flush=True)
    sys.stdin.read()

build_alone(Path(sys.argv[1]), build)
"""


def started(folder: Path) -> subprocess.Popen[bytes]:
    """A builder that goes on until its input ends."""
    command = [sys.executable, "-c", BUILDER, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])


def test_nobody_waits_for_who_was_killed_while_building(tmp_path: Path) -> None:
    with started(tmp_path) as one:
        assert one.stdout is not None and one.stdout.readline() == b"building\n"
        with started(tmp_path) as two:
            assert two.stdout is not None and two.stdin is not None
            one.kill()
            assert two.stdout.readline() == b"building\n"
            two.stdin.close()
    seen = []
    build_alone(tmp_path, lambda: seen.append((tmp_path / "lock").exists()))
    assert seen == [False]


def test_one_builds_at_a_time(tmp_path: Path) -> None:
    with started(tmp_path) as one:
        assert one.stdout is not None and one.stdin is not None and one.stdout.readline() == b"building\n"
        with started(tmp_path) as two:
            assert two.stdout is not None and two.stdin is not None
            assert (tmp_path / "lock").exists()  # the second has not taken it away from the first
            one.stdin.close()
            assert two.stdout.readline() == b"building\n"
            two.stdin.close()
