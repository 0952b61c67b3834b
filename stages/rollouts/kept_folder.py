"""A folder that goes when this process does, however it ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from stages.rollouts import server_guard

_OWNER = "owner"
"""A file that the owner holds locked; the kernel lets go of it for one that is dead."""


class KeptFolder:
    """A private folder. A process beside this one removes it."""

    def __init__(self, place: Path, prefix: str) -> None:
        """`prefix`: of the folder's name."""
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        draft = self.path / f"{_OWNER}.draft"
        self._lock = os.open(draft, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        draft.rename(self.path / _OWNER)  # under this name it is locked from the first: whoever sees it free may remove
        self._keeper = subprocess.Popen(
            [sys.executable, "-P", server_guard.__file__, str(self.path)], stdin=subprocess.PIPE, start_new_session=True
        )

    def remove(self) -> None:
        """Now, and wait until it is gone."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait()
        os.close(self._lock)


def remove_forgotten(place: Path, prefix: str) -> None:
    """Folders that were left there because all was killed at once. Only where locks are this machine's own."""
    for path in place.glob(f"{prefix}*"):
        try:
            lock = os.open(path / _OWNER, os.O_RDWR)
        except OSError:
            continue  # another user's, or just being made
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(lock)
