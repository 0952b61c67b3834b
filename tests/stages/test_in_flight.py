"""Weights updated in flight: a run whose every meeting of rollouts and weights is arranged, so that which weights made
which token is known by hand; and one killed and resumed."""

from __future__ import annotations

import threading
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages import rl
from stages.training.loop import Trainer
from tests.rollouts.model_server import ModelServer
from tests.stages.interruptions import process_killed_in_step
from tests.stages.overlapped_runs import Weights, before_steps, copied
from tests.stages.test_overlap import A_STEP, SETTINGS, context_of, done, logprobs, results
from tests.stages.test_overlap import inputs as inputs
from tests.stages.test_overlap import server as server
from tests.vllm.models import over_kept_cache
from tests.waiting import LIMIT_SECONDS
from tests.warm import Warm

STEPS = 4
PROMPTS = 2
"""Of a step, each asked for once with four completions."""
FIRST = 2
"""Tokens of a first completion before new weights come; then one more before any others do."""
IN_FLIGHT = {"max_staleness": 1, "in_flight_updates": True}


class Meetings:
    """Weights come while the questions of a generation wait for them: each has two tokens of its first completion when
    those after the first step of the generation before come, and one more before each later ones'."""

    def __init__(self, model: ModelServer, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
        """`steps`: of a generation."""
        self.weights: dict[int, Weights] = {}
        self._steps, self._changed, self._version = steps, threading.Condition(), -1
        self._awaited: dict[int, int] = {}
        """Question -> version that it waits for, or has."""
        name = model._name
        monkeypatch.setattr(model, "_name", lambda version: (name(version), self._note(version))[0])
        model.before_token = self._before_token
        before_steps(monkeypatch, self._before_step)

    def _note(self, name: str) -> None:
        with self._changed:
            if name[-1:].isdecimal():  # of the weights that were sent so many at a time, counted from 1
                self._version = int(name.rpartition("-")[2]) - 1
            self._changed.notify_all()

    def _before_token(self, question: int, index: int, token: int) -> None:
        generation = question // (PROMPTS * self._steps)
        if generation and (index, token) == (1, 0):
            self._await(question, generation * self._steps)
        elif generation and index == 0 and 0 <= token - FIRST < self._steps:
            self._await(question, (generation - 1) * self._steps + token - FIRST + 1)

    def _await(self, question: int, version: int) -> None:
        with self._changed:
            self._awaited[question] = version
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._version >= version, timeout=LIMIT_SECONDS)

    def _before_step(self, step: int, trainer: Trainer) -> None:
        self.weights[step] = copied(trainer.scorer.transformers_model)
        following, size = step // self._steps + 1, PROMPTS * self._steps
        questions = range(following * size, (following + 1) * size) if following * self._steps < STEPS else ()
        with self._changed:
            assert self._changed.wait_for(
                lambda: all(self._awaited.get(one, 0) > step for one in questions), LIMIT_SECONDS
            )


