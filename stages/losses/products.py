"""Matrix products by the faster of the two libraries that torch has on a CPU.

torch multiplies float32 matrices with MKL, which keeps its 512-bit kernels for Intel's processors: on others oneDNN,
which torch also carries, is about twice as fast. Both sum in float32, in another order.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

LEAST_WORK = 2**22
"""Multiplications below which oneDNN's longer way to its kernel costs more than the kernel gains."""

BLOCK_BYTES = 2**22
"""Of the rows of a product that are added to a total at a time: they stay in the cache until they are added."""

_PLAIN = (Tensor, torch.nn.Parameter)


@functools.cache
def _has_faster_kernels() -> bool:
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    vendor = Path("/proc/cpuinfo")
    return vendor.is_file() and "GenuineIntel" not in vendor.read_text(encoding="utf-8", errors="replace")


def library() -> str:
    """What multiplies large float32 matrices on this machine's CPU."""
    return "oneDNN" if _has_faster_kernels() else "torch.mm"


def prefers_onednn(left: Tensor, right: Tensor, work: int) -> bool:
    """Whether a product of these two with so many multiplications is oneDNN's; a matter of sizes and machine only."""
    return (
        work >= LEAST_WORK
        and left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        and type(left) in _PLAIN
        and type(right) in _PLAIN
        and _has_faster_kernels()
    )


def linear(input_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """input weight^T + bias, [M, N] anew, by oneDNN. It copies an input that is transposed, but no weight."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(input_MK, weight_NK, bias_N, "none", [], "")
    return result


def packed(weight_NK: Tensor, rows: int) -> Tensor:
    """A copy in the order in which oneDNN reads a weight, for products of about so many rows. From two rows on `linear`
    gives the same bits with it, and needs half of the time at 8 rows, four fifths at 64."""
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), rows)
    return result


def product(left_MK: Tensor, right_KN: Tensor, sum_type: torch.dtype) -> Tensor:
    """left @ right, [M, N] anew, summed in `sum_type`. Without a gradient."""
    if prefers_onednn(left_MK, right_KN, left_MK.numel() * right_KN.shape[1]):
        if left_MK.is_contiguous() or left_MK.numel() <= right_KN.numel() + left_MK.shape[0] * right_KN.shape[1]:
            return linear(left_MK, right_KN.t())
        # of two transposed factors the smaller one is copied, and the result, rather than the larger one
        return linear(right_KN.t(), left_MK).t().contiguous()
    if left_MK.dtype == sum_type:
        return torch.mm(left_MK, right_KN)
    return torch.mm(left_MK, right_KN, out_dtype=sum_type)


def product_in_blocks(left_MK: Tensor, right_KN: Tensor, sum_type: torch.dtype) -> Tensor:
    """`product`, and beside what it gives nothing of its size or its left factor's is held."""
    if not prefers_onednn(left_MK, right_KN, left_MK.numel() * right_KN.shape[1]):
        return product(left_MK, right_KN, sum_type)
    total_MN = right_KN.new_empty(left_MK.shape[0], right_KN.shape[1])
    for rows in _blocks(total_MN):
        total_MN[rows] = linear(left_MK[rows], right_KN.t())
    return total_MN


def add_product(total_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """total + left @ right, in the memory of `total` and summed in its type; nothing else of its size is held."""
    if prefers_onednn(left_MK, right_KN, left_MK.numel() * right_KN.shape[1]):
        for rows in _blocks(total_MN):
            total_MN[rows].add_(linear(left_MK[rows], right_KN.t()))
        return total_MN
    if left_MK.dtype == total_MN.dtype:
        return total_MN.addmm_(left_MK, right_KN)
    return torch.addmm(total_MN, left_MK, right_KN, out_dtype=total_MN.dtype, out=total_MN)


def _blocks(total_MN: Tensor) -> list[slice]:
    rows = max(1, BLOCK_BYTES // (total_MN.itemsize * total_MN.shape[1]))
    return [slice(start, start + rows) for start in range(0, total_MN.shape[0], rows)]
