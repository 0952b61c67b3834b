"""The commands of a lasting Prefect and its runs: ui, cancel, deploy, schedule.

Each takes the parsed options and gives the exit status.
"""

from __future__ import annotations

import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from artifacts.errors import RequestError
from flows.holder import Place, holder
from flows.request import open_named, print_json
from flows.server import QUIET, configured_url, prefect_home, require_answer

if TYPE_CHECKING:
    from flows.prefect_cancel import PrefectPages

ALERT_URL = "POSTTRAIN_ALERT_URL"
"""Environment variable: where it is told that a deployed run failed. It may hold a secret, so it is no option, which a
list of processes would show."""


def ui(options: Namespace) -> int:
    """`posttrain ui`"""
    from flows.lasting import Lasting, serve

    home = prefect_home()
    theirs = configured_url()

    def started(place: Place, before: bool) -> None:
        found = {"address": place.address, "api": place.url, "pool": place.pool, "home": str(home), "pid": place.pid}
        if options.json:
            print_json({**found, "state": "running before" if before else "started"})
        else:
            how = f"runs already, as process {place.pid}" if before else "runs until Ctrl-C"
            print(f"Prefect {how}: {place.address}")
            print(f"  runs and schedules are kept in {home / 'prefect.db'}")
            print(f"  its worker takes the runs of the pool {place.pool}; its output: {home / 'worker' / 'log.txt'}")
            if theirs is not None and theirs != place.url:
                print(f"  but PREFECT_API_URL says {theirs}, so `posttrain run` reports there; unset it to report here")
        sys.stdout.flush()

    store = open_named(options).url
    slots = dict(_slot(text) for text in options.slots)
    serve(Lasting(home, options.port, options.pool, slots, store, _alert_url()), started, _say)
    return 0


def cancel(options: Namespace) -> int:
    """`posttrain cancel`"""
    from flows.cancel import cancel as end
    from flows.cancelled import in_words

    store = open_named(options)
    with contextlib.ExitStack() as stack:
        answer = end(store, options.run, _pages(stack), _say)
    if options.json:
        print_json(answer.to_json())
    else:
        print("\n".join(in_words(answer)))
    return 0


def _pages(stack: contextlib.ExitStack) -> PrefectPages | None:
    """What the Prefect at hand knows of runs. One that does not answer is said: a run of this machine needs none."""
    theirs = _settle_prefect()
    try:
        url = _api_url(theirs)
    except RequestError as error:
        if theirs is not None:
            _say(f"without Prefect: {error}")
        return None
    from flows.prefect_api import api
    from flows.prefect_cancel import PrefectPages

    return PrefectPages(stack.enter_context(api(url)))


def deploy(options: Namespace) -> int:
    """`posttrain deploy`"""
    if options.name is not None and len(options.recipe) > 1:
        raise RequestError("--name names one deployment; give one recipe, or leave it out: each has its recipe's name")
    theirs = _settle_prefect()
    from flows.prefect_api import api
    from flows.prefect_check import all_checked
    from flows.prefect_deploy import Deployable, When, require_place
    from flows.prefect_deploy import deploy as make
    from flows.prefect_schedule import existing, rows
    from flows.redeployed import changes, checked_in_words, in_words

    # what is wrong with the request is said with and without a server
    when = When(options.cron, options.interval, options.timezone)
    when.schedules()
    read = [Deployable.read(recipe, options.set) for recipe in options.recipe]
    names = [options.name or what.recipe.name for what in read]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"several of the recipes are called {', '.join(twice)}; deploy them apart, each with --name")
    url = _api_url(theirs)
    store = open_named(options).url
    with api(url) as client:
        for what, name in zip(read, names, strict=True):
            require_place(client, what, name, options.pool)
        before = existing(client, names)
        named = dict(zip(names, read, strict=True))
        looked = {} if options.unchecked else all_checked(client, named, options.pool, store, _say)
        for what, name in zip(read, names, strict=True):
            make(client, what, name, when, pool=options.pool, store=store)
        made = rows(client, names)
    for row in made:
        row["changed"] = changes(before.get(row["name"], row), row)
        row["checked"] = looked.get(row["name"])
    _show(options, url, made)
    if not options.json:
        for line in (line for row in made for line in (*in_words(row["name"], row["changed"]), *checked_in_words(row))):
            print(line)
    return 0


def schedule(options: Namespace) -> int:
    """`posttrain schedule`"""
    if options.action != "list" and not options.name:
        raise RequestError(f"say which: posttrain schedule {options.action} NAME; `posttrain schedule` lists them")
    if options.cancel and options.action != "remove":
        raise RequestError("--cancel goes with `posttrain schedule remove NAME`; `posttrain cancel RUN` ends one run")
    url = _api_url(_settle_prefect())
    from flows.prefect_api import api
    from flows.prefect_schedule import ACTIONS, remove

    with api(url) as client:
        if options.action == "remove":
            _show_removed(options, url, remove(client, options.name, options.cancel))
        else:
            _show(options, url, ACTIONS[options.action](client, options.name))
    return 0


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    command.__name__: command for command in (ui, cancel, deploy, schedule)
}


def _settle_prefect() -> str | None:
    """Prefect's environment, before it is imported. Gives the API that the user has set."""
    os.environ.update(QUIET)
    theirs = configured_url()
    if theirs is None:
        prefect_home().mkdir(parents=True, exist_ok=True)
        os.environ["PREFECT_HOME"] = str(prefect_home())
    return theirs


def _api_url(theirs: str | None) -> str:
    """The API that deployments are kept by. Raises RequestError where there is none."""
    if theirs is not None:
        require_answer(theirs)
        return theirs
    if (place := holder(prefect_home())) is not None:
        return place.url
    raise RequestError(
        "no Prefect server keeps deployments here: start `posttrain ui` in another terminal, or set PREFECT_API_URL"
    )


def _show(options: Namespace, url: str, rows: list[dict[str, Any]]) -> None:
    if options.json:
        print_json({"api": url, "deployments": rows})
    else:
        from flows.schedule_table import of_paused, schedule_table
        from flows.tables import show

        show(schedule_table(rows, url))
        for line in (line for row in rows for line in of_paused(row)):
            print(line)


def _show_removed(options: Namespace, url: str, rows: list[dict[str, Any]]) -> None:
    if options.json:
        print_json({"api": url, "removed": rows})
    else:
        for row in rows:
            if row["cancelled"]:
                print(f"cancelled: {', '.join(row['cancelled'])}")
            print(f"removed: {row['name']}, which was {row['state']} and ran {row['recipe']}")
        print("its runs, their results and reports stay")


def _slot(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    if not name or not size.isdecimal() or int(size) < 1:
        raise RequestError(f"--slots {text}: expected NAME=N with N of at least 1, for example gpu=2")
    return name, int(size)


def _alert_url() -> str | None:
    """Taken out of the environment, for neither the worker nor its runs need it. Raises RequestError for no address."""
    url = os.environ.pop(ALERT_URL, None) or None
    parts = urlsplit(url or "")
    if url is not None and not (parts.scheme in ("http", "https") and parts.hostname):
        raise RequestError(f"{ALERT_URL} is no address to post to; give one that begins with https:// or http://")
    return url


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
