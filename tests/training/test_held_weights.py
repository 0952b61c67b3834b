"""Weights that wait for later generations (`max_staleness`): how many copies there are at most, and their bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from peft import LoraConfig, get_peft_model

from stages import rl
from stages.rollouts.requests import Completion, SamplingConfig
from stages.training.engine_sync import sent
from stages.training.in_flight_engine import InFlightEngine
from stages.training.job_queue import JobQueue
from stages.training.lagging_engine import Held, LaggingEngine
from stages.training.memory_online import held_bytes
from stages.training.memory_request import Request
from stages.training.memory_shape import read_shape
from stages.training.memory_training import Setup
from stages.training.model import Scorer
from stages.training.rollout_plan import Plan
from stages.training.rollouts_ahead import Ahead
from tests.vllm.models import save_model

STEPS = 8


class Holding:
    """As `LaggingEngine` holds weights; `most`: copies that there were at once."""

    def __init__(self) -> None:
        self.alive: WeakSet[Held] = WeakSet()
        self.version = self.most = 0

    def hold(self) -> tuple[Held, bool]:
        held = Held(self.version, ())
        self.alive.add(held)
        self.version += 1
        self.most = max(self.most, len(self.alive))
        return held, False

    def renew(self) -> None:
        pass

    def take(self, held: Held, *, prove: bool) -> None:
        pass


class Nothing:
    """Draws of no completions."""

    def __len__(self) -> int:
        return STEPS

    def draw(self, generation: int) -> tuple[list[Any], list[Any]]:
        return [], []

    def metrics(self, kept: Any, replaced: Any) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_so_many_copies_wait_at_most_as_generations(staleness: int) -> None:
    plan = Plan(1, 1, 1, 1, mask_truncated=False, seed=0, epochs=1, max_steps=STEPS)
    holding, line = Holding(), JobQueue()
    ahead = Ahead(Nothing(), plan, holding, line, staleness=staleness, settings=SamplingConfig())
    for generation in range(STEPS):
        ahead.draw(generation)
    line.close()
    assert holding.version == STEPS - staleness
    assert holding.most == staleness


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", ["whole", "merged", "adapter"])
def test_the_prediction_counts_their_bytes(way: str, tied: bool, tmp_path: Path) -> None:
    """Against what is really held, twice; adapters merged come to the model's, alone to theirs."""
    model: Any = save_model(tmp_path, 1, tied=tied)
    lora = {} if way == "whole" else {"lora_r": 4}
    sync = "adapter" if way == "adapter" else "merged"
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    scorer = Scorer(model)
    unused: Any = None
    engine = LaggingEngine(
        unused, unused, partial(sent, adapter=way == "adapter"), policy=lambda: scorer, version=lambda: 0, interval=1
    )
    held = engine.hold()[0].weights
    config = rl.Config(rollouts={"engine": "vllm_server", "max_staleness": 2, "lora_sync": sync}, **lora)
    shape = read_shape(json.loads((tmp_path / "config.json").read_text()))
    predicted = [
        held_bytes(Request(config, {"model": shape}, frozenset(), Setup(device=device))) for device in ("cpu", "cuda")
    ]
    assert predicted == [2 * sum(tensor.nbytes for _, tensor in held), 0]


def test_in_flight_none_wait(tmp_path: Path) -> None:
    """They are given to the engine at once, which has the newest ones only once."""
    scorer = Scorer(save_model(tmp_path, 1))
    engine = Receiving()
    in_flight = InFlightEngine(
        engine, engine, partial(sent, adapter=False), policy=lambda: scorer, version=lambda: 3, interval=1
    )
    assert [in_flight.hold()[0] for _ in range(2)] == [Held(3, ())] * 2
    assert engine.received == [[name for name, _ in sent(scorer, adapter=False)]]
    config = rl.Config(rollouts={"engine": "vllm_server", "max_staleness": 2, "in_flight_updates": True})
    shape = read_shape(json.loads((tmp_path / "config.json").read_text()))
    assert held_bytes(Request(config, {"model": shape}, frozenset(), Setup(device="cpu"))) == 0


def test_a_completion_may_end_while_its_weights_are_still_on_their_way_to_others(tmp_path: Path) -> None:
    """Two tokens by the first weights, of step 5, and one by the second ones, of step 7, which one server has."""
    scorer, steps = Scorer(save_model(tmp_path, 1)), [5, 7]
    engine = Receiving(lambda: in_flight.sample([], SamplingConfig()))
    in_flight = InFlightEngine(
        engine, engine, partial(sent, adapter=False), policy=lambda: scorer, version=lambda: steps[0], interval=1
    )
    for _ in range(2):
        in_flight.renew()
        steps.pop(0)
    ((one,),) = engine.ended[1]
    assert one.weight_versions == [5, 5, 7]


class Receiving:
    """As an engine takes weights, the second ones `amid` a completion."""

    def __init__(self, amid: Callable[[], Any] = lambda: None) -> None:
        self.received: list[list[str]] = []
        self.ended: list[Any] = []
        self._amid = amid

    def load(self, weights: Any) -> None:
        self.received.append([name for name, _ in weights])
        self.ended.append(self._amid() if len(self.received) == 2 else None)

    def sample(self, *_: Any) -> list[list[Completion]]:
        return [[Completion([4, 5, 6], [-0.5] * 3, False, weight_versions=[1, 1, 2])]]
