"""What tells the tokens of a row from those of another that has its id: another prompt, template or tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from artifacts.digest import canonical_json, sha256_bytes
from stages.training.batch import Group


def tokens_sha256(group: Group) -> str:
    """Of a group's token ids and of which of them are asked for."""
    branches = [[_numbers(branch.token_ids), _numbers(branch.loss_mask or ())] for branch in group.branches]
    return sha256_bytes(canonical_json([_numbers(group.prefix_ids), branches]))


def branches_sha256(group: Group) -> list[str]:
    """The same of every branch after the prefix, as if it were alone."""
    return [tokens_sha256(replace(group, branches=(branch,))) for branch in group.branches]


def _numbers(values: Iterable[Any]) -> list[int]:
    return [int(value) for value in values]
