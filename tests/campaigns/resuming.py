"""Tiny trainings, each killed in a step and taken up again: the bytes of one that was never interrupted. And bugs of
what a checkpoint holds, which these must find.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from stages.context import Context, local_context
from stages.seeds import derive
from stages.training.loop import Trainer
from stages.training.prompt_order import PromptOrder
from stages.training.replicated import Replicated
from tests.stages.interruptions import Killed, files_of
from tests.stages.small_models import output, save_dataset, save_model

ROWS = [
    {"prompt": "abc", "completion": "de"},
    {"prompt": "da", "completion": "bbcaaa"},
    {"prompt": "hgf", "completion": "e"},
    {"prompt": "cab", "completion": "aabbcc"},
]
TRAINING = {"learning_rate": 1e-2, "train_batch_size": 3, "max_steps": 6, "checkpoint_steps": 2}
KILLED_AT = 4


def noise() -> list[str]:
    """Of adapters with dropout."""
    return differences("sft", {"lora_r": 2, "lora_dropout": 0.5})


def prompts() -> list[str]:
    """Of prompts in an order that is drawn anew for every pass over them."""
    rewards = {"rewards": ["tests.stages.small_models:letters"], "num_generations": 3, "max_completion_length": 3}
    return differences("rl", rewards)


def differences(stage: str, settings: dict[str, Any]) -> list[str]:
    """Files of the model that are not those of a training without a kill."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(folder / "model", seed=1)
        inputs = {"model": folder / "model", "dataset": save_dataset(folder / "rows", "prompt_completion", ROWS)}

        def run(place: str) -> Context:
            AcceleratorState._reset_state(reset_partial_state=True)
            context = local_context(stage, TRAINING | settings, folder=folder / place, inputs=inputs)
            context.stage.run(context)
            return context

        whole = files_of(output(run("whole"), "model"))
        with _killed_in_step(KILLED_AT), contextlib.suppress(Killed):
            run("killed")
            return ["it was not killed"]
        resumed = run("killed")
        if resumed.resumed_from is None:
            return ["it was not resumed"]
        found = files_of(output(resumed, "model"))
        assert {"model.safetensors", "metrics.jsonl"} <= whole.keys()
        return [f"{path} differs after a kill" for path in sorted(whole) if found.get(path) != whole[path]]


@contextlib.contextmanager
def _killed_in_step(number: int) -> Iterator[None]:
    step, begun = Trainer.step, list[None]()

    def deadly(self: Trainer, *arguments: Any) -> Any:
        begun.append(None)
        if len(begun) == number:
            raise Killed
        return step(self, *arguments)

    with mock.patch.object(Trainer, "step", deadly):
        yield


# the bugs


def moments_dropped() -> AbstractContextManager[Any]:
    """The optimizer begins anew with every process."""
    load = Replicated.load

    def forgetful(self: Replicated, name: str, weight: Tensor, moments: Mapping[str, Tensor], steps: int) -> None:
        load(self, name, weight, {key: torch.zeros_like(value) for key, value in moments.items()}, steps)

    return mock.patch.object(Replicated, "load", forgetful)


@contextlib.contextmanager
def noise_dropped() -> Iterator[None]:
    """Dropout draws from a generator that every process starts anew, whose state no checkpoint has."""
    run: Callable[..., Any] = Trainer.run
    drawn = [0]

    def started(self: Trainer, *arguments: Any, **options: Any) -> Any:
        drawn[0] = 0
        return run(self, *arguments, **options)

    def next_draw(seed: int, *parts: int | str) -> int:
        drawn[0] += 1
        return derive(seed, "state", drawn[0])

    with mock.patch.object(Trainer, "run", started), mock.patch("stages.training.micro_batches.derive", next_draw):
        yield


def place_dropped() -> AbstractContextManager[Any]:
    """Of the stream of prompts it is forgotten how far it has come."""

    def load(self: PromptOrder, state: dict[str, Any]) -> None:
        self.pass_rates = dict(state["pass_rates"])

    return mock.patch.object(PromptOrder, "load", load)
