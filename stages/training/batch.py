"""Groups of sequences laid out for one forward pass: one packed row without padding, every shared prefix once.

Letters: B rows of the pass, T tokens of a row, N positions whose token's log-probability is asked for, K branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.losses.host_numbers import on_device
from stages.training.attention import PackedAttention
from stages.training.planner import packed_micro_batches, padded_micro_batches
from stages.training.prefix_tree import PackedRow, Positions


@dataclass(frozen=True)
class Branch:
    """A continuation of a prefix; `loss_mask[t]` says whether token t is asked for (None: all)."""

    token_ids: Sequence[int]
    loss_mask: Sequence[bool] | None = None

    @property
    def asked(self) -> int:
        """How many of its tokens are asked for."""
        return len(self.token_ids) if self.loss_mask is None else sum(self.loss_mask)


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


@dataclass(frozen=True)
class TokenBatch:
    """Groups as tensors: one packed row, or, for models that cannot take one, a padded row a branch."""

    groups: tuple[Group, ...]
    input_ids_BT: Tensor
    position_ids_BT: Tensor
    packed: PackedAttention | None
    """Who sees whom in the packed row (B = 1); None: plain causal rows, padded on the right."""
    source_N: Tensor
    """Index into the flattened B x T of the position that predicts the asked-for token."""
    target_N: Tensor
    branch_N: Tensor
    last_K: Tensor
    """Index into the flattened B x T of the last token of every branch."""
    counts: tuple[int, ...]
    """Asked-for tokens of every branch."""
    num_tokens: int
    """Tokens without padding, every shared one once."""
    noise: Callable[[Tensor], Tensor] | None = None
    """What the embeddings [B, T, H] of the input tokens become before the first layer."""

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
        if device == self.input_ids_BT.device:
            return self
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        packed = None if self.packed is None else PackedAttention(self.packed.segments, device)
        return replace(self, packed=packed, **moved)

    def row_starts(self) -> list[int]:
        """Index into the flattened B x T of every group's first token, for groups of one sequence."""
        if self.packed is None:
            width = self.input_ids_BT.shape[1]
            return [number * width for number in range(len(self.groups))]
        lengths = [group.length for group in self.groups]
        return [0, *accumulate(lengths[:-1])]

    def sum_by_branch(self, values_N: Tensor) -> Tensor:
        """[K] sums of per-token values over each branch (index_add: deterministic on CPU)."""
        return values_N.new_zeros(self.num_branches).index_add(0, self.branch_N, values_N)

    def tokens_per_branch(self) -> Tensor:
        """[K] number of asked-for tokens."""
        return on_device(self.counts, self.branch_N.device, torch.long)


def layout(groups: Sequence[Group], *, share_prefixes: bool = True, multiple: int = 1) -> TokenBatch:
    """Lay groups out for one forward pass.

    With `share_prefixes` all groups stand in one row, and tokens that the branches of a group begin with are computed
    once; the result is that of separate rows. Such a row ends with tokens that nobody sees, up to a `multiple`.
    Without, every branch is a row of its own with its copy of the prefix.
    """
    return _packed(groups, multiple) if share_prefixes else _padded(groups)


def _packed(groups: Sequence[Group], multiple: int) -> TokenBatch:
    row = PackedRow()
    places = [row.add_sequences(group.prefix_ids, [branch.token_ids for branch in group.branches]) for group in groups]
    num_tokens = row.num_tokens
    row.fill_up(multiple)
    return TokenBatch(
        groups=tuple(groups),
        input_ids_BT=torch.from_numpy(row.token_ids())[None],
        position_ids_BT=torch.from_numpy(row.position_ids())[None],
        packed=PackedAttention(row.segments, torch.device("cpu")),
        num_tokens=num_tokens,
        **_asked_for(groups, [place for group in places for place in group]),
    )


def _padded(groups: Sequence[Group]) -> TokenBatch:
    rows = [[*group.prefix_ids, *branch.token_ids] for group in groups for branch in group.branches]
    width = max(len(row) for row in rows)
    return TokenBatch(
        groups=tuple(groups),
        # padding stands on the right, where no real position looks; plain rows count on through it, because
        # transformers takes a restart of the positions for a packed row
        input_ids_BT=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        position_ids_BT=torch.arange(width).expand(len(rows), width),
        packed=None,
        num_tokens=sum(len(row) for row in rows),
        **_asked_for(groups, [number * width + np.arange(len(row)) for number, row in enumerate(rows)]),
    )


def _asked_for(groups: Sequence[Group], places: Sequence[Positions]) -> dict[str, Any]:
    """Sources, targets and branches of the asked-for tokens; `places`: where every token of a branch's sequence is."""
    sources, targets, counts, last = [], [], [], []
    branches = [(group, branch) for group in groups for branch in group.branches]
    for (group, branch), place in zip(branches, places, strict=True):
        prefix, tokens = len(group.prefix_ids), np.asarray(branch.token_ids, dtype=np.int64)
        asked = np.arange(len(tokens)) if branch.loss_mask is None else np.flatnonzero(branch.loss_mask)
        if len(asked) and asked[0] + prefix == 0:
            raise ValueError(f"row {group.row_id}: its first token has nothing before it to predict it")
        sources.append(place[asked + prefix - 1])
        targets.append(tokens[asked])
        counts.append(len(asked))
        last.append(place[-1])
    return {
        "source_N": torch.from_numpy(np.concatenate(sources)),
        "target_N": torch.from_numpy(np.concatenate(targets)),
        "branch_N": torch.arange(len(branches)).repeat_interleave(torch.tensor(counts)),
        "last_K": torch.tensor(np.array(last)),
        "counts": tuple(counts),
    }


def plan_micro_batches(
    groups: Sequence[Group], budget_tokens: int, share_prefixes: bool, *, least: int = 1
) -> list[list[int]]:
    """Indices of groups in micro-batches under the token budget; at least `least`, so that every process has one."""
    if share_prefixes:
        return packed_micro_batches([group.length for group in groups], budget_tokens, least)
    padded = [
        len(group.branches) * (len(group.prefix_ids) + max(len(branch.token_ids) for branch in group.branches))
        for group in groups
    ]
    return padded_micro_batches(padded, budget_tokens)
