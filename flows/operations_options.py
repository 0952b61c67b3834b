"""Options of the commands of a lasting Prefect. Imports nothing heavy: `--help` needs none of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from flows.inquiry_options import RUN
from flows.option_types import duration, one_of, port

POOL = "posttrain"
ACTIONS = ("list", "pause", "resume", "remove")


def add_operations(add: Callable[..., argparse.ArgumentParser], changed: Any) -> None:
    """Adds ui, cancel, deploy and schedule; `changed` is the parent that has --set."""
    ui = add("ui", "a Prefect server with its pages and a worker, until Ctrl-C")
    ui.add_argument("--port", type=port, default=4200, help="of the loopback address (default: 4200; 0: a free one)")
    ui.add_argument("--pool", default=POOL, help=f"the work pool whose runs the worker takes (default: {POOL})")
    ui.add_argument(
        "--slots",
        action="append",
        default=[],
        metavar="NAME=N",
        help="a limit that stages share by launch.slots: gpu=2 (repeatable)",
    )
    cancel = add("cancel", "end a run, and wait until nothing of it is left")
    cancel.add_argument("run", help=f"{RUN}; its name in Prefect; or a sweep's name")
    deploy = add("deploy", "have a recipe run on a schedule, and from Prefect's pages", changed)
    deploy.add_argument("recipe", nargs="+", metavar="RECIPE", help="a YAML file or the name of a shipped recipe")
    when = deploy.add_mutually_exclusive_group()
    when.add_argument("--cron", metavar='"0 3 * * *"', help="minute, hour, day, month, weekday")
    when.add_argument(
        "--interval", type=duration, metavar="TIME", help="from one start to the next: seconds, 90s, 15m, 6h, 1d"
    )
    deploy.add_argument("--timezone", default="UTC", metavar="ZONE", help="of --cron: Europe/Berlin (default: UTC)")
    deploy.add_argument("--pool", default=POOL, help=f"the work pool that runs it (default: {POOL})")
    deploy.add_argument("--name", help="of the deployment (default: the recipe's)")
    deploy.add_argument(
        "--unchecked", action="store_true", help="do not look whether a run could begin: what it reads comes later"
    )
    schedule = add("schedule", "what is deployed, when it runs next and how it ran last")
    schedule.add_argument("action", nargs="?", default="list", type=one_of(ACTIONS), help=", ".join(ACTIONS))
    schedule.add_argument("name", nargs="*", help="of deployments; none: all that there are")
    schedule.add_argument("--cancel", action="store_true", help="with remove: cancel its runs in progress before")
