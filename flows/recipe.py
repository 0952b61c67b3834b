"""Recipes: YAML to a checked graph of stages.

Everything wrong with a recipe is reported at once, before anything runs: each mistake with its file and line,
what was expected, what was found, and the nearest valid name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifacts.errors import Problem, RequestError, StageError
from flows.command import launched_sharding
from flows.declare import declare_stages
from flows.fields import found
from flows.inputs import Reference, StageOutput
from flows.launch_settings import Launch, merge_launch, read_launch
from flows.overrides import apply_overrides, fill_parameters, set_by, unused_parameters
from flows.validate import unknown_key
from flows.wiring import Wiring
from flows.yaml_lines import Document, as_document, dump, read_document
from stages.names import nearest
from stages.rollouts.engine_settings import EngineChoice
from stages.rollouts.engine_split import launch_problems
from stages.sharding import Sharding, Whole
from stages.stage import Config, Stage

__all__ = ["Launch", "Recipe", "RecipeStage", "find_recipe", "shipped_recipes"]

SHIPPED = Path(__file__).parent / "recipes"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")
"""Results get the alias `<recipe>/<stage>`, so the name must be able to be a part of one."""

KEYS = ("name", "parameters", "parallel", "launch", "stages")


@dataclass(frozen=True)
class RecipeStage:
    """One stage of a recipe, checked and complete."""

    name: str
    uses: Stage
    config: Config
    """Paths and code references in it are absolute."""
    inputs: Mapping[str, tuple[Reference, ...]]
    launch: Launch

    @property
    def needs(self) -> tuple[str, ...]:
        """The stages of the recipe that it reads from."""
        entries = (entry for entries in self.inputs.values() for entry in entries)
        return tuple(dict.fromkeys(entry.stage for entry in entries if isinstance(entry, StageOutput)))


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

    @classmethod
    def load(cls, path_or_name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """The recipe in a file, or a shipped one by name. Raises RequestError with every problem found."""
        path = find_recipe(path_or_name)
        return _build(read_document(path), overrides, path, path.parent)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Iterable[str] = (), *, base: Path | None = None) -> Recipe:
        """A recipe made in Python; relative paths count from `base` (default: the working folder)."""
        return _build(as_document(values, "recipe"), overrides, None, base or Path.cwd())

    @property
    def settings(self) -> tuple[str, ...]:
        """What `--set` changed, as it was given: `dpo.beta=0.2`."""
        return set_by(self.document)

    def where(self, *place: str | int) -> str:
        """Where a value stands: `recipe.yaml:12: stages.dpo.with.beta`."""
        return self.document.where(place)


def find_recipe(path_or_name: str | Path) -> Path:
    """The file of a recipe. Raises RequestError naming the nearest shipped recipe."""
    text, path, shipped = str(path_or_name), Path(path_or_name).expanduser(), shipped_recipes()
    if path.is_file():
        return path
    if text in shipped:
        return shipped[text]
    known = f"shipped recipes are: {', '.join(shipped) or 'none'}"
    if path.is_dir():
        raise RequestError(f"{text} is a folder; give the recipe's YAML file; {known}")
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise RequestError(f"no such recipe file: {text}{_meant(path, shipped)}; {known}")
    raise RequestError(f"no recipe {text!r}{_meant(path, shipped)}; give a YAML file; {known}")


def _meant(path: Path, shipped: Iterable[str]) -> str:
    """The file beside it whose name is nearest, or a shipped recipe."""
    beside = [file for ending in ("*.yaml", "*.yml") for file in sorted(path.parent.glob(ending))]
    same = [file for file in beside if file.stem == path.stem]
    close = f"; did you mean {str(same[0])!r}?" if same else nearest(str(path), map(str, beside))
    return close or nearest(path.stem, shipped)


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def _build(document: Document, overrides: Iterable[str], path: Path | None, base: Path) -> Recipe:
    """A document as a recipe. Raises RequestError with every problem found."""
    if not isinstance(document.data, Mapping) or not document.data:
        what = f"expected a recipe, a mapping with the keys {', '.join(KEYS)}; found {found(document.data)}"
        raise RequestError([document.problem((), what)])
    changed, override_problems = apply_overrides(document, overrides)
    filled, parameter_problems, unfilled = fill_parameters(changed)
    unused = [] if parameter_problems else unused_parameters(document)  # a misspelt one leaves another unused
    problems = [*override_problems, *parameter_problems, *unused]
    # what is wrong with a value that a parameter should have given only repeats that it is not given
    recipe, others = _read(filled, path, base.resolve())
    problems += [problem for problem in others if problem.where not in unfilled]
    if problems:
        raise RequestError(dict.fromkeys(problems))
    return recipe


def _read(document: Document, path: Path | None, base: Path) -> tuple[Recipe, list[Problem]]:
    """The recipe as far as it is right, and what is wrong with it."""
    data = document.data
    listed: set[tuple[str, ...]] = set()
    problems = [document.problem((key,), unknown_key(key, KEYS, {}, listed)) for key in data if key not in KEYS]
    name = data.get("name", path.stem if path else "recipe")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        what = f"expected letters, digits, '.', '_' and '-', beginning with a letter or digit, found {found(name)}"
        problems.append(document.problem(("name",), what))
    parallel = data.get("parallel", 1)
    if type(parallel) is not int or parallel < 1:
        what = f"expected a whole number of at least 1, found {found(parallel)}"
        problems.append(document.problem(("parallel",), what))
    common, wrong = _common_launch(document, base)
    stages, wrong_stages = declare_stages(document, base)
    wiring = Wiring(document, {declared.name: declared for declared, _ in stages}, base)
    complete = {
        declared.name: RecipeStage(
            declared.name,
            declared.uses,
            declared.config,
            wiring.inputs[declared.name],
            merge_launch(common, launch, declared.uses.single),
        )
        for declared, launch in stages
        if declared.uses is not None and declared.config is not None
    }
    ordered = {name: complete[name] for name in wiring.order if name in complete}
    problems += [problem for stage in complete.values() for problem in _launched(stage, document)]
    problems += _written_twice(ordered.values(), document)
    recipe = Recipe(str(name), path, parallel, ordered, dump(data), document)
    return recipe, [*problems, *wrong, *wrong_stages, *wiring.problems]


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


def _common_launch(document: Document, base: Path) -> tuple[dict[str, Any], list[Problem]]:
    values = document.data.get("launch")
    if values is None:
        return {}, []
    if not isinstance(values, Mapping):
        return {}, [document.problem(("launch",), f"expected a mapping, found {found(values)}")]
    return read_launch(values, document, ("launch",), base)
