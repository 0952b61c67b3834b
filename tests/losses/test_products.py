"""oneDNN's products against the same ones in float64, and the choice between the two libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from stages.losses import products
from stages.losses.head import Head
from stages.losses.head_gradient import HeadGradient
from stages.losses.token_loss import linear_token_loss
from tests.losses.heads import log_softmax


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("transposed", ["none", "left", "right", "both"])
def test_products_of_any_layout(transposed: str) -> None:
    left, right = draw(7, 5), draw(5, 9, seed=1)
    if transposed in ("left", "both"):
        left = draw(5, 7).t()
    if transposed in ("right", "both"):
        right = draw(9, 5, seed=1).t()
    total = draw(7, 9, seed=2)
    exact = left.double() @ right.double()
    assert products.prefers_onednn(left, right, 0)
    assert_close(products.product(left, right, torch.float32).double(), exact, atol=1e-6, rtol=1e-6)
    added = products.add_product(total.clone(), left, right)
    assert_close(added.double(), total.double() + exact, atol=1e-6, rtol=1e-6)


@pytest.mark.skipif(products.library() != "oneDNN", reason="weights are packed where oneDNN multiplies")
@pytest.mark.parametrize("rows", [2, 4, 20, 64, 300])
@pytest.mark.parametrize(("inside", "outside"), [(5, 3), (64, 2048), (255, 256), (768, 1000), (512, 32_000)])
def test_a_packed_weight_gives_the_same_bits(rows: int, inside: int, outside: int) -> None:
    left, weight, bias = draw(rows, inside), draw(outside, inside, seed=1), draw(outside, seed=2)
    packed = products.packed(weight, 32)
    assert packed.is_mkldnn
    assert torch.equal(products.linear(left, packed, bias), products.linear(left, weight, bias))


class Sizes(TorchDispatchMode):
    """Numbers of the largest tensor that an operation gives anew."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and function._schema.returns[0].alias_info is None:
            self.largest = max(self.largest, found.numel())
        return found


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("block_rows", [1, 4, 7, 100])
def test_products_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, block_rows: int) -> None:
    """Blocks that divide the rows and blocks that do not; what is added to a total is never there as a whole."""
    monkeypatch.setattr(products, "BLOCK_BYTES", 4 * 9 * block_rows)
    left, right, total = draw(5, 28).t(), draw(5, 9, seed=1), draw(28, 9, seed=2)
    exact = left.double() @ right.double()
    assert_close(products.product_in_blocks(left, right, torch.float32).double(), exact, atol=1e-6, rtol=1e-6)
    expected = total.double() + exact
    with Sizes() as sizes:
        found = products.add_product(total, left, right)
    assert found is total
    assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    assert sizes.largest <= 9 * block_rows


@pytest.mark.usefixtures("onednn")
def test_a_bias_is_added_to_every_row() -> None:
    found = products.linear(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([10.0]))
    assert found.tolist() == [[21.0], [14.0]]


def test_only_large_products_in_float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_faster_kernels", lambda: True)
    one = torch.zeros(2, 2)
    assert products.prefers_onednn(one, torch.nn.Parameter(one), products.LEAST_WORK)
    assert not products.prefers_onednn(one, one, products.LEAST_WORK - 1)
    assert not products.prefers_onednn(one.double(), one.double(), products.LEAST_WORK)
    assert not products.prefers_onednn(one, one.bfloat16(), products.LEAST_WORK)
    assert not products.prefers_onednn(one.to("meta"), one, products.LEAST_WORK)
    monkeypatch.setattr(products, "_has_faster_kernels", lambda: False)
    assert not products.prefers_onednn(one, one, products.LEAST_WORK)


@pytest.mark.usefixtures("onednn")
def test_head_gradients_over_several_chunks() -> None:
    """Against autograd through all logits at once in float64; the bias too."""
    hidden, weight, bias, targets = draw(11, 6), draw(13, 6, seed=1), draw(13, seed=2), torch.arange(11)
    leaves = [one.clone().requires_grad_() for one in (hidden, weight, bias)]
    loss, _ = linear_token_loss(
        leaves[0], Head(leaves[1], leaves[2]), targets, lambda logprobs, _: -logprobs, chunk_tokens=4
    )
    loss.backward()
    wide = [one.double().requires_grad_() for one in (hidden, weight, bias)]
    exact = -log_softmax(wide[0], Head(wide[1], wide[2])).gather(1, targets[:, None]).sum()
    exact.backward()
    assert_close(loss.double(), exact, atol=1e-5, rtol=1e-6)
    for found, expected in zip(leaves, wide, strict=True):
        assert found.grad is not None and expected.grad is not None
        assert found.grad.is_contiguous()
        assert_close(found.grad.double(), expected.grad, atol=1e-5, rtol=1e-5)


def test_libraries_may_take_turns_within_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last chunk may be too small for oneDNN; the sum of both is the sum."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_has_faster_kernels", lambda: True)
    monkeypatch.setattr(products, "LEAST_WORK", 4 * 13 * 6)
    slopes, hidden, scales = draw(7, 13), draw(7, 6, seed=1), draw(7, seed=2)
    gradient = HeadGradient(Head(torch.zeros(13, 6)), weight=True, bias=False)
    for part in (slice(0, 4), slice(4, 7), slice(0, 4)):
        gradient.add(slopes[part], scales[part], hidden[part])
    weight, _ = gradient.result()
    parts = torch.tensor([*range(7), *range(4)])
    exact = (slopes * scales[:, None])[parts].double().t() @ hidden[parts].double()
    assert weight is not None
    assert_close(weight.double(), exact, atol=1e-6, rtol=1e-6)
