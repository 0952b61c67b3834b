"""Rollouts of later generations while earlier ones are trained on: which weights sample what, whatever is slow; the
correction for them; killed and resumed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from artifacts.errors import StageError
from stages import rl
from stages.context import Context, local_context
from tests.rollouts.model_server import ModelServer, model_server
from tests.stages.interruptions import process_killed_in_step
from tests.stages.overlapped_runs import SlowOnes, Weights, before_steps, copied, name_of
from tests.stages.small_models import output, read_lines, rows_of, save_dataset, save_model
from tests.warm import Warm

ROOT = Path(__file__).parents[2]
PROMPTS = [{"prompt": prompt, "completion": ""} for prompt in ("abc", "da", "hgf", "cab", "e", "bad")]
A_STEP = 8
"""Completions: two prompts, four each."""
SETTINGS: dict[str, Any] = {
    "rewards": ["tests.stages.test_overlap:letters"],
    "num_generations": 4,
    "train_batch_size": A_STEP,
    "max_completion_length": 5,
    "learning_rate": 3e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 6,
}


def letters(completions: list[str], **_: Any) -> list[float]:
    """How many different characters a completion has."""
    return [float(len(set(completion))) for completion in completions]


def begins_early(completions: list[str], **_: Any) -> list[float]:
    """Few do: many groups have no signal."""
    return [float(completion[:1] in ("a", "b")) for completion in completions]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    save_model(tmp_path / "model", 1)
    save_model(tmp_path / "other", 2)
    return {"model": tmp_path / "model", "dataset": save_dataset(tmp_path / "rows", "prompt_completion", PROMPTS)}


@pytest.fixture
def server(tmp_path: Path, inputs: dict[str, Path]) -> Iterator[tuple[ModelServer, dict[str, Any]]]:
    with model_server(tmp_path / "other") as opened:
        yield opened


def context_of(folder: Path, inputs: dict[str, Path], rollouts: dict[str, Any], **more: Any) -> Context:
    return local_context("rl", {**SETTINGS, **more, "rollouts": rollouts}, folder=folder, inputs=dict(inputs))


def done(context: Context) -> Context:
    AcceleratorState._reset_state(reset_partial_state=True)
    with context.resources:
        context.stage.run(context)
    return context


def results(context: Context) -> tuple[list[dict[str, Any]], list[dict[str, Any]], bytes]:
    """(rows of metrics, rollouts, weights)"""
    folder = output(context, "model")
    (weights,) = folder.glob("*.safetensors")
    return read_lines(folder / "metrics.jsonl"), rows_of(output(context, "rollouts")), weights.read_bytes()


CASES = [
    # staleness, steps a generation, the version behind every generation, the staleness of every step
    (1, 1, [0, 0, 1, 2, 3, 4], [0, 1, 1, 1, 1, 1]),
    (2, 1, [0, 0, 0, 1, 2, 3], [0, 1, 2, 2, 2, 2]),
    (1, 2, [0, 0, 2], [0, 1, 2, 3, 2, 3]),
    (9, 1, [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]),
]


@pytest.mark.parametrize("case", CASES)
def test_weights_follow_from_the_number_of_the_generation(
    case: tuple[int, int, list[int], list[int]],
    tmp_path: Path,
    inputs: dict[str, Path],
    server: tuple[ModelServer, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights that the server has when it answers are those that the trainer had so many steps before."""
    (staleness, steps, versions, ages), (model, rollouts) = case, server
    trained: dict[str, int] = {}
    answered: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    before_steps(
        monkeypatch,
        lambda number, trainer: trained.setdefault(name_of(copied(trainer.scorer.transformers_model)), number),
    )
    one, names = model._one, {}

    def noted(body: dict[str, Any], seed: int) -> dict[str, Any]:
        made = one(body, seed)
        key = tuple(body["prompt"]), tuple(made["token_ids"])
        names.setdefault(key, []).append(name_of(copied(model.model)))
        return made

    monkeypatch.setattr(model, "_one", noted)
    context = done(
        context_of(
            tmp_path,
            inputs,
            {**rollouts, "max_staleness": staleness, "proof_interval": 2},
            steps_per_generation=steps,
        )
    )
    metrics, records, _ = results(context)
    assert [row["weight_version"] for row in records] == [
        version for version in versions for _ in range(A_STEP * steps)
    ]
    for row in records:
        assert row["weight_versions"] == [row["weight_version"]] * len(row["token_ids"])
        said = {trained.get(name) for name in names[tuple(row["prompt_ids"]), tuple(row["token_ids"])]}
        assert row["weight_version"] in said
        answered.setdefault((tuple(row["prompt_ids"]), tuple(row["token_ids"])), []).append(row["weight_version"])
    for key, found in answered.items():  # nothing else was sampled, and nothing twice
        assert sorted(found) == sorted(trained[name] for name in names[key])
    assert [row["sample/staleness_max"] for row in metrics] == ages == [row["sample/staleness_mean"] for row in metrics]
    assert model.loads == len(set(versions))


