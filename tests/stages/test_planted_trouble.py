"""Trouble planted into real runs of `rl` on a model of a few thousand weights: each is caught, and by its own monitor.

A healthy run beside them, with the same model and all monitors set to stop it, is not stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from artifacts.errors import StageError
from stages.context import Context
from stages.monitors import MONITORS
from stages.training.generation import Sampling
from tests.stages.small_models import EOS, output, read_lines, run_stage, save_dataset, save_model

HERE = "tests.stages.test_planted_trouble"
STEPS = 20
RUN: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "train_batch_size": 16,
    "num_generations": 8,
    "max_completion_length": 12,
    "max_steps": STEPS,
    "rewards": [f"{HERE}:share_of_a"],
}


def share_of_a(completions: Sequence[str], **_: Any) -> list[float]:
    """Of the characters of a completion."""
    return [completion.count("a") / max(1, len(completion)) for completion in completions]


def of_the_prompt(prompts: Sequence[str], **_: Any) -> list[float]:
    """The same for every completion of a prompt."""
    return [len(prompt) / 4 for prompt in prompts]


def always(completions: Sequence[str], **_: Any) -> list[float]:
    return [0.5] * len(completions)


def length(completions: Sequence[str], **_: Any) -> list[float]:
    return [len(completion) / 12 for completion in completions]


def endless(completions: Sequence[str], **_: Any) -> list[float]:
    """What float32 cannot hold."""
    return [1e300 * completion.count("a") for completion in completions]


def not_a_number(completions: Sequence[str], **_: Any) -> list[float]:
    return [float("nan")] * len(completions)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    save_ending_model(folder / "model")
    rows = [{"prompt": prompt} for prompt in ("abc", "da", "hgf", "cab")]
    return {"model": folder / "model", "dataset": save_dataset(folder / "rows", "prompt", rows)}


def save_ending_model(folder: Path) -> None:
    """A random model that ends most completions within six tokens."""
    save_model(folder, seed=5)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][EOS] *= 2
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def rl(folder: Path, made: dict[str, Path], **settings: Any) -> Context:
    AcceleratorState._reset_state(reset_partial_state=True)
    return run_stage("rl", folder, made, **RUN | settings)


def caught(folder: Path, made: dict[str, Path], monitor: str, **settings: Any) -> str:
    """What the monitor says when it stops the run."""
    with pytest.raises(StageError, match=rf"step \d+: {monitor}: .*\(stop_on names {monitor}\)") as stopped:
        rl(folder, made, stop_on=[monitor], **settings)
    return str(stopped.value)


def test_a_healthy_run_goes_on(tmp_path: Path, made: dict[str, Path]) -> None:
    context = rl(tmp_path, made, stop_on=list(MONITORS), max_steps=2 * STEPS, beta=0.05)
    rewards = [row["reward"] for row in read_lines(output(context, "model") / "metrics.jsonl")]
    assert len(rewards) == 2 * STEPS and sum(rewards[STEPS:]) > sum(rewards[:STEPS])


def test_flat_rewards(tmp_path: Path, made: dict[str, Path]) -> None:
    text = caught(tmp_path, made, "no_signal", rewards=[f"{HERE}:of_the_prompt"])
    assert text.startswith("step 20: no_signal: 100% of the groups of the last 20 steps have equal rewards")


def test_a_reward_that_never_varies(tmp_path: Path, made: dict[str, Path]) -> None:
    """Beside one that does."""
    text = caught(tmp_path, made, "constant_reward", rewards=[f"{HERE}:share_of_a", f"{HERE}:always"])
    assert "from always (0.5): look at samples.jsonl" in text


def test_entropy_collapse(tmp_path: Path, made: dict[str, Path]) -> None:
    """A KL term of next to no weight keeps groups without signal in the passes that measure it."""
    text = caught(tmp_path, made, "entropy_collapse", learning_rate=1e-2, beta=1e-9, max_steps=80)
    assert "raise beta" in text


def test_runaway_kl(tmp_path: Path, made: dict[str, Path]) -> None:
    """Nothing holds the policy to its reference."""
    text = caught(tmp_path, made, "kl_runaway", learning_rate=3e-3, beta=1e-9, max_steps=80)
    assert "a token" in text and "raise beta" in text


def test_a_length_that_explodes(tmp_path: Path, made: dict[str, Path]) -> None:
    settings = {"rewards": [f"{HERE}:length"], "max_completion_length": 40, "max_steps": 100}
    text = caught(tmp_path, made, "length_explosion", **settings)
    assert "at the start, while the reward went up from" in text


def test_all_truncated(tmp_path: Path, made: dict[str, Path]) -> None:
    text = caught(tmp_path, made, "truncation", max_completion_length=1)
    assert text.startswith("step 20: truncation: ") and "raise it" in text


def test_repeated_completions(tmp_path: Path, made: dict[str, Path]) -> None:
    """At next to no temperature."""
    caught(tmp_path, made, "duplicates", temperature=0.02, max_completion_length=40)


def test_clipped_tokens(tmp_path: Path, made: dict[str, Path]) -> None:
    """Steps that are too long for what they were sampled from."""
    settings = {"rewards": [f"{HERE}:length"], "learning_rate": 3e-2, "num_iterations": 8, "beta": 1e-9}
    assert "lower learning_rate, num_iterations" in caught(tmp_path, made, "clip_fraction", **settings)


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler keeps the weights that it was given first."""
    original = Sampling.of.__func__  # type: ignore[attr-defined]

    def of(cls: Any, trainer: Any, tokenizer: Any, config: Any) -> Sampling:
        sampling: Sampling = original(cls, trainer, tokenizer, config)
        return Sampling(deepcopy(sampling.scorer), sampling.tokenizer, sampling.settings, sampling.accelerator)

    monkeypatch.setattr(Sampling, "of", classmethod(of))


@pytest.mark.usefixtures("stale")
def test_a_stale_sampler(tmp_path: Path, made: dict[str, Path]) -> None:
    """At the second step where it is far off, and by the drift where it is not."""
    with pytest.raises(StageError, match=r"the sampler gave token .* of a completion of row r\d .*has other weights"):
        rl(tmp_path / "far", made, learning_rate=1e-2)
    text = caught(tmp_path / "near", made, "sampler_mismatch", learning_rate=1e-6, max_steps=60)
    assert "the sampler has old weights" in text


def test_numbers_that_are_none(tmp_path: Path, made: dict[str, Path]) -> None:
    """A reward, with its row and completion; a loss, with its step, before it reaches the weights; weights that a step
    ruined, when they are sampled from."""
    with pytest.raises(StageError, match="'not_a_number' returned nan for row r"):
        rl(tmp_path / "reward", made, rewards=[f"{HERE}:not_a_number"])
    with pytest.raises(StageError, match=r"step 1: loss .*rows r\d.*This step changed no weights"):
        rl(tmp_path / "loss", made, rewards=[f"{HERE}:endless"], scale_rewards="none")
    with pytest.raises(StageError, match=r"logits for prompt \d are not numbers \(NaN\).*training diverged"):
        rl(tmp_path / "weights", made, learning_rate=1e38, max_grad_norm=None)
