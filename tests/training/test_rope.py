"""Rotary embeddings with fewer passes: against finite differences and by hand, and only where it is the formula."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stages.training import rope
from tests.training.conftest import tiny_model

NAME = "apply_rotary_pos_emb"


@pytest.fixture
def files() -> Iterator[dict[Any, Any]]:
    """Modelling file -> its own function, which is put back."""
    kept: dict[Any, Any] = {}
    yield kept
    for module, plain in kept.items():
        setattr(module, NAME, plain)


def test_gradient_equals_finite_differences() -> None:
    draws = torch.Generator().manual_seed(0)
    states = torch.randn(1, 2, 3, 6, generator=draws, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 1, 1, 3, 6, generator=draws, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rope._Rotation.apply(x, cos, sin), (states,))


def test_by_hand() -> None:
    # a quarter turn of the pair (3, 4) is (-4, 3); no turn leaves (5, 6)
    states = torch.tensor([[[[3.0, 5.0, 4.0, 6.0]]]])
    cos, sin = torch.tensor([[[0.0, 1.0, 0.0, 1.0]]]), torch.tensor([[[1.0, 0.0, 1.0, 0.0]]])
    found, _ = rope._Apply(lambda *_, **__: pytest.fail("not ours"))(states, states, cos, sin)
    torch.testing.assert_close(found, torch.tensor([[[[-4.0, 5.0, 3.0, 6.0]]]]))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_a_model_gives_the_same_logits_and_gradients(model_type: str, files: dict[Any, Any]) -> None:
    model = tiny_model(model_type)
    module = sys.modules[type(model).__module__]
    files[module] = getattr(getattr(module, NAME), "plain", getattr(module, NAME))
    setattr(module, NAME, files[module])
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    weights = [one for one in model.parameters() if one.requires_grad]
    found = []
    for _ in range(2):
        logits = model(input_ids=ids).logits
        found.append([logits.detach(), *torch.autograd.grad(logits.square().sum(), weights)])
        rope.install(model)
    assert isinstance(getattr(module, NAME), rope._Apply)
    for before, after in zip(*found, strict=True):
        assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())


def test_a_function_of_another_formula_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interleaved pairs, as in GPT-J."""
    model = tiny_model("llama")
    module = sys.modules[type(model).__module__]

    def interleaved(query: Any, key: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        def turn(x: Any) -> Any:
            return x * cos[:, None] + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin[:, None]

        return turn(query), turn(key)

    monkeypatch.setattr(module, NAME, interleaved)
    rope.install(model)
    assert getattr(module, NAME) is interleaved


def test_angles_for_a_part_of_the_head_are_left_to_the_model() -> None:
    asked = []
    states, angles = torch.ones(1, 1, 2, 8), torch.ones(1, 2, 4)
    rope._Apply(lambda *given, **_: asked.append(given) or given[:2])(states, states, angles, angles)
    assert len(asked) == 1
