"""The chunked head against log_softmax, and the memory that it never takes."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from stages.losses.distillation import divergence_over_chunks, reverse_kl
from stages.losses.logprobs import Head, chunk_length, linear_logprobs

SETTINGS = [
    {},
    {"temperature": 0.7},
    {"softcap": 2.0},
    {"scale": 0.3},
    {"temperature": 1.3, "softcap": 1.5, "scale": 0.5},
]


def inputs(positions=7, hidden=4, vocabulary=9, dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)

    targets = torch.randint(0, vocabulary, (positions,), generator=generator)
    return make(positions, hidden), make(vocabulary, hidden), make(vocabulary), targets


def whole(hidden, weight, bias, temperature=1.0, softcap=None, scale=1.0):
    """The same distribution, written out."""
    logits = (hidden @ weight.t() + (0 if bias is None else bias)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, -1)


def test_a_number():
    # logits 0 and log 3: probabilities 1/4 and 3/4, entropy log 4 - 3/4 log 3
    hidden, weight = torch.ones(1, 1).double(), torch.tensor([[1.0], [3.0]]).double().log()
    logprobs, entropy, _ = linear_logprobs(hidden, weight, None, torch.tensor([1]))
    assert_close(logprobs.exp().item(), 0.75, atol=1e-12, rtol=0)
    assert_close(entropy.item(), 0.562335145, atol=1e-9, rtol=0)


@pytest.mark.parametrize("keywords", SETTINGS)
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_values_and_gradients_equal_log_softmax(keywords, chunk):
    hidden, weight, bias, targets = inputs()
    upstream = torch.linspace(-1, 2, 7, dtype=torch.float64)
    logs = whole(hidden, weight, bias, **keywords)
    expected = logs.gather(1, targets[:, None])[:, 0]
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), [hidden, weight, bias])
    actual, entropy, _ = linear_logprobs(hidden, weight, bias, targets, **keywords, chunk_tokens=chunk)
    gradients = torch.autograd.grad((actual * upstream).sum(), [hidden, weight, bias])
    assert_close(actual, expected, atol=1e-12, rtol=0)
    assert_close(entropy, -(logs.exp() * logs).sum(-1).detach(), atol=1e-12, rtol=0)
    assert not entropy.requires_grad
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("keywords", SETTINGS)
def test_gradcheck(keywords):
    hidden, weight, bias, targets = inputs(positions=3, hidden=2, vocabulary=4)

    def logprobs(*tensors):
        return linear_logprobs(*tensors, targets, **keywords, chunk_tokens=2)[0]

    assert torch.autograd.gradcheck(logprobs, [hidden, weight, bias])


def test_only_the_gradients_that_are_asked_for():
    hidden, weight, _, targets = inputs()
    linear_logprobs(hidden, weight.detach(), None, targets)[0].sum().backward()
    logs = whole(hidden, weight.detach(), None).gather(1, targets[:, None]).sum()
    assert_close(hidden.grad, torch.autograd.grad(logs, hidden)[0], atol=1e-12, rtol=0)
    linear_logprobs(hidden.detach(), weight, None, targets)[0].sum().backward()
    logs = whole(hidden.detach(), weight, None).gather(1, targets[:, None]).sum()
    assert_close(weight.grad, torch.autograd.grad(logs, weight)[0], atol=1e-12, rtol=0)


def test_no_positions_give_no_values_and_zero_gradients():
    hidden, weight, bias, targets = inputs(positions=0)
    logprobs, entropy, _ = linear_logprobs(hidden, weight, bias, targets)
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert weight.grad.abs().max() == 0 and bias.grad.abs().max() == 0 and hidden.grad.shape == (0, 4)


def test_float32_keeps_large_logits_finite():
    hidden, weight = torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]])
    logprobs, entropy, _ = linear_logprobs(hidden, weight, None, torch.tensor([1]))
    assert logprobs.tolist() == [-600.0] and entropy.tolist() == [0.0]


def test_bfloat16_sums_in_float32():
    hidden, weight, bias, targets = inputs(positions=64, hidden=8, vocabulary=50, dtype=torch.float32)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight, bias)]
    logprobs, _, _ = linear_logprobs(*low, targets, chunk_tokens=5)
    exact, _, _ = linear_logprobs(*(tensor.detach().double() for tensor in low), targets)
    # a logit below 8 is off by at most 2^-6 in bfloat16; summing the vocabulary in bfloat16 would add far more
    assert logprobs.dtype == torch.float32
    assert_close(logprobs, exact.float(), atol=0.04, rtol=0)
    logprobs.sum().backward()
    assert [tensor.grad.dtype for tensor in low] == [torch.bfloat16] * 3


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, _, targets = inputs()
    with pytest.raises(ValueError, match=r"do not fit: found \[\(7, 4\), \(9, 4\), \(6,\)\]"):
        linear_logprobs(hidden, weight, None, targets[:6])


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation gave back."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_logits_of_more_than_a_chunk_never_exist():
    hidden, weight, bias, targets = inputs(positions=64, hidden=4, vocabulary=50, dtype=torch.float32)
    with LargestTensor() as largest:
        linear_logprobs(hidden, weight, bias, targets, chunk_tokens=8)[0].sum().backward()
    assert largest.elements == 8 * 50
    with LargestTensor() as largest:
        teacher = Head(weight.detach(), bias.detach())
        divergence_over_chunks(hidden, Head(weight), hidden, teacher, reverse_kl, chunk_tokens=8).sum().backward()
    assert largest.elements == 8 * 50


def test_a_chunk_of_float32_logits_is_about_16_mib_and_never_thin():
    assert chunk_length(32_000, torch.device("cpu")) * 32_000 * 4 == pytest.approx(16 * 2**20, rel=0.01)
    assert chunk_length(10**9, torch.device("cpu")) == 64
    assert chunk_length(10**9, torch.device("cuda")) == 1024
