"""BEMA beside TRL's callback, on the same weights step by step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.conftest import tiny_model
from tests.training.test_averaging import averaging_of

trl = pytest.importorskip("trl", reason="the oracle is an extra: pip install -e '.[benchmarks]'")

STEPS = 12


class Model:
    """A transformers model, as what is averaged."""

    def __init__(self, model: Any) -> None:
        self.weights = dict(model.named_parameters())

    def shapes(self) -> dict[str, torch.Size]:
        return {name: one.shape for name, one in self.weights.items()}

    def weight(self, name: str) -> torch.Tensor:
        return self.weights[name].detach()


@pytest.mark.parametrize(
    "settings",
    [
        {"update_freq": 1},
        {"update_freq": 3, "lag": 2, "multiplier": 0.5, "ema_power": 0.8, "bias_power": 0.4},
        {"update_freq": 2, "update_after": 4, "min_ema_multiplier": 0.4},
        {"update_freq": 1, "ema_power": 0.2, "bias_power": 100.0},
    ],
)
def test_the_same_weights_after_every_step(settings: dict[str, Any]) -> None:
    """But before it begins: there TRL has the first weights, and the paper's algorithm 1 those of the moment."""
    model = tiny_model()
    callback: Any = trl.BEMACallback(**settings)
    averaging = averaging_of(Model(model), kind="bema", **settings)
    draws = torch.Generator().manual_seed(3)
    nothing: Any = SimpleNamespace()
    first = {name: one.detach().clone() for name, one in model.named_parameters()}
    callback.on_train_begin(nothing, nothing, nothing, model=model)
    averaging.after(0)
    begins = settings.get("update_after", 0)
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for one in model.parameters():
                one.add_(0.1 * torch.randn(one.shape, generator=draws))
        callback.on_step_end(nothing, SimpleNamespace(global_step=step), nothing, model=model)
        averaging.after(step)
        theirs = dict(callback.running_model.named_parameters())
        for name, one in model.named_parameters():
            ours = averaging.weight(name)
            if step < begins + settings["update_freq"] and begins:
                assert torch.equal(theirs[name], first[name])
                assert step > begins or torch.equal(ours, one)
            else:
                torch.testing.assert_close(ours, theirs[name], atol=1e-6, rtol=1e-6)
