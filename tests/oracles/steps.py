"""A step as both sides report it, and TRL's trainers without their training."""

from __future__ import annotations

from collections.abc import Sequence
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


def agree(ours: Step, theirs: Step, names: Sequence[str]) -> None:
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5, abs=1e-6)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    for name in names:
        assert ours.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-5, abs=1e-5), name
