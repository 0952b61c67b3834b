"""Recipes: YAML to a checked graph of stages.

Everything wrong with a recipe is reported at once, before anything runs: each mistake with its file and line,
what was expected, what was found, and the nearest valid name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from artifacts.errors import Problem, RequestError, StageError
from flows.command import launched_sharding
from flows.declare import TOP_KEYS, declare_stages
from flows.document import Document, Place, in_order
from flows.fields import found
from flows.inputs import Reference, Wanted
from flows.known_part import as_far_as_known
from flows.launch_settings import Launch, common_launch, merge_launch
from flows.overrides import apply_overrides, fill_parameters, hiding_parameters, set_by, unused_parameters
from flows.recipe_files import find_recipe
from flows.validate import unknown_key
from flows.wiring import Wiring, sources
from flows.yaml_lines import as_document, dump, read_document
from stages.rollouts.engine_settings import EngineChoice
from stages.rollouts.engine_split import launch_problems
from stages.sharding import Sharding, Whole
from stages.stage import Config, Stage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")
"""Results get the alias `<recipe>/<stage>`, so the name must be able to be a part of one."""

Said = TypeVar("Said")


@dataclass(frozen=True)
class RecipeStage:
    """One stage of a recipe, checked and complete."""

    name: str
    uses: Stage
    config: Config
    """Paths and code references in it are absolute."""
    inputs: Mapping[str, tuple[Reference, ...]]
    launch: Launch
    partial: bool = False
    """Whether the configuration is only the part of a wrong one that is right (`known_part`)."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The stages of the recipe that it reads from."""
        return sources(self.inputs)

    def asked(self, check: Callable[..., Iterable[Said]], *arguments: Any) -> list[Said]:
        """What a check says of it: nothing where it needs what is wrong with the configuration."""
        return as_far_as_known(check, *arguments) if self.partial else list(check(*arguments))


@dataclass(frozen=True)
class Recipe:
    """A pipeline: stages in an order in which each follows those it reads from."""

    name: str
    path: Path | None
    """The file it came from; None: made in Python."""
    parallel: int
    """How many stages may run at once."""
    stages: Mapping[str, RecipeStage]
    text: str
    """The recipe as YAML with parameters filled in and overrides made."""
    document: Document = field(repr=False, compare=False)
    base: Path
    """The folder that relative paths count from."""
    needs: Mapping[str, tuple[str, ...]]
    """Stage -> the stages that it reads from."""
    wanted: tuple[Wanted, ...]
    """What its stages read that is not of the recipe."""

    @classmethod
    def load(cls, path_or_name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """The recipe in a file, or a shipped one by name. Raises RequestError with every problem found."""
        return read_recipe(path_or_name, overrides).right()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Iterable[str] = (), *, base: Path | None = None) -> Recipe:
        """A recipe made in Python; relative paths count from `base` (default: the working folder)."""
        return read_values(values, overrides, base=base).right()

    @property
    def settings(self) -> tuple[str, ...]:
        """What `--set` changed, as it was given: `dpo.beta=0.2`."""
        return set_by(self.document)

    def where(self, *place: str | int) -> str:
        """Where a value stands: `recipe.yaml:12: stages.dpo.with.beta`."""
        return self.document.where(place)

    def written(self, *place: str) -> Mapping[str, Any]:
        """The mapping at a place of it; empty where there is none."""
        data: Any = self.document.data
        for part in place:
            data = data.get(part) if isinstance(data, Mapping) else None
        return data if isinstance(data, Mapping) else {}

    def problem(self, place: Place, what: str) -> Problem:
        """A mistake at one place of it."""
        return self.document.problem(place, what)


@dataclass(frozen=True)
class Reading:
    """A recipe as far as it is right, for whoever can say more of it than that it is wrong.

    It has all stages that are of a known kind, each with the part of its configuration and those of its inputs that are
    right.
    """

    recipe: Recipe
    problems: tuple[Problem, ...] = ()
    """All that its text tells."""
    unused: tuple[Problem, ...] = ()
    """Parameters that go nowhere: perhaps for want of what other mistakes left out, so they are named last."""
    unread: frozenset[str] = frozenset()
    """Where values could not be read, or a parameter should have given them: what else is wrong there repeats that."""

    def refusal(self, *more: Problem) -> RequestError | None:
        """All mistakes, with those that others found, in the order of the recipe; None: there is none."""
        others = [problem for problem in more if problem.where not in self.unread]
        found = [*in_order([*self.problems, *others], self.recipe.document.data), *self.unused]
        return RequestError(found) if found else None

    def right(self) -> Recipe:
        """The recipe. Raises RequestError with every problem found."""
        if refusal := self.refusal():
            raise refusal
        return self.recipe

    def wrong_stages(self) -> set[str]:
        """Of which more is wrong than how they are started."""
        partial = {name for name, stage in self.recipe.stages.items() if stage.partial}
        return _wrong_stages(self.problems) | partial


