"""A step as both sides report it, and TRL's trainers without their training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.characters import build_tokenizer


def gradient_norm(model: torch.nn.Module, loss: torch.Tensor) -> float:
    model.zero_grad()
    loss.backward()
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


@dataclass(frozen=True)
class Step:
    """What both sides say of a step."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]


def trainer_of(
    folder: Path, kind: Any, config: Any, model: Any, fields: dict[str, Any], data: list[Any], **more: Any
) -> Any:
    """A TRL trainer that has prepared its data; no step of its own is run."""
    from datasets import Dataset

    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(data),
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "use_cpu": True,
        "max_length": None,
    }
    return kind(
        model=model,
        args=config(**(common | fields)),
        train_dataset=Dataset.from_list(data),
        processing_class=build_tokenizer(),
        **more,
    )


NOT_LOGGED = {
    # adding a number to all logits changes none of the model's probabilities, and so says nothing of it
    "logits/chosen",
    "logits/rejected",
    # extremes over a step depend on its size
    "min_reward",
    "max_reward",
    # counted by the loop, where shared prompts count once: see `test_shared_tokens_count_once`
    "num_tokens",
}
"""What TRL logs and we do not."""


def agree(ours: Step, theirs: Step, unlike: Mapping[str, float] | None = None) -> None:
    """Loss, gradient norm and every metric of that name; `unlike`: metrics that differ on purpose -> TRL's value."""
    unlike = unlike or {}
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5, abs=1e-6)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    assert set(theirs.metrics) - set(ours.metrics) <= NOT_LOGGED
    for name in ours.metrics.keys() & theirs.metrics.keys():
        expected = unlike.get(name, ours.metrics[name])
        assert theirs.metrics[name] == pytest.approx(expected, rel=1e-5, abs=1e-5), name
    for name, value in unlike.items():
        assert ours.metrics[name] != pytest.approx(value, rel=1e-3), f"{name} is no longer unlike TRL's"


def logged(trainer: Any) -> dict[str, float]:
    """The newest training metrics of a TRL trainer."""
    return {name: float(values[-1]) for name, values in trainer._metrics["train"].items()}
