"""What stages leave with `weight_averaging`: the average of the weights that runs without it leave after every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from artifacts.errors import StageError
from stages.context import Context
from stages.preference import Config, check
from stages.training.averaging import Averaging
from stages.training.following import Follower
from tests.stages.small_models import (
    labels_loss,
    logged,
    output,
    read_lines,
    run_stage,
    save_completions,
    save_dataset,
)

ROWS = [("abc", "de"), ("da", "bbcaaa"), ("hgf", "e"), ("cab", "aabbcc")]
APART = [("abd", "de"), ("db", "bbcaab"), ("hga", "hh")]
PAIRS = [{"prompt": prompt, "chosen": completion, "rejected": "ff"} for prompt, completion in ROWS]
STEPS = 5
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "train_batch_size": 2,
    "max_steps": STEPS,
}
EMA: dict[str, Any] = {"kind": "ema", "decay": 0.75}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_completions(tmp_path_factory.mktemp("inputs"), dataset=ROWS, eval_dataset=APART)


@pytest.fixture(scope="module")
def after_steps(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path]) -> list[dict[str, Tensor]]:
    """The weights before the first step, and those that runs of 1, 2, ... steps leave."""
    folder = tmp_path_factory.mktemp("after")
    found = [load_file(inputs["model"] / "model.safetensors")]
    for steps in range(1, STEPS + 1):
        AcceleratorState._reset_state(reset_partial_state=True)
        given = {name: inputs[name] for name in ("model", "dataset")}
        found.append(weights(run_stage("sft", folder / str(steps), given, **SETTINGS | {"max_steps": steps})))
    return found


def weights(context: Context) -> dict[str, Tensor]:
    return load_file(output(context, "model") / "model.safetensors")


def metrics(context: Context) -> list[dict[str, Any]]:
    return read_lines(output(context, "model") / "metrics.jsonl")


def ema(sequence: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    average = {name: tensor.double() for name, tensor in sequence[0].items()}
    for step in sequence[1:]:
        average = {name: decay * one + (1 - decay) * step[name].double() for name, one in average.items()}
    return average


def apart(loss_of: Any) -> float:
    """The loss of the rows apart, a mean over tokens."""
    sums = [labels_loss(loss_of, prompt, completion) for prompt, completion in APART]
    return sum(loss for loss, _ in sums) / sum(tokens for _, tokens in sums)


def test_the_output_is_the_average_and_so_is_what_is_measured(
    tmp_path: Path, inputs: dict[str, Path], after_steps: list[dict[str, Tensor]]
) -> None:
    context = run_stage("sft", tmp_path, inputs, **SETTINGS, eval_steps=2, weight_averaging=EMA)
    expected, found = ema(after_steps, 0.75), weights(context)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=1e-6)
    model = AutoModelForCausalLM.from_pretrained(output(context, "model"))
    rows = metrics(context)
    assert rows[-1]["eval/loss"] == pytest.approx(apart(model), rel=1e-5)
    for step in (2, 4):
        model.load_state_dict({k: v.float() for k, v in ema(after_steps[: step + 1], 0.75).items()}, strict=False)
        assert rows[step - 1]["eval/loss"] == pytest.approx(apart(model), rel=1e-5)
    assert context.counts["averaged_step"] == STEPS
    said = f"the output has averaged weights (ema, {STEPS} updates); the moving average has {0.75**STEPS:.3g} of the"
    assert any(line.startswith(said) for line in logged(Path(context.spec.job)))


def test_what_is_trained_does_not_change(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Losses and gradient norms of every step, with measurements by averaged weights between them."""
    runs = [
        run_stage("sft", tmp_path / str(number), inputs, **SETTINGS, eval_steps=1, weight_averaging=settings)
        for number, settings in enumerate([None, EMA, {"kind": "bema", "update_freq": 2, "update_after": 1}])
    ]
    trained = [
        [{name: value for name, value in row.items() if not name.startswith("eval/")} for row in metrics(one)]
        for one in runs
    ]
    assert trained[0] == trained[1] == trained[2]
    assert len({metrics(one)[-1]["eval/loss"] for one in runs}) == 3
    # until the second one begins, it is the weights themselves
    assert metrics(runs[2])[0] == metrics(runs[0])[0]
    assert metrics(runs[2])[1] != metrics(runs[0])[1]


