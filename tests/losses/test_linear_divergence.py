"""Divergences formed chunk by chunk against the same divergences of whole logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stages.losses import head as head_module
from stages.losses import linear_divergence as module
from stages.losses.distillation import divergence_of, reverse_kl
from stages.losses.head import Head
from stages.losses.linear_divergence import linear_divergence
from tests.losses.heads import H, N, V, Work, frozen, inputs, kinds, make_head, trained

BETAS = [0.0, 1.0, 0.5, 0.2]
WEIGHTS = torch.linspace(-1, 2, N, dtype=torch.float64)


def teacher_of(positions: int = N, vocabulary: int = V, **settings: Any) -> tuple[Tensor, Head]:
    """A teacher with another hidden size and a head of another kind."""
    draws = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(rows, 3, generator=draws, dtype=torch.float64) for rows in (positions, vocabulary))
    return hidden, Head(weight, softcap=3.0, **settings)


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients(kind: dict[str, Any], chunk: int, beta: float) -> None:
    hidden, weight, bias, _ = inputs()
    head, divergence = make_head(weight, bias, kind), divergence_of(beta)
    teacher_hidden, teacher = teacher_of(temperature=kind["temperature"])
    values = divergence.of_logits(head.logits(hidden), teacher.logits(teacher_hidden))
    wanted = torch.autograd.grad((values * WEIGHTS).sum() * 0.3, trained(hidden, head))
    loss, divergences = linear_divergence(
        hidden, head, teacher_hidden, teacher, divergence, weights_N=WEIGHTS, chunk_tokens=chunk
    )
    gradients = torch.autograd.grad(loss * 0.3, trained(hidden, head))
    assert_close(loss, (values * WEIGHTS).sum(), atol=1e-12, rtol=0)
    assert_close(divergences, values.detach(), atol=1e-12, rtol=0)
    assert not divergences.requires_grad
    for gradient, other in zip(gradients, wanted, strict=True):
        assert_close(gradient, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_rows_are_treated_alike_however_many_at_a_time(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, _ = inputs()
    expected = linear_divergence(hidden, Head(weight, bias), *teacher_of(), divergence_of(beta))[1]
    monkeypatch.setitem(module.BLOCK_BYTES, "cpu", 2 * V * 8)
    actual = linear_divergence(hidden, Head(weight, bias), *teacher_of(), divergence_of(beta))[1]
    assert_close(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("beta", BETAS)
def test_only_the_gradients_that_are_asked_for(kind: dict[str, Any], beta: float) -> None:
    hidden, weight, bias, _ = inputs()
    divergence, (teacher_hidden, teacher) = divergence_of(beta), teacher_of()
    head = make_head(weight, bias, kind)
    for states, used in ((hidden, frozen(head)), (hidden.detach(), head)):
        values = divergence.of_logits(used.logits(states), teacher.logits(teacher_hidden))
        wanted = torch.autograd.grad(values.sum(), trained(states, used))
        loss, _ = linear_divergence(states, used, teacher_hidden, teacher, divergence, chunk_tokens=3)
        for gradient, other in zip(torch.autograd.grad(loss, trained(states, used)), wanted, strict=True):
            assert_close(gradient, other, atol=1e-12, rtol=0)
    with torch.no_grad():
        assert not linear_divergence(hidden, head, teacher_hidden, teacher, divergence)[0].requires_grad


@pytest.mark.parametrize("beta", BETAS)
def test_the_teacher_gets_no_gradient(beta: float) -> None:
    hidden, weight, _, _ = inputs()
    teacher_hidden, teacher = teacher_of()
    teacher = replace(teacher, weight_VH=teacher.weight_VH.requires_grad_())
    linear_divergence(hidden, Head(weight), teacher_hidden.requires_grad_(), teacher, divergence_of(beta))[0].backward()
    assert teacher.weight_VH.grad is None and teacher_hidden.grad is None


@pytest.mark.parametrize("beta", BETAS)
def test_no_positions(beta: float) -> None:
    hidden, weight, bias, _ = inputs(positions=0)
    loss, divergences = linear_divergence(hidden, Head(weight, bias), *teacher_of(positions=0), divergence_of(beta))
    loss.backward()
    assert loss.item() == 0 and divergences.shape == (0,)
    assert weight.grad is not None and not weight.grad.any() and bias.grad is not None and not bias.grad.any()


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(beta: float) -> None:
    hidden, weight, bias, _ = inputs(dtype=torch.float32)
    loss, divergences = linear_divergence(
        hidden, Head(weight, bias), hidden, Head(weight, bias), divergence_of(beta), chunk_tokens=2
    )
    loss.backward()
    assert_close(divergences, torch.zeros(N), atol=1e-6, rtol=0)
    assert weight.grad is not None and weight.grad.abs().max() < 1e-6


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_in_float32(beta: float, size: float) -> None:
    # student and teacher are certain of different tokens, or of all but one each: as float64 has it
    weight = torch.eye(4, 2).mul(size)
    states = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, 0.0]])
    divergence, exact = divergence_of(beta), states.double().requires_grad_()
    values = divergence.of_logits(
        Head(weight.double()).logits(exact), Head(weight.double()).logits(exact.detach().flip(1))
    )
    (wanted,) = torch.autograd.grad(values.sum(), exact)
    hidden = states.clone().requires_grad_()
    loss, divergences = linear_divergence(hidden, Head(weight), states.flip(1), Head(weight), divergence)
    loss.backward()
    assert_close(divergences.double(), values.detach(), rtol=1e-5, atol=1e-5)
    assert hidden.grad is not None
    assert_close(hidden.grad.double(), wanted, rtol=1e-4, atol=1e-4 * abs(size))


@pytest.mark.parametrize("beta", BETAS)
def test_a_token_that_a_bias_makes_impossible(beta: float) -> None:
    hidden, weight, bias, _ = inputs()
    never = torch.zeros(V, dtype=torch.float64).index_fill(0, torch.tensor([2, 5]), -torch.inf)
    teacher_hidden, teacher = teacher_of()
    head, teacher = Head(weight, bias.detach() + never), Head(teacher.weight_VH, never)
    divergence = divergence_of(beta)
    values = divergence.of_logits(head.logits(hidden), teacher.logits(teacher_hidden))
    loss, divergences = linear_divergence(hidden, head, teacher_hidden, teacher, divergence)
    assert_close(divergences, values.detach(), atol=1e-12, rtol=0)
    loss.backward()
    possible = [0, 1, 3, 4, 6, 7, 8]
    head, teacher = Head(weight[possible], bias.detach()[possible]), Head(teacher.weight_VH[possible])
    values = divergence.of_logits(head.logits(hidden), teacher.logits(teacher_hidden))
    assert_close(hidden.grad, torch.autograd.grad(values.sum(), hidden)[0], atol=1e-12, rtol=0)


def test_bfloat16_student_sums_in_float32() -> None:
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs(dtype=torch.float32)[:2]]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    teacher_hidden, teacher = teacher_of()
    values = reverse_kl(exact[0] @ exact[1].t(), teacher.logits(teacher_hidden))
    values.sum().backward()
    teacher = replace(teacher, weight_VH=teacher.weight_VH.float())
    loss, divergences = linear_divergence(low[0], Head(low[1]), teacher_hidden.float(), teacher, divergence_of(1.0))
    loss.backward()
    assert divergences.dtype == torch.float32
    assert_close(divergences.double(), values.detach(), atol=1e-5, rtol=0)
    for tensor, other in zip(low, exact, strict=True):
        assert tensor.grad is not None and tensor.grad.dtype == torch.bfloat16
        assert_close(tensor.grad.double(), other.grad, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_number_of_products_and_memory(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's three (two where its head is frozen, one without gradients) and the teacher's one."""
    hidden, weight, bias, _ = inputs(positions=64, vocabulary=50)
    teacher_hidden, teacher = teacher_of(64, 50)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 1)
    own = 64 * 50 * 3

    def students(states: Tensor, head: Head) -> float:
        with Work() as work:
            loss, _ = linear_divergence(states, head, teacher_hidden, teacher, divergence_of(beta))
            if loss.requires_grad:
                loss.backward()
        assert work.largest <= weight.numel() + states.numel()
        return (work.multiplications - own) / (64 * 50 * H)

    head = Head(weight, bias)
    assert students(hidden, head) == 3
    assert students(hidden, frozen(head)) == 2
    with torch.no_grad():
        assert students(hidden, head) == 1


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, _, _ = inputs()
    loss, _ = linear_divergence(hidden, Head(weight), *teacher_of(), divergence_of(0.5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="forms its gradient once"):
        loss.backward()


def test_heads_of_unequal_vocabulary_are_refused() -> None:
    states = torch.ones(2, 2)
    with pytest.raises(ValueError, match="heads of 2 and 3 tokens"):
        linear_divergence(states, Head(torch.ones(2, 2)), states, Head(torch.ones(3, 2)), divergence_of(1.0))
