"""Rows that share a prefix, laid out for one forward pass.

Letters: B rows of the pass, T tokens of a row, N positions whose token's log-probability is asked for, K branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """A continuation of a prefix; `loss_mask[t]` says whether token t is asked for (None: all)."""

    token_ids: Sequence[int]
    loss_mask: Sequence[bool] | None = None


@dataclass(frozen=True)
class Group:
    """Branches of one prefix: chosen and rejected, or all completions of a prompt, or one whole sequence."""

    row_id: str
    prefix_ids: Sequence[int]
    branches: tuple[Branch, ...]
    data: Any = None
    """What the objective needs to know of the group: advantages, reference log-probabilities, a margin."""

    @property
    def length(self) -> int:
        """Tokens of the group with the prefix once."""
        return len(self.prefix_ids) + sum(len(branch.token_ids) for branch in self.branches)

    def apart(self) -> list[Group]:
        """The same branches, each with its own copy of the prefix."""
        return [Group(self.row_id, self.prefix_ids, (branch,), self.data) for branch in self.branches]


@dataclass(frozen=True)
class TokenBatch:
    """Groups as tensors. A row is `[prefix | branch 1 | branch 2 ...]`, every branch's positions follow the prefix."""

    groups: tuple[Group, ...]
    input_ids_BT: Tensor
    position_ids_BT: Tensor
    attention_mask: Tensor | None
    """[B, 1, T, T], True where a query (row) sees a key; None: plain causal rows."""
    source_N: Tensor
    """Index into the flattened B x T of the position that predicts the asked-for token."""
    target_N: Tensor
    branch_N: Tensor
    last_K: Tensor
    """Index into the flattened B x T of the last token of every branch."""
    num_tokens: int
    """Tokens without padding, every prefix once."""

    @property
    def num_branches(self) -> int:
        """K."""
        return len(self.last_K)

    @property
    def row_ids(self) -> list[str]:
        """The dataset rows in this batch."""
        return [group.row_id for group in self.groups]

    def to(self, device: torch.device) -> TokenBatch:
        """The batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def sum_by_branch(self, values_N: Tensor) -> Tensor:
        """[K] sums of per-token values over each branch (index_add: deterministic on CPU)."""
        return values_N.new_zeros(self.num_branches).index_add(0, self.branch_N, values_N)

    def tokens_per_branch(self) -> Tensor:
        """[K] number of asked-for tokens."""
        return torch.bincount(self.branch_N, minlength=self.num_branches)


@dataclass
class _Row:
    ids: list[int]
    positions: list[int]
    segments: list[int]


def layout(groups: Sequence[Group], *, share_prefixes: bool = True) -> TokenBatch:
    """Lay groups out for one forward pass.

    With `share_prefixes` a group is one row and its prefix is computed once; the result is the same as with
    separate rows because every branch sees the prefix and itself only. Without, every branch is a row.
    """
    rows_of = list(groups) if share_prefixes else [one for group in groups for one in group.apart()]
    rows: list[_Row] = []
    source: list[tuple[int, int]] = []
    target: list[int] = []
    branch_index: list[int] = []
    last: list[tuple[int, int]] = []
    for row_number, group in enumerate(rows_of):
        row = _Row(list(group.prefix_ids), list(range(len(group.prefix_ids))), [0] * len(group.prefix_ids))
        for segment, branch in enumerate(group.branches, start=1):
            start, prefix = len(row.ids), len(group.prefix_ids)
            for t, token in enumerate(branch.token_ids):
                if branch.loss_mask is None or branch.loss_mask[t]:
                    before = start + t - 1 if t > 0 else prefix - 1
                    if before < 0:
                        raise ValueError(f"row {group.row_id}: its first token has nothing before it to predict it")
                    source.append((row_number, before))
                    target.append(token)
                    branch_index.append(len(last))
            row.ids += branch.token_ids
            row.positions += range(prefix, prefix + len(branch.token_ids))
            row.segments += [segment] * len(branch.token_ids)
            last.append((row_number, len(row.ids) - 1))
        rows.append(row)
    width = max(len(row.ids) for row in rows)
    shared = any(len(group.branches) > 1 for group in rows_of)
    return TokenBatch(
        groups=tuple(groups),
        input_ids_BT=_pad([row.ids for row in rows], width),
        position_ids_BT=_positions([row.positions for row in rows], width, shared=shared),
        attention_mask=_visibility(_pad([row.segments for row in rows], width, fill=-1)) if shared else None,
        source_N=torch.tensor([row * width + column for row, column in source], dtype=torch.long),
        target_N=torch.tensor(target, dtype=torch.long),
        branch_N=torch.tensor(branch_index, dtype=torch.long),
        last_K=torch.tensor([row * width + column for row, column in last], dtype=torch.long),
        num_tokens=sum(len(row.ids) for row in rows),
    )


def _pad(rows: list[list[int]], width: int, fill: int = 0) -> Tensor:
    """[B, width]; padding stands on the right, where no real position looks under a causal mask."""
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.long)


def _positions(rows: list[list[int]], width: int, *, shared: bool) -> Tensor:
    """[B, width]. Plain rows count on through the padding: transformers takes a restart for a packed sequence."""
    return _pad(rows, width) if shared else torch.arange(width).expand(len(rows), width)


def _visibility(segments_BT: Tensor) -> Tensor:
    """[B, 1, T, T]: a token sees what is before it in the prefix (segment 0) and in its own branch."""
    width = segments_BT.shape[1]
    causal_TT = torch.ones(width, width, dtype=torch.bool).tril()
    own_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    prefix_BTT = (segments_BT == 0)[:, None, :] & (segments_BT >= 0)[:, :, None]
    return (causal_TT & (own_BTT | prefix_BTT))[:, None]
