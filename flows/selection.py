"""Which stages of a recipe a run is about: `--only`, `--from`, `--until`, `--force`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from artifacts.errors import Problem, RequestError
from flows.recipe import Recipe
from stages.names import nearest


@dataclass(frozen=True)
class Selection:
    """`selected` may run; `needed` are not selected, and their results must be in the store already."""

    selected: frozenset[str]
    needed: frozenset[str]
    forced: frozenset[str]
    options: str
    """As given on the command line, for messages."""


def select(
    recipe: Recipe,
    only: Iterable[str] = (),
    start: Iterable[str] = (),
    until: Iterable[str] = (),
    force: Iterable[str] = (),
) -> Selection:
    """The stages to run: those named by `only`, or from `start` on and up to `until`; with neither, all.

    Raises RequestError for stages that the recipe does not have.
    """
    given = {"--only": tuple(only), "--from": tuple(start), "--until": tuple(until), "--force": tuple(force)}
    problems = [
        Problem(f"{option} {name}", f"the recipe has no such stage{nearest(name, recipe.stages)}; {_list(recipe)}")
        for option, names in given.items()
        for name in names
        if name not in recipe.stages
    ]
    if given["--only"] and (given["--from"] or given["--until"]):
        problems.append(Problem("--only", "cannot be combined with --from or --until; give one or the other"))
    if problems:
        raise RequestError(problems)
    selected = set(recipe.stages)
    if given["--only"]:
        selected = set(given["--only"])
    if given["--from"]:
        selected &= _after(recipe, given["--from"])
    if given["--until"]:
        selected &= _before(recipe, given["--until"])
    options = " ".join(f"{option} {name}" for option, names in given.items() for name in names)
    if not selected:
        raise RequestError([Problem(options, f"no stage is left to run; {_list(recipe)}")])
    if left := [name for name in given["--force"] if name not in selected]:
        raise RequestError([Problem(f"--force {name}", f"not among the stages of {options}") for name in left])
    needed = _before(recipe, selected) - selected
    return Selection(frozenset(selected), frozenset(needed), frozenset(given["--force"]), options)


def _list(recipe: Recipe) -> str:
    return f"there are: {', '.join(recipe.stages)}"


def _before(recipe: Recipe, names: Iterable[str]) -> set[str]:
    """The stages and all that they need."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending.extend(recipe.stages[name].needs)
    return found


def _after(recipe: Recipe, names: Iterable[str]) -> set[str]:
    """The stages and all that need them."""
    found = set(names)
    for name, stage in recipe.stages.items():  # in topological order, so one pass is enough
        if found.intersection(stage.needs):
            found.add(name)
    return found
