"""`posttrain cancel`: a run is told to end, as by the pages' Cancel, and waited for until nothing of it is left.

Knows no Prefect: what Prefect knows of runs comes in as `Pages` (`flows.prefect_cancel`), where there is one.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import psutil

from artifacts import Store
from artifacts.errors import RequestError
from artifacts.owner import lives_here
from flows.cancelled import Answer
from flows.left import Left
from flows.supervisors import JOB_VARIABLE
from flows.which_run import LATEST, starts
from flows.which_run import run_id as find_run
from stages.names import nearest

WAIT_SECONDS = 120.0
"""A run gives its stages nine seconds, and a busy machine takes its time."""
POLL_SECONDS = 0.2
_PARTS = 3
"""Of the id of a run that is of no sweep."""
_SUFFIX = 6
"""Characters at the end of a run's id, which its name in Prefect has as well: `gsm8k 3f9a1c`."""


@dataclass(frozen=True)
class Known:
    """A run as Prefect knows it. `worker`: one looks after it; `process`: who runs it, as in a lease, else None."""

    id: str
    name: str
    begun: bool
    worker: bool
    process: str | None


class Pages(Protocol):
    """What a Prefect at hand knows of runs, and does about them."""

    def known(self, flow_run: str) -> Known | None:
        """The run of that id of Prefect's."""

    def named(self, reference: str) -> Known | None:
        """The run that has not ended and is called so, or whose id of Prefect's begins so."""

    def names(self) -> list[str]:
        """Of runs that have not ended."""

    def ask(self, run: Known) -> None:
        """Tell it to end: what a worker looks after, the worker ends."""

    def has_ended(self, run: Known) -> bool:
        """Whether it is in a final state."""

    def close(self, run: Known) -> None:
        """Give a run without a worker, whose process is gone, its final state."""


def cancel(
    store: Store,
    reference: str,
    pages: Pages | None,
    say: Callable[[str], None],
    wait_seconds: float = WAIT_SECONDS,
) -> Answer:
    """End the run that the reference means and wait for that; of a sweep's name, all its trials, which are one process.

    Raises RequestError for an unknown run, one of another machine that no Prefect at hand knows, and one that does not
    end in time.
    """
    found = starts(store, reference) if reference.strip() else []
    if found:
        return _cancel_sweep(store, reference, found, pages, say, wait_seconds)
    run_id = _in_store(store, reference)
    if run_id is None:
        known = pages.named(reference) if pages is not None else None
        if known is None or pages is None:
            raise RequestError(_unknown(store, reference, pages))
        return _end_known(pages, known, say, wait_seconds)
    return _cancel_run(store, run_id, pages, say, wait_seconds)


def _cancel_run(
    store: Store, run_id: str, pages: Pages | None, say: Callable[[str], None], wait_seconds: float
) -> Answer:
    payload = store.read_run(run_id)
    recipe, sweep = payload.get("recipe"), (payload.get("sweep") or {}).get("name")
    if payload.get("state") != "running":
        return Answer(run_id, recipe, str(payload.get("state")), sweep=sweep)
    flow_run, process = payload.get("flow_run"), str(payload.get("process"))
    known = pages.known(flow_run) if pages is not None and flow_run else None
    told = _tell(run_id, process, known, pages)
    say(f"run {run_id} was told to end; waiting until nothing of it is left")
    _await(run_id, process, store.scratch.absolute() / run_id, known, pages, wait_seconds)
    if known is not None and pages is not None and not known.worker:
        pages.close(known)
    after = store.read_run(run_id)
    at_work = _stages(after.get("stages", {}), "interrupted") or _stages(payload.get("stages", {}), "running")
    state = str(after["state"]) if after["state"] in ("ok", "failed") else "cancelled"
    left = Left.of(store, after)
    return Answer(run_id, recipe, state, at_work, True, sweep, known.name if known else None, told, left)


def _cancel_sweep(
    store: Store,
    name: str,
    found: Sequence[Mapping[str, Any]],
    pages: Pages | None,
    say: Callable[[str], None],
    wait_seconds: float,
) -> Answer:
    """The first of its trials at work, as an answer for all; between two of them only Prefect knows its process."""
    whole = pages.named(f"sweep {name}") if pages is not None else None
    ended = [
        _cancel_run(store, str(run["run"]), pages, say, wait_seconds) for run in found if run.get("state") == "running"
    ]
    if whole is not None and pages is not None and ended:
        pages.close(whole)
    elif whole is not None and pages is not None:
        return replace(_end_known(pages, whole, say, wait_seconds), sweep=name)
    last = Answer(str(found[0]["run"]), found[0].get("recipe"), str(found[0].get("state")), sweep=name)
    return next(iter(ended), last)


