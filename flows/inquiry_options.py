"""Options of the commands that ask about the past. Imports nothing heavy: `--help` needs none of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.option_types import count, place

RUN = "the id of a run or its beginning, `latest`, or `latest~1`: the one before"


def add_inquiries(add: Callable[..., argparse.ArgumentParser], changed: Any, reference: str) -> None:
    """Adds why, diff and the like; `changed` is the parent that has --set, `reference` says how artifacts are named."""
    why = add("why", "why a stage will run, ran or was cached, followed to the cause", changed)
    why.add_argument("stage")
    why.add_argument("--recipe", metavar="R", help="what a run of this recipe would do (default: what the run did)")
    why.add_argument("--run", help=f"{RUN} (default: the newest that has the stage)")
    diff = add("diff", "what two runs differ in, and what followed from it; or more, or a sweep's, as a table")
    diff.add_argument("runs", nargs="+", metavar="run", help=f"{RUN}; or a sweep's name: its trials, best first")
    again = add("reproduce", "run again what made an artifact, from its manifest, and compare bit for bit")
    again.add_argument("artifact", help=reference)
    again.add_argument(
        "--files",
        action="append",
        type=place,
        metavar="FOLDER",
        help="where source data, code and models lie now, a folder or a URL (s3://bucket/folder, https://host/file); "
        "they are found by content (repeatable; default: the working folder)",
    )
    again.add_argument(
        "--folder", type=Path, metavar="DIR", help="work here, and keep it (default: the store's scratch)"
    )
    lineage = add("lineage", "what an artifact was made of, down to the files, and what was made of it")
    lineage.add_argument("artifact", help=reference)
    trace = add("trace", "a score's samples, their source rows, and the rows behind the model")
    trace.add_argument("evaluation", help=reference)
    trace.add_argument("metric", nargs="?", help="of the evaluation (default: its main one)")
    verdict = trace.add_mutually_exclusive_group()
    verdict.add_argument("--wrong", action="store_true", help="only samples that are wrong")
    verdict.add_argument("--right", action="store_true", help="only samples that are right")
    trace.add_argument("--row", metavar="ID", help="only samples of rows whose id begins so")
    trace.add_argument("--limit", type=count, default=10, metavar="N", help="of samples and rows (default: 10; 0: all)")
    trace.add_argument("--rows", action="store_true", help="list the rows that trained the model")
    tokens = add("tokens", "rows as a stage's model will read them, and which tokens are learned", changed)
    tokens.add_argument("recipe", metavar="RECIPE", help="a YAML file or the name of a shipped recipe")
    tokens.add_argument("stage")
    tokens.add_argument("--row", metavar="ID", help="only rows whose id begins so")
    tokens.add_argument("--limit", type=count, default=3, metavar="N", help="of rows (default: 3; 0: all)")
    tokens.add_argument("--input", default="dataset", metavar="NAME", help="of the stage (default: dataset)")
    tokens.add_argument("--ids", action="store_true", help="a line a token, with its id")
    ledger = add("ledger", "what a run or an artifact took, stage by stage, and what the cache saved")
    ledger.add_argument("of", nargs="?", default="latest", metavar="run", help=f"{RUN} (the default); or {reference}")
