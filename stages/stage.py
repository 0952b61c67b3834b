"""What a stage is: a frozen Config, the kinds of its inputs and outputs, a version, and `run(context)`.

Imports nothing heavy, so that recipes are checked and planned without torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from artifacts.errors import RequestError
from stages.ast_race import again_where_threads_met

if TYPE_CHECKING:
    from pathlib import Path

    from stages.context import Context
    from stages.data.ledger import RowLedger
    from stages.data.token_parts import TokenizedRow
    from stages.data.types import Dataset
    from stages.sharding import Sharding
    from stages.training.memory_phase import Phase
    from stages.training.memory_request import Request
    from stages.training.memory_shape import ModelShape

STAGES = (
    "init_model",
    "set_chat_template",
    "normalize",
    "mixture",
    "sample",
    "sft",
    "reference_logprobs",
    "reward_model",
    "process_reward_model",
    "preference",
    "unpaired_preference",
    "rl",
    "ppo",
    "online_dpo",
    "nash_md",
    "a2po",
    "sdpo",
    "rescore",
    "teacher_states",
    "distill",
    "average",
    "merge_adapter",
    "evaluate",
    "gate",
    "contamination",
    "push_to_hub",
)
"""Every stage by name; each is the module of the same name in this package, which defines `STAGE`."""


class Config(BaseModel):
    """Base of every stage's configuration: frozen, no unknown keys, a string under a field is its meaning."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    absent: ClassVar[Mapping[str, str]] = {}
    """Fields of related stages that this one cannot have, and why."""

    def packages(self) -> dict[str, dict[str, str]]:
        """Field -> the optional packages that its value needs, and what pip installs them by."""
        return {}

    def lacks(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Field -> what it needs of the environment of the stage's process that is not there, and what to do; without
        any value of a variable that may be secret."""
        return {}

    def against(self, sharding: Sharding) -> dict[str, str]:
        """Fields that do not go with the way the launcher spreads a model, and why."""
        return {}


def missing_packages(config: Config) -> dict[str, str]:
    """Fields whose values need packages that this interpreter does not have, and what to do."""
    return {
        name: f"needs the package {package}, which is not installed: pip install {install}, or leave it out"
        for name, packages in config.packages().items()
        for package, install in packages.items()
        if importlib.util.find_spec(package) is None
    }


def operational(default: Any, **constraints: Any) -> Any:
    """A field that cannot change the result beyond floating-point reordering; not part of the fingerprint."""
    return Field(default, json_schema_extra={"operational": True}, **constraints)


@dataclass(frozen=True)
class External:
    """Marks a string field that names something outside the recipe whose content is part of the identity."""

    kind: Literal["code", "data", "argument"]


CodeRef = Annotated[str, External("code")]
"""`file.py:name` (relative to the recipe) or `package.module:name`; a name without `:` is one of ours."""

DataRef = Annotated[str, External("data")]
"""A file, a folder, a glob, any fsspec URL, or `hub:owner/name`; relative paths count from the recipe."""

Arguments = dict[str, Annotated[Any, External("argument")]]
"""Of the user's code. A text with a `/` or a `.` that leads to a file or folder (relative paths count from the recipe)
is given to it as an absolute path, and counts by content: it names nothing that the code writes to."""

MODELS = ("model", "adapter")
"""Kinds of artifact that are a language model: the weights, or an adapter that names its base."""


@dataclass(frozen=True)
class Input:
    """One input of a stage: the artifact kinds it accepts."""

    kinds: tuple[str, ...]
    required: bool = True
    many: bool = False
    """A list of artifacts may be wired in."""
    types: tuple[str, ...] = ()
    """Of a dataset: the types that are taken; none: any."""


@dataclass(frozen=True)
class Stage:
    """A step of a pipeline. `version` is raised by hand when the same inputs would give other bytes."""

    name: str
    version: int
    config: type[Config]
    inputs: Mapping[str, Input]
    outputs: Mapping[str, str]
    """Name -> kind. A bare stage name in a recipe means the first one."""
    run: Callable[[Context], None]
    summary: str = ""
    active_outputs: Callable[[Any], tuple[str, ...]] | None = None
    """Config -> the outputs it writes; None: all of them."""
    check: Callable[[Any, frozenset[str]], list[str]] | None = None
    """(Config, names of the wired inputs) -> what is wrong with the two together, before anything runs."""
    check_lists: Callable[[Any, Mapping[str, int]], list[str]] | None = None
    """(Config, wired inputs that take lists -> the entries of each) -> what is wrong with their numbers."""
    main_metric: str | None = field(default=None)
    """The metric that the closing table shows; see `headline`."""
    memory: Callable[[Request], Sequence[Phase]] | None = None
    """What a process holds at most in every phase of its work, predicted; None: nothing that matters."""
    shapes: Callable[[Any, Mapping[str, ModelShape]], Mapping[str, ModelShape]] | None = None
    """(Config, shape of the model behind each input) -> shape of the model in each output; None: there is none."""
    dataset_types: Callable[[Any, Mapping[str, str]], Mapping[str, str]] | None = None
    """(Config, type of the dataset behind each input, where known) -> type of the dataset in each output, likewise."""
    tokenized: Callable[[Any, Dataset, Any, int, RowLedger], Sequence[TokenizedRow]] | None = None
    """(Config, rows, tokenizer, the model's context in tokens, where the rows' states go) -> the rows as the
    model reads them first. None: it reads none, or not these alone."""
    writes: Callable[[Any, frozenset[str]], str] | None = None
    """(Config, names of the wired inputs) -> what it writes outside of the store; two stages of a recipe may not write
    the same. None: nothing."""
    stands: Callable[[Any, Mapping[str, Path]], str | None] | None = None
    """(Config, folders of recorded outputs) -> why what it wrote outside of the store is not there any more, so that it
    is to be done again; None: it is there. Raises StageError or UnreachableError where that cannot be seen."""
    single: bool = False
    """One process does it all; a launch of several, given for the whole recipe, is for the other stages."""

    def headline(self, metrics: Mapping[str, Any]) -> str | None:
        """The metric of these that stands for all: `main_metric`, of rows that were held out where there were some."""
        names = [] if self.main_metric is None else [f"eval/{self.main_metric}", self.main_metric]
        return next((name for name in names if name in metrics), None)

    def outputs_of(self, config: Config) -> dict[str, str]:
        """Name -> kind of the outputs written under this configuration."""
        names = tuple(self.outputs) if self.active_outputs is None else self.active_outputs(config)
        return {name: self.outputs[name] for name in names}


def load_stage(name: str) -> Stage:
    """The stage of that name. Raises RequestError for an unknown one, naming the nearest."""
    if name not in STAGES:
        from stages.names import stage_hint

        raise RequestError(f"unknown stage {name!r}{stage_hint(name, STAGES)}; there are: {', '.join(STAGES)}")
    stage = again_where_threads_met(lambda: importlib.import_module(f"stages.{name}")).STAGE
    assert isinstance(stage, Stage) and stage.name == name
    return stage
