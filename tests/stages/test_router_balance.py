"""Stages on a mixture of experts whose configuration has a coefficient: the routers' loss beside their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from artifacts.errors import StageError
from tests.stages.small_models import logged, output, read_lines, run_stage, save_dataset, save_model
from tests.stages.test_dropout import ROWS, SFT, STAGES
from tests.training.architectures import save_architecture
from tests.training.experts import EXPERTS

TRAINED = {"sft": ("rows", SFT), **STAGES}
del TRAINED["reward_model"]
COEFFICIENT = 0.02


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A mixture of experts, a dense model, and rows."""
    folder = tmp_path_factory.mktemp("made")
    asking = {"router_aux_loss_coef": COEFFICIENT, "output_router_logits": True}
    save_architecture(folder / "experts", "mixtral", EXPERTS["mixtral"] | asking)
    save_model(folder / "dense", seed=1)
    pairs = [{"prompt": prompt, "chosen": text, "rejected": "hh"} for prompt, text in ROWS]
    rows = [{"prompt": prompt, "completion": text} for prompt, text in ROWS]
    save_dataset(folder / "pairs", "preference", pairs)
    save_dataset(folder / "rows", "prompt_completion", rows)
    return {path.name: path for path in folder.iterdir()}


def metrics(stage: str, made: dict[str, Path], folder: Path, model: str = "experts", **changes: Any) -> list[Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    data, settings = TRAINED[stage]
    inputs = {"model": made[model], "dataset": made[data]}
    if stage == "distill":
        inputs["teacher"] = made["experts"]
    context = run_stage(stage, folder, inputs, **(settings | {"max_steps": 1} | changes))
    said = "the load-balancing loss of 2 routers is added, times router_aux_loss_coef 0.02 of the model's configuration"
    assert (said in logged(Path(context.spec.job))) == ("router_aux_loss_coef" not in changes)
    return read_lines(output(context, "model") / "metrics.jsonl")


@pytest.mark.parametrize("stage", TRAINED)
def test_the_loss_is_the_stages_own_and_a_share_of_the_routers(
    stage: str, made: dict[str, Path], tmp_path: Path
) -> None:
    (without,) = metrics(stage, made, tmp_path / "without", router_aux_loss_coef=0)
    assert "aux_loss" not in without
    (row,) = metrics(stage, made, tmp_path / "with")
    assert row["aux_loss"] > 1.0 and row["router/max_load"] > 1.0
    assert row["loss"] == pytest.approx(without["loss"] + COEFFICIENT * row["aux_loss"], rel=1e-5, abs=1e-6)
    assert row["grad_norm"] != pytest.approx(without["grad_norm"], rel=1e-5)


def equal(completions: list[str], **_: Any) -> list[float]:
    return [1.0 for _ in completions]


def test_groups_without_an_advantage_are_balanced_too(made: dict[str, Path], tmp_path: Path) -> None:
    """All completions are worth the same: nothing but the routers' loss has a gradient."""
    rewards = ["tests.stages.test_router_balance:equal"]
    (without,) = metrics("rl", made, tmp_path / "without", router_aux_loss_coef=0, rewards=rewards)
    assert without["grad_norm"] == 0 and without["frac_reward_zero_std"] == 1
    (row,) = metrics("rl", made, tmp_path / "with", rewards=rewards)
    assert row["grad_norm"] > 0
    assert row["loss"] == pytest.approx(COEFFICIENT * row["aux_loss"], rel=1e-5)


def test_a_coefficient_for_a_dense_model_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"router_aux_loss_coef is 0.1, but input model is a llama"):
        metrics("sft", made, tmp_path, "dense", router_aux_loss_coef=0.1)
