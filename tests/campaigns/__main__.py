"""Campaigns: what the suite samples, in full. `python -m tests.campaigns power_loss --states 1000000 --seed 3`.

Each prints one line, "1,000,000 crash states, 0 anomalies, seed 3, commit 0123abc", after the anomalies; `--record`
adds the line with date, machine and command to RESULTS.md. The exit status is 1 if there was an anomaly. Seeds make
pieces of a campaign that add up.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.campaigns.outcome import RESULTS, Outcome, append

SHOWN = 20
CAMPAIGNS = {
    # name: (function, what is counted, how many by default, what it does)
    "power_loss": ("power_loss:campaign", "states", 1_000_000, "power cuts between all steps on a local store"),
    "store_kills": ("store_kills:campaign", "kills", 10_000, "a process dies at every call to its store"),
    "process_kills": ("process_kills:campaign", "kills", 200, "SIGKILL of the processes of real runs"),
    "cancels": ("cancels:campaign", "cancels", 500, "cancel a stage whose processes resist"),
    "faults": ("storage_faults:campaign", "step", 1, "every fault at every call (every STEPth, the first by the seed)"),
    "races": ("races:campaign", "artifacts", 1000, "eight writers, readers that rehash, and a collector"),
    "races_s3": ("races:s3_campaign", "artifacts", 1000, "the same on a real S3 server, without a collector"),
    "flow_races": ("flow_races:campaign", "races", 100, "eight flows want the same and different stages, local and S3"),
    "random_faults": ("storage_faults:random_campaign", "runs", 1000, "one call in ten to the store fails"),
    "compound": (
        "compound:campaign",
        "pairs",
        500,
        "a process dies or a store fails while the first trouble is mended",
    ),
    "mutations": ("mutations:campaign", "mutations", 200_000, "spoiled recipes, rows, manifests, headers, templates"),
    "corruption": ("corruption:campaign", "flips", 2000, "damage of every kind in a store"),
    "soak": ("soak:campaign", "minutes", 15, "recipes again and again beside one server: memory and handles stay"),
    "simulation": (
        "simulation:campaign",
        "operations",
        5_000_000,
        "operations on stores in memory beside a model of them",
    ),
    "mutants": ("mutants:campaign", "bugs", 100, "planted bugs, each of which one of the others must find"),
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__.split("\n\n")[0])
    campaigns = parser.add_subparsers(dest="campaign", required=True)
    for name, (_, unit, default, text) in CAMPAIGNS.items():
        campaign = campaigns.add_parser(name, help=text)
        campaign.add_argument(f"--{unit}", dest="count", type=int, default=default, help="default: %(default)s")
        campaign.add_argument("--seed", type=int, default=0)
        campaign.add_argument("--record", action="store_true", help="add the line to RESULTS.md")
        if name == "process_kills":
            campaign.add_argument("--clean", type=Path, metavar="FILE", help="keep the result of the clean run there")
        if name == "cancels":
            campaign.add_argument("--at-once", type=int, default=8, help="side by side (default: %(default)s)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> Outcome:
    """The campaign that the command line asks for."""
    module, _, function = CAMPAIGNS[options.campaign][0].partition(":")
    known = ("campaign", "count", "seed", "record")
    further = {name: value for name, value in vars(options).items() if name not in known}
    campaign: Callable[..., Outcome] = getattr(importlib.import_module(f"tests.campaigns.{module}"), function)
    return campaign(options.count, options.seed, **further)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    logging.disable(logging.ERROR)  # what is damaged on purpose is named there by the thousand
    outcome = run(options)
    for anomaly in outcome.anomalies[:SHOWN]:
        print(anomaly)
    print(outcome.line())
    if options.record:
        command = shlex.join(["python", "-m", "tests.campaigns", *(a for a in arguments if a != "--record")])
        append(RESULTS, command, outcome)
    return 1 if outcome.anomalies else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