def _in_store(store: Store, reference: str) -> str | None:
    """The id of the run; None: no run of the store is meant."""
    if not reference.strip():
        raise RequestError("say which run: its id or the beginning of one, or `latest`; `posttrain ls` lists them")
    runs = store.runs()
    if reference == "latest":
        return _running(store, runs)
    found = find_run(store, reference)
    if found in runs or LATEST.fullmatch(reference):
        return found
    last = reference.split()[-1]
    ends = [run for run in runs if run.endswith(f"-{last}")] if len(last) == _SUFFIX else []
    return ends[0] if len(ends) == 1 else None


def _running(store: Store, runs: list[str]) -> str:
    """The run in progress, or where there is none the newest. Of several nobody knows which is meant, unless they are
    trials of one sweep."""
    read = [store.read_run(run) for run in runs]
    running = {str(run["run"]): (run.get("sweep") or {}).get("name") for run in read if run.get("state") == "running"}
    if len(running) > 1 and (None in running.values() or len(set(running.values())) > 1):
        said = dict.fromkeys(run if sweep is None else f"sweep {sweep}" for run, sweep in sorted(running.items()))
        raise RequestError(f"{len(running)} runs are in progress; say which: {', '.join(said)}")
    return max(running) if running else find_run(store, "latest")


def _unknown(store: Store, reference: str, pages: Pages | None) -> str:
    names = pages.names() if pages is not None else []
    hint = nearest(reference, [*store.runs(), *_sweeps(store), *names])
    asked = "" if pages is not None else "; no Prefect is at hand (`posttrain ui`, PREFECT_API_URL) that may know it"
    return f"there is no run {reference!r} in {store.url}{hint}{asked}; `posttrain ls` lists them"


def _sweeps(store: Store) -> list[str]:
    """Names of those whose trials the store has: `20261122-134559-NAME-3fa9c1`."""
    parts = (run.split("-") for run in store.runs())
    return list(dict.fromkeys("-".join(part[2:-1]) for part in parts if len(part) > _PARTS))


def _tell(run_id: str, process: str, known: Known | None, pages: Pages | None) -> int | None:
    """Gives the process of this machine that was told; None: Prefect tells it."""
    here = lives_here(process)
    if known is not None and pages is not None:
        pages.ask(known)
        if known.worker or not here:  # its worker ends it, or on another machine it looks for itself
            return None
    if not here:
        raise RequestError(
            f"run {run_id} goes on on another machine, or in a container of its own, and no Prefect at hand knows it: "
            "cancel it there, or set PREFECT_API_URL to the Prefect that it reports to"
        )
    pid = int(process.split("-")[1])
    try:
        if psutil.Process(pid).status() == psutil.STATUS_STOPPED:  # Ctrl-Z: it would hear of nothing
            os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGTERM)
    except (ProcessLookupError, psutil.NoSuchProcess):
        pass  # it ended meanwhile
    except PermissionError as error:
        raise RequestError(f"run {run_id} is process {pid} of another user: cancel it as that user") from error
    return pid


def _await(
    run_id: str, process: str, job: Path | None, known: Known | None, pages: Pages | None, wait_seconds: float
) -> None:
    """Until nothing of the run is left on this machine, and who was not told here has said that it ended."""
    deadline = time.monotonic() + wait_seconds
    elsewhere = known is not None and (known.worker or not lives_here(process))
    while True:
        left = [int(process.split("-")[1])] if lives_here(process) else _processes(job)
        if elsewhere and known is not None and pages is not None and not pages.has_ended(known):
            waits = _unsaid(known)
        elif left:
            waits = f"still there: process {', '.join(map(str, left))}; `kill -9` ends what does not listen"
        else:
            return
        if time.monotonic() > deadline:
            raise RequestError(f"run {run_id} was told to end {wait_seconds:.0f} s ago and has not: {waits}")
        time.sleep(POLL_SECONDS)


def _unsaid(known: Known) -> str:
    if known.worker:
        return f"the worker of {known.name} has not said that it ended; does `posttrain ui`, or its worker, run?"
    return f"{known.name}, started by hand on another machine, has not said that it ended; is its process there?"


def _processes(job: Path | None) -> list[int]:
    """Stages of the run and their supervisors."""
    found: list[int] = []
    if job is None:
        return found
    for process in psutil.process_iter():
        try:
            mine = process.environ().get(JOB_VARIABLE, "").startswith(f"{job}/")
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue  # ended meanwhile, or another user's
    return found


def _end_known(pages: Pages, known: Known, say: Callable[[str], None], wait_seconds: float) -> Answer:
    """A run that the store does not know: it waits, or has only begun."""
    process = known.process or ""
    told = None
    if known.begun:
        told = _tell(known.name, process, known, pages)
        say(f"{known.name} was told to end; waiting for that")
        _await(known.name, process, None, known, pages, wait_seconds)  # the store knows it before a stage works
        if not known.worker:
            pages.close(known)
    else:
        pages.ask(known)
    return Answer(known.name, None, "cancelled", begun=known.begun, prefect=known.name, process=told)


def _stages(stages: dict[str, Any], state: str) -> tuple[str, ...]:
    return tuple(name for name, entry in stages.items() if entry.get("state") == state)
