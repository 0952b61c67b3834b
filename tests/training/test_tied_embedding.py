"""The joint gradient of embedding and head against autograd's sum of two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from stages.losses.head import Head
from stages.losses.token_loss import linear_token_loss
from stages.training.model import token_logprobs
from stages.training.tied_embedding import TiedEmbedding
from tests.training.conftest import VOCABULARY, packing_scorer, random_groups, tiny_model

IDS = torch.tensor([[0, 5, 5, 17, 60, 3, 5, 0, 9]])
TARGETS = torch.tensor([5, 5, 17, 60, 3, 5, 0, 9])


def loss_of(hidden_1TH: Tensor, weight_VH: Tensor) -> Tensor:
    return linear_token_loss(hidden_1TH[0, :-1], Head(weight_VH), TARGETS, lambda logprobs, _: -logprobs)[0]


def backward(model: Any, tied: TiedEmbedding | None) -> None:
    if tied is None:
        output, weight = model.base_model(input_ids=IDS, use_cache=False), model.get_output_embeddings().weight
    else:
        output, weight = tied.call(input_ids=IDS, use_cache=False)
    (loss_of(output.last_hidden_state, weight) / 3).backward()


# gemma multiplies what it looks up; llama's padding token 0 is looked up and gets no gradient from it
@pytest.mark.parametrize("model_type", ["llama", "gemma", "gemma3_text"])
def test_gradients(model_type: str) -> None:
    expected, model = tiny_model(model_type).double(), tiny_model(model_type).double()
    tied = TiedEmbedding.of(model)
    assert tied is not None
    for _ in range(2):  # the second adds to the first
        backward(expected, None)
        backward(model, tied)
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert one.grad is not None and other.grad is not None and one.grad.layout == torch.strided
            assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_no_second_gradient_of_the_weights_size() -> None:
    plain, model = tiny_model(), tiny_model()
    with Names() as before:
        backward(plain, None)
    with Names() as names:
        backward(model, TiedEmbedding.of(model))
    assert "embedding_dense_backward" in before.seen
    assert "embedding_dense_backward" not in names.seen


def test_the_same_bits_again() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        models = [tiny_model(), tiny_model()]
        for model in models:
            backward(model, TiedEmbedding.of(model))
    finally:
        torch.use_deterministic_algorithms(False)
    first, second = ([one.grad for one in model.parameters()] for model in models)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_a_pass_that_uses_no_head() -> None:
    expected, model = tiny_model().double(), tiny_model().double()
    tied = TiedEmbedding.of(model)
    assert tied is not None
    tied.call(input_ids=IDS)[0].last_hidden_state.sum().backward()
    expected.base_model(input_ids=IDS).last_hidden_state.sum().backward()
    weights = [one.get_input_embeddings().weight.grad for one in (model, expected)]
    assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-12)


def test_weights_of_their_own_and_frozen_ones_stay_as_they_are() -> None:
    assert TiedEmbedding.of(tiny_model(tie_word_embeddings=False)) is None
    model = tiny_model()
    tied = TiedEmbedding.of(model)
    assert tied is not None
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == VOCABULARY
    with torch.no_grad():
        assert tied.call(input_ids=IDS)[1] is weight
    weight.requires_grad_(False)
    assert tied.call(input_ids=IDS)[1] is weight


def test_passes_without_and_with_gradients_follow_each_other() -> None:
    """A pass without gradients uses the parameter itself; it must not become one of the Scorer's own."""
    scorer = packing_scorer(tiny_model())
    names = [name for name, _ in scorer.named_parameters()]
    scorer.merge_gradients()
    batch = scorer.layout(random_groups(2, 2))
    with torch.no_grad():
        before = scorer(batch, token_logprobs(batch)).logprobs_N
    after = scorer(batch, token_logprobs(batch)).logprobs_N
    torch.testing.assert_close(after.detach(), before)
    assert [name for name, _ in scorer.named_parameters()] == names


def test_the_heads_gradient_is_added_before_the_layers_are_reached() -> None:
    """So that it need not be held until the embedding's is known; into the memory of the gradient that is there."""
    model = tiny_model()
    tied = TiedEmbedding.of(model)
    assert tied is not None
    weight = model.get_output_embeddings().weight
    seen: list[Tensor] = []
    model.base_model.layers[-1].register_full_backward_hook(lambda *_: seen.append(weight.grad.clone()))
    for _ in range(2):
        backward(model, tied)
    first, second = seen
    alone = weight.detach().clone().requires_grad_()
    with torch.no_grad():
        hidden = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    (loss_of(hidden, alone) / 3).backward()
    assert alone.grad is not None
    assert_close(first, alone.grad)
    assert_close(second - weight.grad / 2, alone.grad, atol=1e-6, rtol=1e-5)


def test_passes_may_go_forward_together_and_back_in_turn() -> None:
    model, expected = tiny_model().double(), tiny_model().double()
    tied = TiedEmbedding.of(model)
    assert tied is not None
    losses = []
    for _ in range(2):
        output, weight = tied.call(input_ids=IDS, use_cache=False)
        losses.append(loss_of(output.last_hidden_state, weight) / 3)
        backward(expected, None)
    for loss in losses:
        loss.backward()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_a_pass_that_uses_no_head_leaves_a_dense_gradient() -> None:
    model, expected = tiny_model(), tiny_model()
    tied = TiedEmbedding.of(model)
    assert tied is not None
    output, _ = tied.call(input_ids=IDS, use_cache=False)
    output.last_hidden_state.square().sum().backward()
    expected.base_model(input_ids=IDS, use_cache=False).last_hidden_state.square().sum().backward()
    found, right = (one.get_input_embeddings().weight.grad for one in (model, expected))
    assert found.layout == torch.strided
    assert_close(found, right)
