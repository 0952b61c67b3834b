"""Weights updated in flight: a run whose every meeting of rollouts and weights is arranged, so that which weights made
which token is known by hand; and one killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages import rl
from stages.training.loop import Trainer
from tests.rollouts.model_server import ModelServer
from tests.stages.test_overlap import (
    A_STEP,
    PROGRAM,
    ROOT,
    SETTINGS,
    Weights,
    before_steps,
    context_of,
    copied,
    done,
    logprobs,
    results,
)
from tests.stages.test_overlap import inputs as inputs
from tests.stages.test_overlap import server as server
from tests.vllm.models import over_kept_cache

STEPS = 4
PROMPTS = 2
"""Of a generation, each asked for once with four completions."""
FIRST = 2
"""Tokens of a first completion before new weights come."""
IN_FLIGHT = {"max_staleness": 1, "in_flight_updates": True}


class Meetings:
    """The weights of step g come when each prompt of generation g has two tokens of its first completion, and no others
    before they are there."""

    def __init__(self, model: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: dict[int, Weights] = {}
        self._changed, self._waiting, self._named = threading.Condition(), set[int](), 0
        name = model._name
        monkeypatch.setattr(model, "_name", lambda version: (name(version), self._note(version))[0])
        model.before_token = self._before_token
        before_steps(monkeypatch, self._before_step)

    def _note(self, version: str) -> None:
        with self._changed:
            self._named = int(version.rpartition("-")[2]) if version[-1:].isdecimal() else 0
            self._changed.notify_all()

    def _before_token(self, question: int, index: int, token: int) -> None:
        generation = question // PROMPTS
        if generation and (index, token) in ((0, FIRST), (1, 0)):
            with self._changed:
                self._waiting.add(question)
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: self._named == generation + 1, timeout=60)

    def _before_step(self, step: int, trainer: Trainer) -> None:
        self.weights[step] = copied(trainer.scorer.transformers_model)
        following = {PROMPTS * (step + 1) + place for place in range(PROMPTS)}
        with self._changed:
            assert step + 1 == STEPS or self._changed.wait_for(lambda: following <= self._waiting, timeout=60)


def test_tokens_are_of_the_weights_that_were_there(
    tmp_path: Path,
    inputs: dict[str, Path],
    server: tuple[ModelServer, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of generation g, two tokens of a prompt's first completion are of the weights before; all else is of those that
    learn from it, the other completions over a prompt that the older ones have read. By transformers:
    log-probabilities, and the loss, -mean over tokens of advantage x min(exp(log p_trainer - log p_sampler), 1.2)."""
    model, rollouts = server
    meetings = Meetings(model, monkeypatch)
    settings = {"max_steps": STEPS, "importance_sampling_clip_max": 1.2}
    engine = {**rollouts, **IN_FLIGHT, "proof_interval": 2}
    metrics, records, _ = results(done(context_of(tmp_path, inputs, engine, **settings)))
    models = {step: AutoModelForCausalLM.from_pretrained(inputs["model"]).eval() for step in range(STEPS)}
    for step, one in models.items():
        one.load_state_dict(meetings.weights[step])
    for step, row in enumerate(metrics):
        of_step = records[step * A_STEP : (step + 1) * A_STEP]
        before = max(0, step - 1)
        for place, record in enumerate(of_step):
            count = len(record["token_ids"])
            old = min(FIRST, count) if place % (A_STEP // PROMPTS) == 0 else 0
            versions = [before] * old + [step] * (count - old)
            assert record["weight_versions"] == versions
            assert record["weight_version"] == before
            found = over_kept_cache(models, record["prompt_ids"], record["token_ids"], versions, prompt_by=before)
            assert record["logprobs"] == pytest.approx(found, abs=1e-5)
        _compare_ages(row, [record["weight_versions"] for record in of_step], step)
        terms = [_terms(models[step], record) for record in of_step]
        assert row["loss"] == pytest.approx(float(torch.cat(terms).mean()), abs=1e-5)
    assert any(len(set(record["weight_versions"])) == 2 for record in records)
    assert model.loads == STEPS


def _compare_ages(row: dict[str, Any], versions: list[list[int]], step: int) -> None:
    ages = [step - version for one in versions for version in one]
    counts = [len(set(one)) for one in versions]
    assert row["sample/staleness_mean"] == pytest.approx(fmean(ages)) == row["sample/stale_tokens"]
    assert row["sample/staleness_max"] == max(ages) <= 1
    assert row["sample/weight_versions_mean"] == pytest.approx(fmean(counts))
    assert row["sample/weight_versions_max"] == max(counts)


def _terms(model: Any, record: dict[str, Any]) -> torch.Tensor:
    changes = logprobs(model, record, 1.0) - torch.tensor(record["logprobs"])
    return -record["advantage"] * changes.exp().clamp(max=1.2)


def test_killed_and_resumed_with_weights_that_stay_the_same_it_is_the_synchronous_run(
    tmp_path: Path, inputs: dict[str, Path], server: tuple[ModelServer, dict[str, Any]]
) -> None:
    """SIGKILL with a generation in flight: every rollout is there once. Only who made which tokens depends on who is
    fast, within the bound."""
    _, rollouts = server
    more = {"learning_rate": 1e-30, "checkpoint_steps": 1, "max_steps": STEPS}
    _, whole, weights = results(done(context_of(tmp_path / "whole", inputs, rollouts, **more)))
    engine = {**rollouts, **IN_FLIGHT}
    context = context_of(tmp_path / "killed", inputs, engine, **more)
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(asdict(context.spec)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM.format(number=2), str(spec)]
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
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


@pytest.mark.parametrize(("engine", "message"), REFUSED)
def test_refused(engine: dict[str, Any], message: str) -> None:
    rollouts = {"engine": "vllm_server", **IN_FLIGHT, **engine}
    config = rl.Config(**SETTINGS, lora_r=4, rollouts=rollouts)
    assert [problem for problem in rl.check(config, frozenset({"dataset"})) if message in problem]
