"""The norm with fewer passes: its gradient against finite differences, and only where it is the model's formula."""

from __future__ import annotations

import pytest
import torch

from stages.training import rms_norm
from tests.training.conftest import tiny_model


def test_gradient_equals_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, w: rms_norm._RMSNorm.apply(h, w, 1e-3), (hidden, weight))


def test_by_hand() -> None:
    # mean of 3^2 and 4^2 is 12.5; with epsilon 12.5 the scale is 1 / 5
    found = rms_norm._RMSNorm.apply(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 10.0]), 12.5)
    torch.testing.assert_close(found, torch.tensor([[0.6, 8.0]]))


@pytest.mark.parametrize(("model_type", "replaced"), [("llama", True), ("qwen3", True), ("gemma2", False)])
def test_only_norms_of_this_formula_are_replaced(model_type: str, replaced: bool) -> None:
    """Gemma's weight is one plus the stored one."""
    model = tiny_model(model_type)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        rms_norm.install(model)
        after = model(input_ids=ids).logits
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-5)
    norms = [module for name, module in model.named_modules() if name.endswith("layernorm")]
    assert norms
    assert all(("forward" in vars(norm)) == replaced for norm in norms)