@pytest.mark.parametrize("steps", [1, 2])
def test_tokens_are_of_the_weights_that_were_there(
    steps: int,
    tmp_path: Path,
    inputs: dict[str, Path],
    server: tuple[ModelServer, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a generation a first completion of a prompt has two tokens of the weights from before the generation that
    it was drawn beside, one more of those after each step on that but the last, and all others of those after the last;
    so are the other completions, over a prompt that the oldest weights have read. Log-probabilities by transformers."""
    model, rollouts = server
    meetings = Meetings(model, monkeypatch, steps)
    settings = {"max_steps": STEPS, "importance_sampling_clip_max": 1.2, "steps_per_generation": steps}
    engine = {**rollouts, **IN_FLIGHT, "proof_interval": 2}
    metrics, records, _ = results(done(context_of(tmp_path, inputs, engine, **settings)))
    models = {step: AutoModelForCausalLM.from_pretrained(inputs["model"]).eval() for step in range(STEPS)}
    for step, one in models.items():
        one.load_state_dict(meetings.weights[step])
    for place, record in enumerate(records):
        newest = place // (A_STEP * steps) * steps
        oldest, count = max(0, newest - steps), len(record["token_ids"])
        changes = range(oldest, newest) if place % (A_STEP // PROMPTS) == 0 else ()
        first = [version for version in changes for _ in range(FIRST if version == oldest else 1)]
        versions = [*first, *[newest] * count][:count]
        assert record["weight_versions"] == versions
        assert record["weight_version"] == oldest
        found = over_kept_cache(models, record["prompt_ids"], record["token_ids"], versions, prompt_by=oldest)
        assert record["logprobs"] == pytest.approx(found, abs=1e-5)
    assert max(len(set(record["weight_versions"])) for record in records) == steps + 1
    for step, row in enumerate(metrics):
        first_step = step // steps * steps
        drawn = records[first_step * A_STEP : (first_step + steps) * A_STEP]
        _compare_ages(row, [record["weight_versions"] for record in drawn], step)
        if steps == 1:
            terms = [_terms(models[step], record) for record in drawn]
            assert row["loss"] == pytest.approx(float(torch.cat(terms).mean()), abs=1e-5)
    assert model.loads == (STEPS if steps == 1 else STEPS - 1)  # for the last step nothing is in flight


def _compare_ages(row: dict[str, Any], versions: list[list[int]], step: int) -> None:
    """Of the step with this index."""
    ages = [step - version for one in versions for version in one]
    counts = [len(set(one)) for one in versions]
    assert row["sample/stale_tokens"] == pytest.approx(fmean(age > 0 for age in ages))
    assert row["sample/staleness_mean"] == pytest.approx(fmean(ages))
    assert row["sample/staleness_max"] == max(ages)
    assert row["sample/weight_versions_mean"] == pytest.approx(fmean(counts))
    assert row["sample/weight_versions_max"] == max(counts)


def _terms(model: Any, record: dict[str, Any]) -> torch.Tensor:
    """-advantage x min(exp(log p_trainer - log p_sampler), 1.2) of each token: dapo where the ratios to the policy of
    the step are 1."""
    changes = logprobs(model, record, 1.0) - torch.tensor(record["logprobs"])
    return -record["advantage"] * changes.exp().clamp(max=1.2)


def test_killed_and_resumed_with_weights_that_stay_the_same_it_is_the_synchronous_run(
    tmp_path: Path, inputs: dict[str, Path], server: tuple[ModelServer, dict[str, Any]], warm_process: Warm
) -> None:
    """SIGKILL with a generation in flight: every rollout is there once. Only who made which tokens depends on who is
    fast, within the bound."""
    _, rollouts = server
    more = {"learning_rate": 1e-30, "checkpoint_steps": 1, "max_steps": STEPS}
    _, whole, weights = results(done(context_of(tmp_path / "whole", inputs, rollouts, **more)))
    engine = {**rollouts, **IN_FLIGHT}
    killed = context_of(tmp_path / "killed", inputs, engine, **more)
    process_killed_in_step(killed, 2, tmp_path / "spec.json", warm_process)
    again = done(context_of(tmp_path / "killed", inputs, engine, **more))
    assert again.resumed_from == 2
    metrics, records, same = results(again)
    assert same == weights
    for record in records:
        step = record["step"] - 1
        assert {step - version for version in record["weight_versions"]} <= {0, 1}
    assert all(row["sample/staleness_max"] <= 1 for row in metrics)
    for one, other in zip(records, whole, strict=True):
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-5)  # over a cache and without
        for name in other.keys() - {"logprobs", "weight_version", "weight_versions"}:
            assert one[name] == other[name]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_staleness": 0}, "with rollouts.max_staleness 0 the trainer waits for all completions"),
    ({"engine": "vllm", "max_staleness": 0}, "rollouts.in_flight_updates is of engine vllm_server; vllm has none"),
    ({"lora_sync": "adapter"}, "rollouts.lora_sync adapter with rollouts.in_flight_updates: vLLM ends a completion"),
]


def test_weights_that_wait_nowhere_may_go_over_nccl() -> None:
    nccl = {"engine": "vllm_server", "weight_transfer": "nccl", "devices": "1", "max_restarts": 0}
    wired = frozenset({"dataset"})
    assert rl.check(rl.Config(**SETTINGS, rollouts={**nccl, **IN_FLIGHT}), wired) == []
    assert len(rl.check(rl.Config(**SETTINGS, rollouts={**nccl, "max_staleness": 1}), wired)) == 1


@pytest.mark.parametrize(("engine", "message"), REFUSED)
def test_refused(engine: dict[str, Any], message: str) -> None:
    rollouts = {"engine": "vllm_server", **IN_FLIGHT, **engine}
    config = rl.Config(**SETTINGS, lora_r=4, rollouts=rollouts)
    assert [problem for problem in rl.check(config, frozenset({"dataset"})) if message in problem]
