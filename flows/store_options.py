"""The options of the commands that look after a store."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from flows.option_types import count, not_negative

LISTED = 100


def add_store_care(add: Callable[..., argparse.ArgumentParser], reference: str) -> None:
    """`ls`, `du`, `gc`, `verify`, `export` and `import`; `reference` says what names an artifact."""
    ls = add("ls", "the artifacts and runs of the store, newest first")
    ls.add_argument("--kind", metavar="K", help="artifacts of this kind only")
    ls.add_argument("--limit", type=count, default=LISTED, metavar="N", help="so many artifacts (100); 0: all")
    add("du", "what takes how much room: by kind, stage, recipe, run and alias")
    gc = add("gc", "say what nothing needs any more, and why; with --delete, delete it")
    gc.add_argument("--delete", action="store_true", help="delete what goes; without it nothing is changed")
    for option, default, text in (
        ("runs", 20, "keep what the newest N runs made or used"),
        ("days", 30, "and what runs of the last N days did, and unfinished work so young"),
        ("reward-days", 180, "keep cached rewards of which some were paid in the last N days"),
    ):
        gc.add_argument(f"--keep-{option}", type=count, default=default, metavar="N", help=f"{text} ({default})")
    text = "keep everything that was stored or used in the last H hours (24)"
    gc.add_argument("--grace-hours", type=not_negative, default=24.0, metavar="H", help=text)
    verify = add("verify", "read everything again and name what is damaged")
    verify.add_argument("artifact", nargs="*", help=f"{reference}; none: all artifacts, checkpoints, records, names")
    export = add("export", "copy an artifact into a folder that `import` takes")
    export.add_argument("artifact", help=reference)
    export.add_argument("folder", type=Path, metavar="DIR")
    export.add_argument("--lineage", action="store_true", help="with all that it was made from")
    add("import", "take over an exported folder, every byte checked").add_argument("folder", type=Path, metavar="DIR")
