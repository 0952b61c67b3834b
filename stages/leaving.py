"""How a process ends when all is recorded."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """End at once: threads that libraries leave behind (gloo's, where several processes worked together) can abort an
    interpreter that takes itself down."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
