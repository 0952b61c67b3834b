"""The gated feed-forward part that keeps less: its gradient, what is gone, and only where it is the model's formula."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from stages.training import gated_mlp
from tests.training.conftest import tiny_model


def test_gradient_equals_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(gated_mlp._Gated.apply, (gate, up))


def test_by_hand() -> None:
    # silu(ln 3) = ln 3 * 3/4, and silu(0) = 0
    found = gated_mlp.gated(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[4.0, 9.0]]))
    torch.testing.assert_close(found, torch.tensor([[3 * torch.tensor(3.0).log(), 0.0]]))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral"])
def test_same_bits_as_the_models_own(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operations on the same numbers; in blocks of 2 rows, whose last one is short."""
    monkeypatch.setattr(gated_mlp, "BLOCK_BYTES", 2 * 48 * 4)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    results = []
    for replace in (False, True):
        model = tiny_model(model_type)
        if replace:
            gated_mlp.install(model)
            assert all("forward" in vars(layer.mlp) for layer in model.model.layers)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    for own, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, own, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2"])
def test_other_formulas_are_left_alone(model_type: str) -> None:
    model = tiny_model(model_type) if model_type != "gpt2" else tiny_model("gpt2", n_embd=32, n_layer=2, n_head=4)
    gated_mlp.install(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_product_is_not_kept() -> None:
    """What goes into the last projection is gone before the way back begins; autograd's own keeps it."""

    def is_kept(replace: bool) -> bool:
        part = tiny_model(num_hidden_layers=1).model.layers[0].mlp
        if replace:
            gated_mlp.install(torch.nn.Sequential(part))
        seen = []
        part.down_proj.register_forward_pre_hook(
            lambda _, inputs: seen.append(StorageWeakRef(inputs[0].untyped_storage()))
        )
        result = part(torch.ones(1, 6, 32, requires_grad=True))
        kept = not seen[0].expired()
        result.sum().backward()
        return kept

    assert is_kept(False) and not is_kept(True)


def test_checkpointing_goes_its_own_way() -> None:
    """Inside it nothing is kept anyway, and gradients are the same bits."""
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    results = []
    for checkpointing in (False, True):
        model = tiny_model()
        gated_mlp.install(model)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids).loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)
