"""Which stages of a recipe a run is about: `--only`, `--from`, `--until`, `--force`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from artifacts.errors import Problem
from stages.names import nearest

NOT_SELECTED = "not selected by "


@dataclass(frozen=True)
class Selection:
    """`selected` may run; `needed` are not selected, and their results must be in the store already."""

    selected: frozenset[str]
    needed: frozenset[str]
    forced: frozenset[str]
    options: str
    """As given on the command line, for messages."""

    @property
    def reason(self) -> str:
        """Why a stage that is not selected is skipped."""
        return f"{NOT_SELECTED}{self.options}"


def options_in(reasons: Iterable[str]) -> str | None:
    """The options for which a stage with these reasons was not selected; None: it was."""
    left = (reason for reason in reasons if reason.startswith(NOT_SELECTED))
    return next((reason.removeprefix(NOT_SELECTED).partition(";")[0] for reason in left), None)


def select(
    needs: Mapping[str, Iterable[str]],
    only: Iterable[str] = (),
    start: Iterable[str] = (),
    until: Iterable[str] = (),
    force: Iterable[str] = (),
) -> tuple[Selection, list[Problem]]:
    """The stages to run: those named by `only`, or from `start` on and up to `until`; with neither, all. And what is
    wrong with what is asked for, which then counts as far as it is right.

    `needs`: stage -> those that it reads from, which come before it.
    """
    given = {"--only": tuple(only), "--from": tuple(start), "--until": tuple(until), "--force": tuple(force)}
    problems = [
        Problem(f"{option} {name}", f"the recipe has no such stage{nearest(name, needs)}; {_list(needs)}")
        for option, names in given.items()
        for name in names
        if name not in needs
    ]
    if given["--only"] and (given["--from"] or given["--until"]):
        problems.append(Problem("--only", "cannot be combined with --from or --until; give one or the other"))
    selected = set(needs)
    if given["--only"]:
        selected &= set(given["--only"])
    if given["--from"]:
        selected &= _after(needs, given["--from"])
    if given["--until"]:
        selected &= _before(needs, given["--until"])
    options = " ".join(f"{option} {name}" for option, names in given.items() for name in names)
    if not selected and not problems and needs:
        problems.append(Problem(options, f"no stage is left to run; {_list(needs)}"))
    elif not problems:
        left = [name for name in given["--force"] if name not in selected]
        problems += [Problem(f"--force {name}", f"not among the stages of {options}") for name in left]
    needed = _before(needs, selected) - selected
    return Selection(frozenset(selected), frozenset(needed), frozenset(given["--force"]), options), problems


def _list(stages: Iterable[str]) -> str:
    return f"there are: {', '.join(stages)}"


def _before(needs: Mapping[str, Iterable[str]], names: Iterable[str]) -> set[str]:
    """The stages and all that they need."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in found and name in needs:
            found.add(name)
            pending.extend(needs[name])
    return found


def _after(needs: Mapping[str, Iterable[str]], names: Iterable[str]) -> set[str]:
    """The stages and all that need them."""
    found = set(names)
    for name in needs:  # in topological order, so one pass is enough
        if found.intersection(needs[name]):
            found.add(name)
    return found
