"""Attention to some of the keys, and the joining of such parts.

n rows of a call, h query heads, k key heads, Q queries, K keys, d head size. A part gives the softmax over its own
keys with the logarithm of its normalizer; parts are joined by their normalizers (arXiv:2205.14135, section 3.1). So
completions of one prompt attend to its keys in one product, and each to its own tokens in another.

A row's attention is the same bits in any company: keys are taken KEYS_AT_ONCE at a time wherever they stand, and the
CPU's kernel computes a row in the same way whatever keys are hidden behind its own (in multiples of LANES) and
whatever queries stand beside it (in multiples of TILE).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
KEYS_AT_ONCE = 192
"""With more keys the products below the kernel are summed in blocks whose size depends on the number of keys."""
_LOWEST = -1e30


@dataclass(frozen=True)
class Scores:
    """What becomes of the products of queries and keys."""

    scale: float
    window: int | None = None
    """A token sees itself and at most window - 1 before it; None: everything before it."""
    softcap: float | None = None


@dataclass(frozen=True)
class Seen:
    """Who sees which of some keys."""

    mask: Tensor
    """Added to the scores: 0 or -inf, [n or 1, 1, Q or 1, K]. Who sees no key is let see them all."""
    blind: Tensor | None
    """Added to the sums, [n or 1, 1, Q or 1]: -inf for who sees no key; None: everybody sees one."""


Part = tuple[Tensor, Tensor]
"""Keys and values [n, k, K, d] of at most KEYS_AT_ONCE tokens."""


def cut(key_nkKd: Tensor, value_nkKd: Tensor, tokens: int) -> list[Part]:
    """The first tokens, KEYS_AT_ONCE at a time; views."""
    bounds = [(start, min(start + KEYS_AT_ONCE, tokens)) for start in range(0, tokens, KEYS_AT_ONCE)]
    return [(key_nkKd[:, :, start:stop], value_nkKd[:, :, start:stop]) for start, stop in bounds]


def seen_of(seen_nQK: Tensor, dtype: torch.dtype) -> list[Seen]:
    """One for each part. `seen_nQK`: bool [n, Q or 1, K]."""
    found = []
    for part_nQK in seen_nQK.split(KEYS_AT_ONCE, 2):
        blind_nQ1 = ~part_nQK.any(2, keepdim=True)
        if bool(blind_nQ1.any()):
            # softmax of nothing is no number
            mask = additive(part_nQK | blind_nQ1, dtype)[:, None]
            found.append(Seen(mask, additive(~blind_nQ1, dtype)[:, None, :, 0]))
        else:
            found.append(Seen(additive(part_nQK, dtype)[:, None], None))
    return found


def attend(query_nhQd: Tensor, parts: Sequence[Part], seen: Sequence[Seen], scores: Scores) -> tuple[Tensor, Tensor]:
    """(output [n, h, Q, d], logarithms of the normalizers [n, h, Q]) over the keys of all parts."""
    found: tuple[Tensor, Tensor] | None = None
    for (keys, values), one in zip(parts, seen, strict=True):
        out, sums = _attend_to_all(query_nhQd, keys, values, one.mask, scores)
        if one.blind is not None:
            sums = sums + one.blind
        found = (out, sums) if found is None else joined(*found, out, sums)
    assert found is not None
    return found


def attend_causally(query_nhTd: Tensor, key_nkTd: Tensor, value_nkTd: Tensor, scores: Scores) -> Tensor:
    """[n, h, T, d]: every token to itself and to those before it. Padding stands behind, where no real token looks."""
    n, h, tokens, _ = query_nhTd.shape
    place_T = torch.arange(tokens, device=query_nhTd.device)
    # tokens outermost in memory, as the output projection reads them
    out = query_nhTd.new_zeros(n, tokens, h, value_nkTd.shape[3]).transpose(1, 2)
    wide = torch.promote_types(query_nhTd.dtype, torch.float32)
    sums = torch.full((n, h, tokens), -torch.inf, dtype=wide, device=out.device)
    for start in range(0, tokens, KEYS_AT_ONCE):
        stop = min(start + KEYS_AT_ONCE, tokens)
        last = tokens if scores.window is None else min(tokens, stop - 1 + scores.window)
        distance_QK = place_T[start:last, None] - place_T[start:stop]
        seen_QK = (distance_QK >= 0) & (distance_QK < (scores.window or tokens))
        part, part_sums = _attend_to_all(
            query_nhTd[:, :, start:last],
            key_nkTd[:, :, start:stop],
            value_nkTd[:, :, start:stop],
            additive(seen_QK, query_nhTd.dtype)[None, None],
            scores,
        )
        before, before_sums = out[:, :, start:last], sums[:, :, start:last]
        out[:, :, start:last], sums[:, :, start:last] = joined(before, before_sums, part, part_sums)
    return out


def joined(first: Tensor, first_sums: Tensor, second: Tensor, second_sums: Tensor) -> tuple[Tensor, Tensor]:
    """The output over the keys of both parts and its sums; [..., d] and [...]. A sum may be -inf: that part is void.

    Of exponentials alone: torch computes sigmoid and logaddexp differently at the end of a tensor.
    """
    highest = torch.maximum(first_sums, second_sums).clamp_(min=_LOWEST)
    seconds = torch.exp(second_sums - highest)
    both = torch.exp(first_sums - highest).add_(seconds)
    weights = seconds.div_(both.clamp(min=torch.finfo(both.dtype).tiny))
    return torch.lerp(first, second, weights.to(first.dtype)[..., None]), both.log_().add_(highest)


def with_more(first: Tensor, first_sums: Tensor, second: Tensor, second_sums: Tensor) -> Tensor:
    """The output of `joined`, where the first part is not void."""
    weights = torch.exp(first_sums - second_sums).add_(1).reciprocal_()
    return torch.lerp(first, second, weights.to(first.dtype)[..., None])


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, else -inf."""
    return torch.where(seen, 0.0, -torch.inf).to(dtype)


def _attend_to_all(
    query_nhQd: Tensor, key_nkKd: Tensor, value_nkKd: Tensor, mask: Tensor, scores: Scores
) -> tuple[Tensor, Tensor]:
    if scores.softcap is None and query_nhQd.device.type == "cpu":
        out, sums = _fused(query_nhQd, key_nkKd, value_nkKd, 0.0, False, attn_mask=mask, scale=scores.scale)
        return out, sums
    n, h, queries, size = query_nhQd.shape
    heads = key_nkKd.shape[1]
    # the query heads of one key head as more queries
    query_nkRd = query_nhQd.reshape(n, heads, h // heads * queries, size)
    wide = torch.promote_types(query_nhQd.dtype, torch.float32)
    products = (query_nkRd @ key_nkKd.transpose(-1, -2)).to(wide) * scores.scale
    if scores.softcap is not None:
        products = torch.tanh(products / scores.softcap) * scores.softcap
    products = products.view(n, heads, h // heads, queries, -1) + mask[:, :, None].to(wide)
    sums = products.logsumexp(-1)
    weights = (products - sums[..., None]).exp_().to(value_nkKd.dtype).view(n, heads, h // heads * queries, -1)
    return (weights @ value_nkKd).view(n, h, queries, -1), sums.view(n, h, queries)
