"""Groups of rollouts as JSON values, for states that a resumed run takes up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from stages.training.batch import Branch, Group
from stages.training.policy_known import Rollouts


def groups_to_json(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """All of every group; its data is a dataclass."""
    return [
        {
            "row_id": group.row_id,
            "prefix_ids": list(group.prefix_ids),
            "branches": [asdict(branch) for branch in group.branches],
            "data": asdict(group.data),
        }
        for group in groups
    ]


def groups_from_json(saved: Sequence[dict[str, Any]], data: Callable[..., Any] = Rollouts) -> list[Group]:
    """What `groups_to_json` was given, with data of that type; its fields were tuples, which JSON gives back as
    lists."""
    return [
        Group(
            group["row_id"],
            group["prefix_ids"],
            tuple(Branch(**branch) for branch in group["branches"]),
            data(**{name: _as_tuple(value) for name, value in group["data"].items()}),
        )
        for group in saved
    ]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
