"""Value losses and rewards of tokens against numbers worked out by hand."""

import pytest
import torch
from torch.testing import assert_close

from stages.losses.value import adapted_kl_coef, clipped_value, clipped_values, token_rewards


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# V, V_old, R -> (loss, whether it is clipped), with a range of 0.2
CASES = [
    # within the range: (0.9 - 2)^2 / 2
    (0.9, 1.0, 2.0, 0.605, False),
    # V has gone past the range towards R: V_clip = 1.2, (1.2 - 2)^2 / 2 is more than (1.5 - 2)^2 / 2
    (1.5, 1.0, 2.0, 0.32, True),
    # V has gone past the range away from R: V_clip = 0.8, (0.5 - 2)^2 / 2 is more than (0.8 - 2)^2 / 2
    (0.5, 1.0, 2.0, 1.125, False),
    # V = R, beyond the range on both: V_clip = -0.2, (-0.2 + 1)^2 / 2
    (-1.0, 0.0, -1.0, 0.32, True),
]


def test_values():
    values, old, returns, losses, clips = (tensor(column) for column in zip(*CASES, strict=True))
    assert_close(clipped_value(values, old, returns, cliprange_value=0.2), losses, atol=1e-12, rtol=0)
    assert clipped_values(values, old, returns, cliprange_value=0.2).tolist() == clips.bool().tolist()


def test_gradients():
    """V - R where the plain loss counts, 0 where the clipped one does; and numerically."""
    values, old, returns, _, clips = (tensor(column) for column in zip(*CASES, strict=True))
    values.requires_grad_()
    (slopes,) = torch.autograd.grad(clipped_value(values, old, returns, cliprange_value=0.2).sum(), values)
    assert_close(slopes, torch.where(clips.bool(), 0.0, values.detach() - returns), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda v: clipped_value(v, old, returns, cliprange_value=0.2), (values,))


def test_tokens_do_not_see_each_other():
    values, old, returns, _, _ = (tensor(column) for column in zip(*CASES, strict=True))
    whole = clipped_value(values, old, returns, cliprange_value=0.3)
    columns = (column.split(1) for column in (values, old, returns))
    apart = [clipped_value(*one, cliprange_value=0.3) for one in zip(*columns, strict=True)]
    assert torch.equal(whole, torch.cat(apart))


def test_a_wide_range_is_half_the_squared_error():
    values, old, returns, _, _ = (tensor(column) for column in zip(*CASES, strict=True))
    losses = clipped_value(values, old, returns, cliprange_value=100.0)
    assert_close(losses, torch.nn.functional.mse_loss(values, returns, reduction="none") / 2, atol=1e-12, rtol=0)


def test_the_score_comes_at_the_last_token():
    """kl_coef 0.5; the second sequence has two tokens, what stands beyond them counts nowhere; the third has none."""
    kl = tensor([[0.2, -0.4, 1.0], [2.0, 0.0, 9.0], [3.0, 3.0, 3.0]])
    found = token_rewards(kl, tensor([1.0, -2.0, 5.0]), torch.tensor([3, 2, 0]), kl_coef=0.5)
    assert_close(found, tensor([[-0.1, 0.2, 0.5], [-1.0, -2.0, 0.0], [0.0, 0.0, 0.0]]), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 0.05)),  # a tenth above: 0.1 x 500 / 10000
        (600.0, 0.1 * (1 + 0.2 * 0.05)),  # far above: at most a fifth
        (0.0, 0.1 * (1 - 0.2 * 0.05)),
    ],
)
def test_kl_coef_follows_its_target(kl, expected):
    found = adapted_kl_coef(0.1, kl, target=6.0, horizon=10_000, sequences=500)
    assert found == pytest.approx(expected, abs=1e-15)
