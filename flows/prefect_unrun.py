"""Why Prefect ended a task without running it, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture

UNSAID = "Prefect gave no reason; its server's log may have one"


def why_not_run(name: str, needs: Iterable[str], futures: Mapping[str, PrefectFuture[Any]]) -> str:
    """A task waits for those of the stages that it reads from, and Prefect runs none after one that ended badly; such a
    task has no state that says so."""
    upstream = {need: futures[need].state for need in needs if need in futures}
    broken = [f"the task {need} {in_words(state)}" for need, state in upstream.items() if not state.is_completed()]
    if broken:
        return f"Prefect did not start it: {'; '.join(broken)}. Run again: what is stored is not made again"
    return f"Prefect did not run it: its task {in_words(futures[name].state)}"


def in_words(state: State[Any]) -> str:
    """`ended as Crashed: ...`"""
    how = "ended as" if state.is_final() else "was left as"
    return f"{how} {state.name or state.type.value}: {state.message or UNSAID}"
