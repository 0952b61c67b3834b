"""The token losses of supervised fine-tuning."""

import torch
from torch.testing import assert_close

from stages.losses.supervised import SUPERVISED_LOSSES, dft, nll


def test_nll_is_the_cross_entropy():
    # a token of probability 1/4 costs log 4, one of probability 1 nothing
    assert_close(nll(torch.tensor([0.25, 1.0]).log()), torch.tensor([1.386294361, 0.0]))


def test_gradient_of_nll_is_minus_one_a_token():
    logprobs = torch.tensor([-0.5, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(nll, [logprobs])
    nll(logprobs).sum().backward()
    assert logprobs.grad.tolist() == [-1.0, -1.0]


def test_dft_weighs_by_the_probability():
    # a quarter of log 4; e^-1 * 1
    assert_close(dft(torch.tensor([0.25, 1.0]).log()), torch.tensor([0.346573590, 0.0]))
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    losses = dft(logprobs)
    assert_close(losses, torch.tensor([0.367879441, 0.270670566], dtype=torch.float64), atol=1e-9, rtol=0)
    losses.sum().backward()
    # the weight has no gradient of its own: -e^-1 and -e^-2
    assert_close(logprobs.grad, torch.tensor([-0.367879441, -0.135335283], dtype=torch.float64), atol=1e-9, rtol=0)


def test_tokens_do_not_see_each_other():
    logprobs = torch.tensor([-0.5, -2.0, -3.0])
    for loss in SUPERVISED_LOSSES.values():
        assert torch.equal(loss.function(logprobs[1:2]), loss.function(logprobs)[1:2])
