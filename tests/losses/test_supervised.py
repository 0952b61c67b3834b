"""The token loss of supervised fine-tuning."""

import torch
from torch.testing import assert_close

from stages.losses.supervised import nll


def test_nll_is_the_cross_entropy():
    # a token of probability 1/4 costs log 4, one of probability 1 nothing
    assert_close(nll(torch.tensor([0.25, 1.0]).log()), torch.tensor([1.386294361, 0.0]))


def test_gradient_is_minus_one_a_token():
    logprobs = torch.tensor([-0.5, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(nll, [logprobs])
    nll(logprobs).sum().backward()
    assert logprobs.grad.tolist() == [-1.0, -1.0]
