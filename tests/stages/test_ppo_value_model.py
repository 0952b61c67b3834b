"""The stage `ppo` with input `value_model`: a whole generation against a plain loop, how it starts, what it leaves."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from artifacts.errors import StageError
from stages.ppo import STAGE, Config
from stages.training.model import load_causal_lm
from tests.data.characters import CHARACTERS, build_tokenizer, ids
from tests.stages.online_runs import make_inputs
from tests.stages.small_models import output, read_lines, rows_of, run_stage, save_model

KL, GAMMA, LAM, VALUE_WEIGHT, NORM, RATE, VALUE_RATE, EPSILON = 0.1, 0.97, 0.9, 0.5, 0.8, 1e-3, 4e-3, 1e-2
SETTINGS: dict[str, Any] = {
    "rewards": ["tests.stages.small_models:letters"],
    "train_batch_size": 4,
    "max_steps": 2,
    "num_ppo_epochs": 2,
    "max_completion_length": 5,
    "temperature": 1.0,
    "learning_rate": RATE,
    "value_learning_rate": VALUE_RATE,
    "lr_scheduler_type": "constant",
    "adam_epsilon": EPSILON,  # so large that rounding of small gradients is not blown up
    "max_grad_norm": NORM,
    "kl_coef": KL,
    "gamma": GAMMA,
    "lam": LAM,
    "vf_coef": VALUE_WEIGHT,
    "cliprange_value": 0.05,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """As of the other on-line stages, and a reward model."""
    folder = tmp_path_factory.mktemp("made")
    return {**make_inputs(folder), "judge": save_model(folder / "judge", seed=5, reward=True)}


def run(made: dict[str, Any], folder: Path, value_model: str | Path = "judge", **changes: Any) -> dict[str, Any]:
    """Folders of the outputs, rows of metrics, rollouts."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {**SETTINGS, "save_value_model": True, **changes}
    inputs = {"model": made["folder"] / "policy", "dataset": made["rows"]}
    if settings["kl_coef"]:
        inputs["reference"] = made["folder"] / "reference"
    inputs["value_model"] = made["folder"] / value_model
    context = run_stage("ppo", folder, inputs, **settings)
    trained = "model" if settings.get("merge_adapters", True) else "adapter"
    names = trained, "rollouts", "value_model"
    outputs = dict(zip(("model", "rollouts", "value_model"), (output(context, name) for name in names), strict=True))
    return {**outputs, "metrics": read_lines(outputs["model"] / "metrics.jsonl"), "rows": rows_of(outputs["rollouts"])}


def logprobs(model: Any, row: dict[str, Any]) -> Tensor:
    """Of a completion's tokens."""
    tokens, first = torch.tensor([[*ids(row["prompt"]), *row["token_ids"]]]), len(ids(row["prompt"]))
    logits_TV = model(input_ids=tokens).logits[0, first - 1 : -1]
    return logits_TV.log_softmax(-1)[range(len(row["token_ids"])), row["token_ids"]]


def values(critic: Any, row: dict[str, Any]) -> Tensor:
    """Before each of a completion's tokens."""
    tokens, first = torch.tensor([[*ids(row["prompt"]), *row["token_ids"]]]), len(ids(row["prompt"]))
    return critic.score(critic.model(input_ids=tokens).last_hidden_state)[0, first - 1 : -1, 0]


def targets(policy: Any, reference: Any, critic: Any, rows: list[dict[str, Any]]) -> list[tuple[Tensor, ...]]:
    """A row: old log-probabilities, old values, whitened advantages, returns. Schulman et al., arXiv:1506.02438."""
    known = []
    with torch.no_grad():
        for row in rows:
            old_T, value_T = logprobs(policy, row).double(), values(critic, row).double()
            reward_T = -KL * (old_T - logprobs(reference, row).double())
            reward_T[-1] += row["reward"]
            advantage, advantages = 0.0, []
            for place in reversed(range(len(reward_T))):
                after = float(value_T[place + 1]) if place + 1 < len(value_T) else 0.0
                advantage = float(reward_T[place] + GAMMA * after - value_T[place]) + GAMMA * LAM * advantage
                advantages.insert(0, advantage)
            advantage_T = torch.tensor(advantages, dtype=torch.float64)
            known.append((old_T, value_T, advantage_T, advantage_T + value_T))
    flat = torch.cat([entry[2] for entry in known])
    return [
        (old_T, value_T, (advantage_T - flat.mean()) / (flat.var() + 1e-8).sqrt(), return_T)
        for old_T, value_T, advantage_T, return_T in known
    ]


def plain_step(policy: Any, critic: Any, rows: list[dict[str, Any]], known: list[tuple[Tensor, ...]]) -> Tensor:
    """The loss of one update."""
    policy_T, value_T = [], []
    for row, (old_T, before_T, advantage_T, return_T) in zip(rows, known, strict=True):
        ratio_T, now_T = (logprobs(policy, row) - old_T).exp(), values(critic, row)
        policy_T.append(torch.maximum(-advantage_T * ratio_T, -advantage_T * ratio_T.clamp(0.8, 1.2)))
        near_T = before_T + (now_T - before_T).clamp(-0.05, 0.05)
        value_T.append(torch.maximum((now_T - return_T) ** 2, (near_T - return_T) ** 2) / 2)
    return torch.cat(policy_T).mean() + VALUE_WEIGHT * torch.cat(value_T).mean()


