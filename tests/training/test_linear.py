"""Linear layers on oneDNN against torch's own, in whole models and alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from stages.training import linear
from stages.training.adapters import add_adapters
from stages.training.config import TrainingConfig
from stages.training.model import Scorer, token_logprobs
from stages.training.probes import settle_layout
from tests.training.conftest import random_groups, tiny_model


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_layer(bias: bool) -> None:
    torch.manual_seed(0)
    ours, plain = nn.Linear(5, 3, bias=bias), nn.Linear(5, 3, bias=bias).double()
    plain.load_state_dict(ours.state_dict())
    linear.install(ours)
    hidden, weights = draw(2, 4, 5), draw(2, 4, 3, seed=1)
    given, wide = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    found = ours(given)
    assert type(found.grad_fn).__name__ == "_LinearBackward"
    (found * weights).sum().backward()
    (plain(wide) * weights.double()).sum().backward()
    assert given.grad is not None and wide.grad is not None
    assert_close(given.grad.double(), wide.grad, atol=1e-6, rtol=1e-6)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert_close(one.grad.double(), other.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("frozen", ["weight", "input", "weight but not the bias"])
def test_what_is_frozen_keeps_nothing_for_the_backward_pass(frozen: str) -> None:
    """Under adapters the inputs of frozen layers would stay otherwise; torch's own layers let them go."""
    layer, kept = nn.Linear(5, 3), list[int]()
    linear.install(layer)
    layer.weight.requires_grad_(frozen == "input")
    layer.bias.requires_grad_(frozen != "weight")
    hidden = draw(2, 4, 5).requires_grad_(frozen != "input")

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = layer(hidden)
    found.sum().backward()
    weight = layer.weight.detach()
    assert kept == [hidden.data_ptr() if frozen == "input" else weight.data_ptr()]
    if frozen == "input":
        assert layer.weight.grad is not None and hidden.grad is None
        assert_close(layer.weight.grad, hidden.sum((0, 1)).expand(3, 5))
    else:
        assert hidden.grad is not None and layer.weight.grad is None
        assert_close(hidden.grad, weight.sum(0).expand(2, 4, 5))
    assert_close(layer.bias.grad, None if frozen == "weight" else torch.full((3,), 8.0))


def test_small_layers_keep_their_bits() -> None:
    ours, plain = nn.Linear(5, 3), nn.Linear(5, 3)
    plain.load_state_dict(ours.state_dict())
    linear.install(ours)
    linear.install(ours)
    assert torch.equal(ours(draw(4, 5)), plain(draw(4, 5)))


def _gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    scorer = Scorer(model)
    assert settle_layout(scorer) is None
    batch = scorer.layout(random_groups(3, 2))
    loss = -scorer(batch, token_logprobs(batch)).logprobs_N.sum()
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
def test_whole_models(model_type: str, adapters: bool, request: pytest.FixtureRequest) -> None:
    config = TrainingConfig(lora_r=2 if adapters else None)
    expected_loss, expected = _gradients(add_adapters(tiny_model(model_type), config))
    request.getfixturevalue("onednn")
    loss, found = _gradients(add_adapters(tiny_model(model_type), config))
    assert_close(loss, expected_loss, atol=0, rtol=1e-6)
    assert found.keys() == expected.keys() and found
    largest = max(float(one.abs().max()) for one in expected.values())
    for name, grad in found.items():
        assert_close(grad, expected[name], atol=1e-6 * largest, rtol=1e-5)
