"""Small stages whose fields, kinds and messages the recipe tests know by heart, and recipes of them."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from artifacts.errors import RequestError
from flows.recipe import Recipe
from stages.stage import CodeRef, Config, DataRef, Input, Stage, operational


class Source(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    path: DataRef
    columns: dict[str, str] = {}


class PrepareConfig(Config):
    source: Source
    """Where the rows come from."""
    split: float = Field(0.0, ge=0, lt=1)
    """The share of rows that goes to the second output."""
    filters: tuple[CodeRef, ...] = ()
    """Functions that keep or drop a row."""
    workers: int = operational(1, ge=1)
    """Processes that read."""


class TrainConfig(Config):
    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate."""
    num_train_epochs: int = Field(1, ge=1)
    """Passes over the data."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip gradients to this norm."""
    targets: str | list[str] = "all-linear"
    """Layers that are trained."""
    weights: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (1.0,)
    """One weight a loss."""
    bf16: bool = False
    """Train in bfloat16."""
    rewards: tuple[CodeRef, ...] = ()
    """Reward functions."""
    beta: float = Field(0.1, ge=0, le=10)
    """Strength of the pull to the reference."""
    checkpoint_steps: int | None = operational(None, ge=1)
    """Steps between checkpoints."""

    @field_validator("rewards")
    @classmethod
    def _few(cls, rewards: tuple[str, ...]) -> tuple[str, ...]:
        if len(rewards) > 3:
            raise ValueError(f"at most 3 rewards, found {len(rewards)}")
        return rewards


class MeasureConfig(Config):
    limit: int | None = Field(None, ge=1)
    """Rows at most."""


def _check(config: TrainConfig, wired: frozenset[str]) -> list[str]:
    if config.loss_type == "ipo" and "reference" not in wired:
        return ["loss_type ipo needs the input 'reference'; wire a stage that writes logprobs"]
    return []


def _nothing(context: object) -> None:
    raise AssertionError("no test of recipes runs a stage")


STAGES = (
    Stage(
        name="prepare",
        version=1,
        config=PrepareConfig,
        inputs={},
        outputs={"train": "dataset", "test": "dataset"},
        run=_nothing,
        active_outputs=lambda config: ("train", "test") if config.split else ("train",),
        summary="raw rows to a dataset",
    ),
    Stage(
        name="train",
        version=1,
        config=TrainConfig,
        inputs={
            "model": Input(("model",)),
            "dataset": Input(("dataset",), many=True),
            "reference": Input(("logprobs",), required=False),
        },
        outputs={"model": "model"},
        run=_nothing,
        check=_check,
        summary="training",
        main_metric="loss",
    ),
    Stage(
        name="score",
        version=1,
        config=MeasureConfig,
        inputs={"model": Input(("model", "reward_model")), "dataset": Input(("dataset",))},
        outputs={"logprobs": "logprobs"},
        run=_nothing,
    ),
)


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare`, `train` and `score` are the stages there are."""
    monkeypatch.setattr("stages.stage.STAGES", tuple(stage.name for stage in STAGES))
    for stage in STAGES:
        module = types.ModuleType(f"stages.{stage.name}")
        module.STAGE = stage
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def write_recipe(tmp_path: Path):
    """Write a recipe beside a data file and a code file; gives the recipe's path."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "rewards.py").write_text("def right(prompts, completions):\n    return [1.0]\n")

    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def model_folder(tmp_path: Path) -> None:
    """A folder `model` that looks like one."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')


def mistakes(path: Path, *overrides: str) -> list[str]:
    """The messages of a recipe that must be refused, without the folder it lies in."""
    with pytest.raises(RequestError) as refused:
        Recipe.load(path, overrides)
    return [str(problem).replace(f"{path.parent}/", "") for problem in refused.value.problems]


def with_stage(body: str) -> str:
    """A recipe of a dataset and one more stage, `dpo`, whose body begins in line 4."""
    return f"stages:\n  data: {{uses: prepare, with: {{source: {{path: rows.jsonl}}}}}}\n  dpo:\n{body}"


TRAIN = "    uses: train\n    inputs: {model: ./model, dataset: data}\n"
