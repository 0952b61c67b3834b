"""The kernels for rows of different lengths against a dense mask in float64, on trees with long and short segments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stages.training.attention import PackedAttention, attend
from stages.training.attention_kernels import kernel_for
from tests.training.test_attention import dense, segments_of, visible

TREES = {
    "rows": [(300, 0.0), (1, 0.0), (129, 0.0)],
    "pairs": [(200, 0.0), (64, 1.0), (33, 0.5), (130, 0.0), (1, 1.0), (90, 0.5)],
    "deep": [(140, 0.0), (70, 1.0), (35, 1.0), (17, 0.67), (128, 0.34), (9, 0.5), (50, 0.0)],
}
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128), (4, 2, 32)])
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("tree", TREES)
def test_values_and_gradients(tree: str, kind: torch.dtype, window: int | None, heads: tuple[int, int, int]) -> None:
    segments = segments_of(TREES[tree])
    h, k, d = heads
    draws = torch.Generator().manual_seed(len(segments))
    total = segments[-1].stop
    states = [torch.randn(1, n, total, d, generator=draws).to(kind) for n in (h, k, k)]
    weights = torch.randn(1, h, total, d, generator=draws).to(kind)
    wide = [one.double().requires_grad_() for one in states]
    expected = dense(wide[0], wide[1], wide[2], visible(segments, window), d**-0.5)
    expected_grads = torch.autograd.grad((expected * weights.double()).sum(), wide)

    def ours() -> list[Tensor]:
        given = [one.cuda().requires_grad_() for one in states]
        without = kernel_for(given[0], is_windowed=window is not None) is None
        assert without == (kind == torch.float32 and window is not None)
        packed = PackedAttention(segments, torch.device("cuda"))
        query, key, value = given
        out, _ = attend(torch.nn.Module(), query, key, value, None, sliding_window=window, packed=packed)
        out = out.transpose(1, 2)
        return [out.detach(), *torch.autograd.grad((out * weights.cuda()).sum(), given)]

    found = ours()
    for one, right in zip(found, [expected.detach(), *expected_grads], strict=True):
        assert float((one.cpu().double() - right).norm() / right.norm()) < TOLERANCE[kind]
    assert all(torch.equal(one, again) for one, again in zip(found, ours(), strict=True))
