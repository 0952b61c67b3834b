"""Stages on a GPT-2 whose configuration asks for dropout: all but sft train as if it did not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from tests.stages.small_models import letters, logged, output, read_json, read_lines, run_stage, save_dataset
from tests.training.architectures import save_architecture

ROWS = [("abc", "de"), ("da", "bbcaaa"), ("hgf", "e"), ("cab", "bd")]
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4}
NOISE = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
"""0.1 each, where the configuration does not say."""
SFT: dict[str, Any] = {"learning_rate": 1e-3, "train_batch_size": 4, "max_steps": 2, "max_length": 16}
ONLINE: dict[str, Any] = {
    "learning_rate": 1e-3,
    "train_batch_size": 4,
    "max_steps": 2,
    "max_completion_length": 5,
    "rewards": ["tests.stages.test_dropout:letters"],
}
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "preference": ("pairs", SFT),
    "unpaired_preference": ("pairs", SFT),
    "reward_model": ("pairs", SFT),
    "distill": ("rows", SFT | {"lmbda": 0.5, "max_completion_length": 4}),
    "rl": ("rows", ONLINE | {"train_batch_size": 16, "num_generations": 4}),
    "ppo": ("rows", ONLINE),
    "online_dpo": ("rows", ONLINE | {"num_generations": 4}),
    "nash_md": ("rows", ONLINE),
    "sdpo": (
        "rows",
        ONLINE
        | {
            "train_batch_size": 16,
            "num_generations": 4,
            "success_reward_threshold": 2.0,
            "reprompt_template": "{prompt}{solution}",
            "solution_template": "{successful_previous_attempt}",
        },
    ),
}
assert letters  # what `rewards` names


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, the same weights without dropout, a teacher, and rows."""
    folder = tmp_path_factory.mktemp("made")
    save_architecture(folder / "noisy", "gpt2", GPT2)
    save_architecture(folder / "quiet", "gpt2", GPT2 | dict.fromkeys(NOISE, 0.0))
    pairs = [{"prompt": prompt, "chosen": text, "rejected": "hh"} for prompt, text in ROWS]
    rows = [{"prompt": prompt, "completion": text} for prompt, text in ROWS]
    save_dataset(folder / "pairs", "preference", pairs)
    save_dataset(folder / "rows", "prompt_completion", rows)
    return {path.name: path for path in folder.iterdir()}


def trained(stage: str, made: dict[str, Path], model: str, folder: Path, **changes: Any) -> tuple[list[Any], Path]:
    """Metrics and folder of a run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    data, settings = STAGES.get(stage, ("rows", SFT))
    inputs = {"model": made[model], "dataset": made[data]}
    if stage == "distill":
        inputs["teacher"] = made["quiet"]
    folder = output(run_stage(stage, folder, inputs, **(settings | changes)), "model")
    return read_lines(folder / "metrics.jsonl"), folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_as_without_dropout(stage: str, made: dict[str, Path], tmp_path: Path) -> None:
    """Every step of the run on the same weights under a configuration that asks for none, and says so once."""
    noisy, folder = trained(stage, made, "noisy", tmp_path / "noisy")
    quiet, _ = trained(stage, made, "quiet", tmp_path / "quiet")
    assert noisy == quiet and len(noisy) == 2
    (said,) = (line for line in logged(tmp_path / "noisy" / "job") if "dropout" in line)
    assert said.startswith("trained without the model's own dropout (resid_pdrop 0.1, embd_pdrop 0.1, attn_pdrop 0.1)")
    assert not any("dropout" in line for line in logged(tmp_path / "quiet" / "job"))
    written, source = (read_json(path / "config.json") for path in (folder, made["noisy"]))
    assert [written.get(name) for name in NOISE] == [source.get(name) for name in NOISE]


def test_a_policy_begins_at_its_reference(made: dict[str, Path], tmp_path: Path) -> None:
    """log 2, and with adapters' dropout as well; of all stages that compare with it."""
    for number, changes in enumerate(({}, {"lora_r": 2, "lora_dropout": 0.5})):
        metrics, _ = trained("preference", made, "noisy", tmp_path / str(number), **changes)
        assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    metrics, _ = trained("rl", made, "noisy", tmp_path / "rl", num_iterations=2, max_steps=1)
    assert metrics[0]["sampling/sampling_logp_difference/max"] < 1e-4


def test_sft_has_the_models_dropout(made: dict[str, Path], tmp_path: Path) -> None:
    noisy, _ = trained("sft", made, "noisy", tmp_path / "noisy")
    quiet, _ = trained("sft", made, "quiet", tmp_path / "quiet")
    assert abs(noisy[0]["loss"] - quiet[0]["loss"]) > 1e-3
    assert not any("dropout" in line for line in logged(tmp_path / "noisy" / "job"))