def read_recipe(path_or_name: str | Path, overrides: Iterable[str] = ()) -> Reading:
    """The recipe in a file, or a shipped one by name. Raises RequestError where it cannot be read as a recipe at
    all."""
    path = find_recipe(path_or_name)
    return _build(read_document(path), overrides, path, path.parent)


def read_values(values: Mapping[str, Any], overrides: Iterable[str] = (), *, base: Path | None = None) -> Reading:
    """A recipe made in Python; relative paths count from `base` (default: the working folder)."""
    return _build(as_document(values, "recipe"), overrides, None, base or Path.cwd())


def _build(document: Document, overrides: Iterable[str], path: Path | None, base: Path) -> Reading:
    """A document as a recipe. Raises RequestError where it is no mapping."""
    if not isinstance(document.data, Mapping) or not document.data:
        what = f"expected a recipe, a mapping with the keys {', '.join(TOP_KEYS)}; found {found(document.data)}"
        raise RequestError([*document.problems, document.problem((), what)])
    changed, override_problems = apply_overrides(document, overrides)
    filled, parameter_problems, unfilled = fill_parameters(changed)
    unused = [] if parameter_problems else unused_parameters(document)  # a misspelt one leaves another unused
    told = [*document.problems, *override_problems, *hiding_parameters(document), *parameter_problems]
    recipe, others = _read(filled, path, base.resolve())
    unread = frozenset(unfilled | {problem.where for problem in document.problems})
    problems = (*told, *(problem for problem in others if problem.where not in unread))
    return Reading(recipe, problems, tuple(unused), unread)


def _read(document: Document, path: Path | None, base: Path) -> tuple[Recipe, list[Problem]]:
    """The recipe as far as it is right, and what is wrong with it."""
    data = document.data
    listed: set[tuple[str, ...]] = set()
    problems = [document.problem((key,), unknown_key(key, TOP_KEYS, {}, listed)) for key in data if key not in TOP_KEYS]
    name = data.get("name", path.stem if path else "recipe")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        what = f"expected letters, digits, '.', '_' and '-', beginning with a letter or digit, found {found(name)}"
        problems.append(document.problem(("name",), what))
        name = "recipe"
    parallel = data.get("parallel", 1)
    if type(parallel) is not int or parallel < 1:
        what = f"expected a whole number of at least 1, found {found(parallel)}"
        problems.append(document.problem(("parallel",), what))
    common, wrong = common_launch(document, base)
    stages, wrong_stages = declare_stages(document, base)
    wiring = Wiring(document, {declared.name: declared for declared, _ in stages}, base)
    known = {
        declared.name: RecipeStage(
            declared.name,
            declared.uses,
            declared.config or declared.known,
            wiring.inputs[declared.name],
            merge_launch(common, launch, declared.uses.single),
            partial=declared.config is None,
        )
        for declared, launch in stages
        if declared.uses is not None and declared.known is not None
    }
    ordered = {name: known[name] for name in wiring.order if name in known}
    problems += [*wrong, *wrong_stages, *wiring.problems]
    problems += [problem for stage in known.values() for problem in stage.asked(_launched, stage, document)]
    right = ordered.keys() - _wrong_stages(problems)
    problems += _written_twice([stage for stage in ordered.values() if stage.name in right], document)
    needs = {name: sources(wiring.inputs[name]) for name in wiring.order}
    recipe = Recipe(name, path, parallel, ordered, dump(data), document, base, needs, tuple(wiring.wanted))
    return recipe, problems


def _wrong_stages(problems: Iterable[Problem]) -> set[str]:
    places = [problem.place for problem in problems if problem.place[:1] == ("stages",)]
    return {str(place[1]) for place in places if len(place) > 1 and place[2:3] != ("launch",)}


def _launched(stage: RecipeStage, document: Document) -> list[Problem]:
    """What is wrong with a stage's settings together with those of its launch."""
    place = ("stages", stage.name, "with")
    unfit: dict[tuple[str, ...], list[str]] = {
        (name,): [what] for name, what in stage.config.against(_sharding(stage.launch)).items()
    }
    if isinstance(stage.config, EngineChoice):
        engine = ("rollouts", "tensor_parallel_size")
        unfit[engine] = launch_problems(stage.config.rollouts, stage.launch.processes)
    return [document.problem((*place, *field), what) for field, messages in unfit.items() for what in messages]


def _written_twice(stages: Iterable[RecipeStage], document: Document) -> list[Problem]:
    """Stages that write over what another one writes outside of the store."""
    first: dict[str, str] = {}
    problems = []
    for stage in stages:
        if stage.uses.writes is None:
            continue
        written = stage.uses.writes(stage.config, frozenset(stage.inputs))
        if written in first:
            what = f"writes {written}, as {first[written]} does: the last one would be left; give each its own"
            problems.append(document.problem(("stages", stage.name, "with"), what))
        first.setdefault(written, stage.name)
    return problems


def _sharding(launch: Launch) -> Sharding:
    """What is wrong with the launcher's file is said elsewhere."""
    try:
        return launched_sharding(launch)
    except StageError:
        return Whole()
