"""Columns of the rows that rewards cannot do without: asked before a stage loads anything, and where the rows are there
already, when it is planned."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from artifacts.errors import StageError
from stages.data.tools import TOOLS
from stages.data.types import PROMPT_TYPES, ROW_ID
from stages.external import load_named
from stages.names import nearest
from stages.rollouts.reward_spec import Reward, RewardSpec, usable_specs
from stages.user_code.places import place_of
from stages.user_code.sources import parsed

if TYPE_CHECKING:
    from stages.context import Context

GIVEN = frozenset({"prompts", "completions", "completion_ids", "environment_reward"})
"""What rewards are given beside the columns, of which `prompt` is none: it comes as `prompts`."""
INPUTS = ("dataset", "eval_dataset")
"""Inputs whose completions are scored, of stages that have `rewards`."""
_DESCRIPTION = "dataset.json"

Arguments = Callable[[str], Sequence[str]]
"""Name of a function of the user's -> the arguments that it has no default for."""


def written_arguments(reference: str) -> list[str]:
    """As its source says, without running it; none of a function that only running it would show (one that is
    decorated, imported or a class, or whose name is bound elsewhere too)."""
    source, name = reference.rsplit(":", 1)
    place = place_of(source)
    found = [] if place is None else [node for node in parsed(place.file).body if _binds(node, name)]
    if len(found) != 1 or not isinstance(node := found[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    if node.decorator_list:
        return []
    by_place = [*node.args.posonlyargs, *node.args.args]
    named = [given for given, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if not default]
    return [given.arg for given in (*by_place[: len(by_place) - len(node.args.defaults)], *named)]


def _binds(node: ast.AST, name: str) -> bool:
    """Whether a statement of a module may give the module that name; inside of functions and classes only `global`
    does."""
    if isinstance(node, ast.Global):
        return name in node.names
    if isinstance(node, ast.Name):
        return node.id == name and not isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.Import | ast.ImportFrom):
        return any((alias.asname or alias.name).partition(".")[0] in (name, "*") for alias in node.names)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        inner = (each for each in ast.walk(node) if isinstance(each, ast.Global))
        return node.name == name or any(_binds(each, name) for each in inner)
    if getattr(node, "name", None) == name:  # of an `except`, of a pattern
        return True
    return any(_binds(inner, name) for inner in ast.iter_child_nodes(node))


def given_by(config: Any) -> frozenset[str]:
    """What the rewards of a stage with this configuration are given beside the columns: a stage that has tools puts
    them into every row."""
    return GIVEN | {TOOLS} if getattr(config, TOOLS, ()) else GIVEN


def loaded_arguments(reference: str) -> list[str]:
    """Of the function itself. Raises StageError where its file cannot be run."""
    parameters = inspect.signature(load_named("reward", reference)).parameters.values()
    several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [given.name for given in parameters if given.default is given.empty and given.kind not in several]


def missing_columns(
    rewards: Sequence[Reward],
    description: Mapping[str, Any],
    arguments: Arguments = written_arguments,
    given: Collection[str] = GIVEN,
) -> Iterator[str]:
    """What is wrong with each reward that needs a column that a dataset does not have: `asks for column answer; ...`.

    `description`: `dataset.json` of rows with prompts; of other rows, and unknown ones ({}), nothing is said. `given`:
    beside the columns.
    """
    listed = description.get("columns")
    if description.get("type") not in PROMPT_TYPES or not isinstance(listed, list):
        return
    columns = [name for name in listed if name not in ("prompt", ROW_ID)]
    for spec in usable_specs(rewards):
        for choice in _needed(spec, arguments):
            if not {*columns, *given, ROW_ID} & {*choice}:
                near = nearest(choice[0], columns)
                yield (
                    f"reward {spec.called!r} asks for column {' or '.join(choice)}; the rows have "
                    f"{', '.join(columns) or 'no columns but their prompts'}{near}: keep it, or give it that name, in "
                    "normalize"
                )


def _needed(spec: RewardSpec, arguments: Arguments) -> Sequence[tuple[str, ...]]:
    """Columns of which one each must be there."""
    if (built_in := spec.built_in()) is not None:
        return built_in.needed_columns()
    return [(name,) for name in arguments(spec.name) if name not in spec.parameters]


def require_columns_of_rewards(context: Context) -> None:
    """Raises StageError where the rows of a stage's inputs lack what its rewards ask for."""
    rewards = getattr(context.config, "rewards", ())
    for name in INPUTS if rewards else ():
        if name not in context.stage.inputs or not context.has(name):
            continue
        description = json.loads((context.input(name) / _DESCRIPTION).read_bytes())
        if wrong := list(missing_columns(rewards, description, loaded_arguments, given_by(context.config))):
            raise StageError(f"input {name}: {'; '.join(wrong)}")
