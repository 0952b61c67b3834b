"""Options of `posttrain sweep`. Imports nothing of ours: `--help` needs none of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_sweep(add: Callable[..., argparse.ArgumentParser], recipe: Any) -> None:
    """Adds sweep; `recipe` is the parent that names a recipe and what of it runs."""
    sweep = add("sweep", "run a recipe with every combination of the values given, best first", recipe)
    sweep.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="A.B=C,D",
        help="a setting and its values: dpo.beta=0.05,0.1 (repeatable: every value with every other)",
    )
    sweep.add_argument(
        "--metric",
        metavar="STAGE.METRIC",
        help="what trials are judged by (default: the main metric of the last evaluation, or else of the last stage)",
    )
    sweep.add_argument(
        "--best",
        choices=("highest", "lowest"),
        help="which end of the metric is best (default: lowest of losses and the like, else highest)",
    )
    sweep.add_argument("--name", help="of the sweep (default: the recipe's, and what is made of what is asked for)")
    sweep.add_argument(
        "--parallel", type=_at_least_one, default=1, metavar="N", help="so many trials at once (default: 1)"
    )


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text}")
    return int(text)