def test_a_generation_and_its_two_steps_are_those_of_a_plain_loop(made: dict[str, Any], tmp_path: Path) -> None:
    """The second step is off policy. One AdamW with two rates, and one norm over both models that is clipped."""
    found = run(made, tmp_path)
    policy, critic = deepcopy(made["policy"]), deepcopy(made["judge"])
    known = targets(policy, made["reference"], critic, found["rows"])
    groups = [{"params": policy.parameters(), "lr": RATE}, {"params": critic.parameters(), "lr": VALUE_RATE}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=EPSILON, weight_decay=0.0)
    both = [*policy.parameters(), *critic.parameters()]
    for row in found["metrics"]:
        optimizer.zero_grad()
        loss = plain_step(policy, critic, found["rows"], known)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(both, NORM))
        optimizer.step()
        assert norm > NORM
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert found["metrics"][1]["policy/approxkl_avg"] > 0
    for folder, library, expected in (
        (found["model"], load_causal_lm, policy),
        (found["value_model"], AutoModelForSequenceClassification.from_pretrained, critic),
    ):
        for one, other in zip(library(folder).parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


def test_other_micro_batches_and_activations_computed_twice_change_nothing(
    made: dict[str, Any], tmp_path: Path
) -> None:
    whole = run(made, tmp_path / "whole")
    cut = run(made, tmp_path / "cut", micro_batch_tokens=1, gradient_checkpointing=True)
    for left, right in zip(whole["metrics"], cut["metrics"], strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-5)


def test_a_language_model_starts_with_values_of_zero_and_goes_on_with_what_it_learnt(
    made: dict[str, Any], tmp_path: Path
) -> None:
    """Without KL and discount every token's return is the completion's reward R, whatever the values v are: the value
    loss is the mean of (v - R)^2 / 2, with v = 0 at first, and then with what the artifact of the run before says."""
    changes = {"kl_coef": 0.0, "gamma": 1.0, "lam": 1.0, "max_steps": 1, "cliprange_value": 100.0}
    first = run(made, tmp_path / "first", "policy", **changes)
    rewards = [row["reward"] for row in first["rows"] for _ in row["token_ids"]]
    expected = sum(reward**2 for reward in rewards) / len(rewards) / 2
    assert first["metrics"][0]["loss/value_avg"] == pytest.approx(expected, rel=1e-5)
    second = run(made, tmp_path / "second", first["value_model"], **changes)
    critic = AutoModelForSequenceClassification.from_pretrained(first["value_model"])
    with torch.no_grad():
        errors = torch.cat([values(critic, row) - row["reward"] for row in second["rows"]])
    assert second["metrics"][0]["loss/value_avg"] == pytest.approx(float(errors.square().mean()) / 2, rel=1e-5)
    assert second["metrics"][0]["loss/value_avg"] != pytest.approx(expected, rel=1e-3)


def weights_of(folder: Path) -> Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_beside_adapters_and_in_bfloat16_the_whole_value_model_learns(made: dict[str, Any], tmp_path: Path) -> None:
    """Fresh adapters change nothing, so the value model's first step is that of a policy that is trained whole, unless
    gradients are clipped together. Bfloat16 rounds it."""
    changes = {"kl_coef": 0.0, "max_grad_norm": None, "max_steps": 1}
    whole = run(made, tmp_path / "whole", **changes)
    adapted = run(made, tmp_path / "adapted", lora_r=2, merge_adapters=False, **changes)
    rounded = run(made, tmp_path / "rounded", bf16=True, **changes)
    before = torch.cat([parameter.detach().flatten() for parameter in made["judge"].parameters()])
    moved, of_adapted, of_rounded = (weights_of(one["value_model"]) - before for one in (whole, adapted, rounded))
    assert float(moved.abs().max()) > 1e-4
    torch.testing.assert_close(of_adapted, moved, atol=1e-7, rtol=1e-5)
    assert float(torch.cosine_similarity(of_rounded, moved, dim=0)) > 0.99
    names = {path.name for path in adapted["model"].iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


def other_tokens(folder: Path) -> Path:
    """The judge, with two of its characters exchanged."""
    backend = json.loads(build_tokenizer().backend_tokenizer.to_str())
    words = backend["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    save_model(folder, seed=5, reward=True)
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    return folder


def resized(folder: Path, **changes: int) -> Path:
    """A reward model of other sizes."""
    model = save_model(folder, seed=5, reward=True)
    config = model.config
    for name, value in changes.items():
        setattr(config, name, value)
    type(model)(config).save_pretrained(folder)
    return folder


def test_a_value_model_that_cannot_see_the_policys_rows_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"another tokenizer than the policy \(15 and 15 tokens; for example .*'a', "):
        run(made, tmp_path / "1", other_tokens(tmp_path / "other"))
    known = len(CHARACTERS) + 3
    few = resized(tmp_path / "few", vocab_size=known - 1)
    with pytest.raises(StageError, match=rf"embeddings of {known - 1} token ids, the policy can sample {known}"):
        run(made, tmp_path / "2", few)
    short = resized(tmp_path / "short", max_position_embeddings=7)
    with pytest.raises(StageError, match=r"row r0: a prompt of 3 tokens and a completion of 5 come to 8, .* takes 7"):
        run(made, tmp_path / "3", short)


def test_what_does_not_go_together() -> None:
    config = Config(rewards=("exact_match",), save_value_model=True)
    assert STAGE.check is not None
    (problem,) = STAGE.check(config, frozenset({"model", "dataset"}))
    assert "input value_model is not wired in" in problem
    assert STAGE.check(config, frozenset({"model", "dataset", "value_model"})) == []
    assert set(STAGE.outputs_of(config)) == {"model", "rollouts", "value_model"}
    assert set(STAGE.outputs_of(Config(rewards=("exact_match",)))) == {"model", "rollouts"}