def test_without_it_nothing_is_held(tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = Averaging.after

    def after(self: Averaging, step: int) -> None:
        original(self, step)
        seen.append(len(self.tensors()) + len(self._owners))

    monkeypatch.setattr(Averaging, "after", after)
    context = run_stage("sft", tmp_path, inputs, **SETTINGS)
    assert seen == [0] * STEPS and "averaged_step" not in context.counts


def test_the_best_measurement_is_of_averaged_weights(
    tmp_path: Path, inputs: dict[str, Path], after_steps: list[dict[str, Tensor]]
) -> None:
    more: dict[str, Any] = {"eval_steps": 1, "keep": "best", "weight_averaging": {"kind": "ema", "decay": 0.5}}
    context = run_stage("sft", tmp_path, inputs, **SETTINGS, **more)
    losses = [row["eval/loss"] for row in metrics(context)]
    best = losses.index(min(losses)) + 1
    expected = ema(after_steps[: best + 1], 0.5)
    for name, tensor in weights(context).items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=1e-6)


def test_adapters_are_averaged(tmp_path: Path, inputs: dict[str, Path]) -> None:
    given = {name: inputs[name] for name in ("model", "dataset")}
    more: dict[str, Any] = {"lora_r": 2, "merge_adapters": False}

    def adapter(steps: int, **settings: Any) -> dict[str, Tensor]:
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = tmp_path / f"{steps}{bool(settings)}"
        context = run_stage("sft", folder, given, **SETTINGS | {"max_steps": steps}, **more, **settings)
        return load_file(output(context, "adapter") / "adapter_model.safetensors")

    one, two, three = (adapter(steps) for steps in (1, 2, 3))
    settings = {"kind": "ema", "decay": 0.5, "update_after": 1}
    found = adapter(3, weight_averaging=settings)
    assert found.keys() == one.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, one[name] / 4 + two[name] / 4 + three[name] / 2, atol=1e-6, rtol=1e-6)


def test_a_reference_that_follows_the_average(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TRL has it: with all of it taken over, the reference is the average of the steps that are done."""
    pairs = save_dataset(tmp_path / "pairs", "preference", PAIRS)
    seen: list[tuple[int, float, float]] = []
    original = Follower.before

    def before(self: Follower, step: int) -> None:
        original(self, step)
        own = dict(self.scorer.named_parameters())
        (name, weight), *_ = ((name, self.trainer.averaging.weight(name)) for name in self.trainer.parallel.shapes())
        present = self.trainer.parallel.weight(name)
        seen.append((step, float((own[name] - weight).abs().max()), float((own[name] - present).abs().max())))

    monkeypatch.setattr(Follower, "before", before)
    more: dict[str, Any] = {
        "sync_ref_model": True,
        "ref_model_follows": "average",
        "ref_model_mixup_alpha": 1.0,
        "ref_model_sync_steps": 2,
        "weight_averaging": {"kind": "bema", "update_freq": 1, "lag": 2},
    }
    run_stage("preference", tmp_path, {"model": inputs["model"], "dataset": pairs}, **SETTINGS, **more)
    assert [step for step, _, _ in seen] == list(range(STEPS))
    for step, from_average, from_present in seen:
        assert (from_average == 0) == (step % 2 == 0)
        assert (from_present > 0) == (step > 0)


def test_settings_of_a_reference_that_follows() -> None:
    (said,) = check(Config(ref_model_follows="average", sync_ref_model=True), frozenset({"model", "dataset"}))
    assert said == "ref_model_follows is average, but no weights are averaged; give weight_averaging too"
    settings = Config(ref_model_follows="average", weight_averaging=EMA)
    (said,) = check(settings, frozenset({"model", "dataset"}))
    assert said == "ref_model_follows is given, but sync_ref_model is false, so it would not be used"


def test_a_run_that_is_too_short(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Said before anything runs where its steps are given, else when the rows have been read."""
    said = r"the first update is after step 400 .* and the run has 5"
    with pytest.raises(ValidationError, match=said):
        Config(weight_averaging={"kind": "bema"}, max_steps=5)
    more: dict[str, Any] = {"max_steps": None, "num_train_epochs": 2.5, "weight_averaging": {"kind": "bema"}}
    with pytest.raises(StageError, match=said):
        run_stage("sft", tmp_path, inputs, **SETTINGS | more)
    with pytest.raises(ValidationError, match="updated every 20 steps and measured every 10"):
        Config(weight_averaging={"kind": "ema", "update_freq": 20}, eval_steps=10, early_stopping_patience=2)
    Config(weight_averaging={"kind": "ema", "update_freq": 20}, eval_steps=10)
