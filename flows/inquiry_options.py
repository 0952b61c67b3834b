"""Options of the commands that ask about the past. Imports nothing of ours: `--help` needs none of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

RUN = "the id of a run or its beginning, `latest`, or `latest~1`: the one before"


def add_inquiries(add: Callable[..., argparse.ArgumentParser], changed: Any, reference: str) -> None:
    """Adds why, diff and the like; `changed` is the parent that has --set, `reference` says how artifacts are named."""
    why = add("why", "why a stage will run, ran or was cached, followed to the cause", changed)
    why.add_argument("stage")
    why.add_argument("--recipe", metavar="R", help="what a run of this recipe would do (default: what the run did)")
    why.add_argument("--run", default="latest", help=f"{RUN} (the default)")
    diff = add("diff", "what two runs differ in, and what followed from it")
    diff.add_argument("run", help=RUN)
    diff.add_argument("other", metavar="run", help="the other one")