def test_whoever_is_slow_the_run_is_the_same(
    tmp_path: Path,
    inputs: dict[str, Path],
    server: tuple[ModelServer, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, rollouts = server
    rollouts = {**rollouts, "max_staleness": 1, "proof_interval": 100}
    ends = range(A_STEP, 6 * A_STEP + 1, A_STEP)
    slow, found = SlowOnes(model, ends, monkeypatch), []
    for is_slow in (True, False):
        slow.begin(server_is_slow=is_slow)
        found.append(results(done(context_of(tmp_path / str(is_slow), inputs, rollouts))))
        assert slow.answered == ends[-1]
    assert found[0] == found[1]


def test_with_weights_that_stay_the_same_it_is_the_synchronous_run(
    tmp_path: Path, inputs: dict[str, Path], server: tuple[ModelServer, dict[str, Any]]
) -> None:
    """A learning rate that changes no weight: the same prompts, seeds and rewards in the same order, also where they
    decide on what is sampled next, and the same losses, for all corrections are 1."""
    _, rollouts = server
    save_model(tmp_path / "judge", 3, reward=True)
    inputs = {**inputs, "reward_model": tmp_path / "judge"}
    more = {
        "learning_rate": 1e-30,
        "dynamic_sampling_rounds": 1,
        "curriculum": "weighted",
        "pass_reward": 3.0,
        "replay_buffer_size": 0,
    }
    runs = []
    for staleness in (0, 2):
        engine = {**rollouts, "max_staleness": staleness}
        metrics, records, weights = results(done(context_of(tmp_path / str(staleness), inputs, engine, **more)))
        for row in records:
            del row["weight_version"], row["weight_versions"]
        runs.append((records, weights, metrics))
    assert runs[0][:2] == runs[1][:2]
    for now, ahead in zip(runs[0][2], runs[1][2], strict=True):
        assert {name for name in ahead if name not in now} == {"sample/staleness_mean", "sample/staleness_max"}
        assert {name: ahead[name] for name in now} == pytest.approx(now, abs=1e-6)


def test_the_loss_corrects_for_what_the_sampler_thought(
    tmp_path: Path,
    inputs: dict[str, Path],
    server: tuple[ModelServer, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """dapo on its first use of completions: ratios to the policy of the step are 1, so the loss is
    -mean over tokens of advantage x min(exp(log p_trainer - log p_sampler), 1.2), by transformers."""
    _, rollouts = server
    weights: dict[int, Weights] = {}
    before_steps(
        monkeypatch,
        lambda number, trainer: weights.setdefault(number, copied(trainer.scorer.transformers_model)),
    )
    settings = {"importance_sampling_clip_max": 1.2, "temperature": 0.8}
    engine = {**rollouts, "max_staleness": 2}
    metrics, records, _ = results(done(context_of(tmp_path, inputs, engine, **settings)))
    model = AutoModelForCausalLM.from_pretrained(inputs["model"]).eval()
    clipped = 0
    for step, row in enumerate(metrics):
        model.load_state_dict(weights[step])
        terms, ratios = [], []
        for record in records[step * A_STEP : (step + 1) * A_STEP]:
            changes = logprobs(model, record, 0.8) - torch.tensor(record["logprobs"])
            terms.append(-record["advantage"] * changes.exp().clamp(max=1.2))
            ratios.append(changes.exp().clamp(max=1.2))
        clipped += int((torch.cat(ratios) == 1.2).sum())
        assert row["loss"] == pytest.approx(float(torch.cat(terms).mean()), abs=1e-5)
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(
            float(torch.cat(ratios).mean()), abs=1e-5
        )
        stale = row["sampling/sampling_logp_difference/max"]
        assert stale < 1e-4 if step == 0 else stale > 1e-2
    assert clipped > 5


@torch.no_grad()
def logprobs(model: Any, record: dict[str, Any], temperature: float) -> torch.Tensor:
    tokens = torch.tensor([[*record["prompt_ids"], *record["token_ids"]]])
    logits_TV = model(tokens).logits[0, len(record["prompt_ids"]) - 1 : -1] / temperature
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(record["token_ids"])[:, None])[:, 0]


@pytest.mark.parametrize("way", ["merged", "adapter"])
def test_adapters_are_merged_into_what_is_held_or_are_it(
    way: str, tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sync is proved: the first one by fresh completions, the other four by what the server makes of the
    generation at hand, eight completions. A server that is sent adapters alone has the base already."""
    with model_server(tmp_path / ("model" if way == "adapter" else "other")) as (model, rollouts):
        of_prompt, proved = model._of_prompt, []
        monkeypatch.setattr(model, "_of_prompt", lambda *asked: proved.append(asked) or of_prompt(*asked))
        engine = {**rollouts, "max_staleness": 1, "proof_interval": 1, "lora_sync": way}
        context = done(context_of(tmp_path, inputs, engine, lora_r=4))
    assert (model.loads, len(proved)) == (5, 4 * A_STEP)
    assert (model.adapter is not None) == (way == "adapter")
    noted = {"rollouts/waiting_seconds", "rollouts/sampling_seconds", "rollouts/sampler_utilization"}
    assert noted <= {*context.timings}


# --- killed and resumed

KILLED: list[tuple[int, int, dict[str, Any]]] = [
    (1, 3, {}),
    (
        2,
        5,
        {
            "steps_per_generation": 2,
            "dynamic_sampling_rounds": 1,
            "curriculum": "weighted",
            "replay_buffer_size": 3,
            "num_generations": 8,
            "num_trained_generations": 4,
            "max_steps": 8,
            "rewards": ["tests.stages.test_overlap:begins_early"],
        },
    ),
]


@pytest.mark.parametrize(("staleness", "number", "more"), KILLED)
def test_killed_and_resumed(
    staleness: int,
    number: int,
    more: dict[str, Any],
    tmp_path: Path,
    inputs: dict[str, Path],
    server: tuple[ModelServer, dict[str, Any]],
    warm_process: Warm,
) -> None:
    """SIGKILL with a generation in flight: the resumed run has the rollouts, metrics and weights of one that was not
    disturbed, every rollout once."""
    _, rollouts = server
    engine = {**rollouts, "max_staleness": staleness}
    more = {**more, "checkpoint_steps": 1}
    whole = results(done(context_of(tmp_path / "whole", inputs, engine, **more)))
    process_killed_in_step(
        context_of(tmp_path / "killed", inputs, engine, **more), number, tmp_path / "spec.json", warm_process
    )
    again = done(context_of(tmp_path / "killed", inputs, engine, **more))
    assert again.resumed_from == number
    assert results(again) == whole
    ids = [row["row_id"] for row in whole[1]]
    assert len(set(ids)) == len(ids)
    if "curriculum" in more:  # there was something to lose
        for name in ("dynamic_sampling/replaced_groups", "replay/groups"):
            assert sum(row[name] for row in whole[0]) > 0
        assert len({row["curriculum/pass_rate"] for row in whole[0]}) > 1


# --- what goes wrong


def test_a_server_that_keeps_old_weights_is_found_out(
    tmp_path: Path,
    inputs: dict[str, Path],
    server: tuple[ModelServer, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the trainer goes on with a step: by both's log-probabilities of the generation at hand."""
    model, rollouts = server
    load = model._load
    monkeypatch.setattr(model, "_load", lambda folder: load(folder) if not model.loads else {})
    with pytest.raises(StageError, match=r"sync did not reach the engine.*it held 1 times before"):
        done(context_of(tmp_path, inputs, {**rollouts, "max_staleness": 1, "proof_interval": 1}))


def complaining(completions: list[str], **_: Any) -> list[float]:
    """Of the third generation."""
    complaining.calls += 1  # type: ignore[attr-defined]
    if complaining.calls == 3:  # type: ignore[attr-defined]
        raise KeyError("no such thing")
    return letters(completions)


def test_a_reward_that_fails_ahead_is_named(
    tmp_path: Path, inputs: dict[str, Path], server: tuple[ModelServer, dict[str, Any]]
) -> None:
    complaining.calls = 0  # type: ignore[attr-defined]
    _, rollouts = server
    rewards = ["tests.stages.test_overlap:complaining"]
    with pytest.raises(StageError, match=r"'complaining' raised KeyError: 'no such thing' \(\w+\.py:\d+\), .* row r\d"):
        done(context_of(tmp_path, inputs, {**rollouts, "max_staleness": 2}, rewards=rewards))
    assert not [thread for thread in threading.enumerate() if thread.name == "job queue"]


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"engine": "vllm"}, {}, "rollouts.max_staleness is of engine vllm_server; vllm has none"),
    ({"engine": "embedded"}, {}, "rollouts.max_staleness is of engine vllm_server; embedded has none"),
    ({}, {"importance_sampling_mode": None}, "importance_sampling_mode is null, but rollouts.max_staleness"),
    ({}, {"beta": 0.1, "kl_placement": "reward"}, "kl_placement reward with rollouts.max_staleness"),
    (
        {"weight_transfer": "nccl", "devices": "1", "max_restarts": 0},
        {},
        "rollouts.weight_transfer nccl sends weights that are still the trainer's",
    ),
]


@pytest.mark.parametrize(("engine", "more", "message"), REFUSED)
def test_refused(engine: dict[str, Any], more: dict[str, Any], message: str) -> None:
    rollouts = {"engine": "vllm_server", "max_staleness": 1, **engine}
    config = rl.Config(**{**SETTINGS, **more}, rollouts=rollouts)
    assert [problem for problem in rl.check(config, frozenset({"dataset"})) if message in problem]
