"""Recorded rollouts: their groups, and their rewards computed again or weighed anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from artifacts.errors import DataError, RequestError
from stages.data.tokenize import TokenizedPrompt
from stages.data.types import ROW_ID, Dataset, Row
from stages.evaluation.rows import extra_columns
from stages.names import nearest
from stages.rollouts.multi_turn.episode import Episode
from stages.rollouts.requests import Completion
from stages.rollouts.rewards import RewardSet

GROUP = ("step", "group")
"""Columns that say which completions were sampled together."""
_NEEDED = ("prompt_row_id", "prompt_ids", "token_ids", "logprobs", "finished", "reward", *GROUP)
FREE = "free_logprobs"
"""Column with each token's log-probability among all tokens, where completions were held to a form."""
REWARD = "reward_"
"""What the names of columns of rewards by function begin with."""


@dataclass(frozen=True)
class Recorded:
    """Rollouts in the order they were sampled in. `groups`: the indices of the rows of each group.

    `names`: the rewards by function that the rows have, in columns `reward_<name>`. `prompts`: by row id, what the
    run's dataset says of a prompt; empty where that is not given.
    """

    rows: Sequence[Row]
    groups: Sequence[Sequence[int]]
    names: tuple[str, ...]
    prompts: Mapping[str, Row] = field(default_factory=dict)
    beside: Mapping[str, Row] = field(default_factory=dict)
    """The columns of `prompts` that are not of their dataset's type: answers, tools, whatever was kept."""
    failed: Mapping[str, int] = field(default_factory=dict)
    """By reward function that may fail and was called again: completions for which it did."""


def read_recorded(dataset: Dataset, prompts: Dataset | None = None) -> Recorded:
    """The rollouts of a run, and the rows of `prompts` that they are of.

    Raises DataError where the dataset holds something else, or `prompts` lacks a row.
    """
    missing = [column for column in _NEEDED if column not in dataset.columns]
    if missing:
        raise DataError(
            f"input rollouts has no column {', '.join(missing)}; give output `rollouts` of a stage rl or rescore; "
            f"found {', '.join(dataset.columns)}"
        )
    keys = [tuple(row[column] for column in GROUP) for row in dataset]
    rows = dataset.rows
    groups = [list(members) for _, members in groupby(range(len(rows)), key=lambda index: keys[index])]
    if len({keys[members[0]] for members in groups}) < len(groups):
        raise DataError("input rollouts: the rows of a group are not together; keep them in the order of the run")
    names = tuple(name.removeprefix(REWARD) for name in dataset.columns if name.startswith(REWARD))
    if prompts is None:
        return Recorded(rows, groups, names)
    first = {row["prompt_row_id"]: row for row in reversed(rows)}
    known = {row[ROW_ID]: row for row in prompts if row[ROW_ID] in first}
    for name, row in first.items():
        if name not in known:
            raise DataError(
                f"input dataset has no row {name}, the prompt of rollout {row[ROW_ID]}; give the dataset of the run"
            )
    beside = {name: extra_columns(prompts, row) for name, row in known.items()}
    return Recorded(rows, groups, names, known, beside)


def rescored(recorded: Recorded, rewards: RewardSet | None, weights: Mapping[str, float] | None) -> Recorded:
    """The same completions with other rewards: `rewards` in place of the recorded ones (None: those stay), summed by
    `weights`. What followed from the old sum, the advantage, is left out.

    Raises RequestError for a weight of a reward that there is not, and what reward functions raise.
    """
    rows = [{name: value for name, value in row.items() if name != "advantage"} for row in recorded.rows]
    recorded = replace(recorded, rows=rows)
    if rewards is not None:
        recorded = _scored_again(recorded, rewards)
    elif weights is None:
        return recorded
    weights = dict.fromkeys(recorded.names, 1.0) if weights is None else weights
    for name in weights:
        if name not in recorded.names:
            raise RequestError(
                f"reward_weights names {name!r}{nearest(name, recorded.names)}; the rewards are "
                f"{', '.join(recorded.names) or 'none'}"
            )
    return replace(recorded, rows=[{**row, "reward": _total(row, weights)} for row in recorded.rows])


def _total(row: Row, weights: Mapping[str, float]) -> float | None:
    """Weighted sum over the functions that scored the completion; None: none did."""
    scored = [weight * row[f"{REWARD}{name}"] for name, weight in weights.items() if row[f"{REWARD}{name}"] is not None]
    return sum(scored) if scored else None


def _scored_again(recorded: Recorded, rewards: RewardSet) -> Recorded:
    """As in training: the functions are called for all completions of a generation at once."""
    rows: list[Row] = []
    names: tuple[str, ...] = ()
    failed = dict.fromkeys(rewards.may_fail, 0)
    for _, generation in groupby(recorded.groups, key=lambda members: recorded.rows[members[0]]["step"]):
        groups = [[recorded.rows[index] for index in members] for members in generation]
        found = rewards.score(
            [prompt_of(group[0], recorded.prompts) for group in groups],
            [[completion_of(row) for row in group] for group in groups],
            [[text_of(row["completion"]) for row in group] for group in groups],
            some_scored=False,
        )
        names = tuple(found.by_function)
        for name, groups_failed in found.failed.items():
            failed[name] += sum(map(sum, groups_failed))
        for place, group in enumerate(groups):
            for index, row in enumerate(group):
                kept = {name: value for name, value in row.items() if not name.startswith(REWARD)}
                scores = {f"{REWARD}{name}": values[place][index] for name, values in found.by_function.items()}
                rows.append(kept | scores)
    return replace(recorded, rows=rows, names=names, failed=failed)


def prompt_of(row: Row, prompts: Mapping[str, Row] | None = None) -> TokenizedPrompt:
    """The prompt of a rollout as the run had it, with the columns that its dataset has beside it, if that is given."""
    name = row["prompt_row_id"]
    beside = {} if prompts is None else prompts[name]
    return TokenizedPrompt(name, row["prompt_ids"], {**beside, "prompt": row["prompt"]})


def completion_of(row: Row) -> Completion:
    """What was sampled."""
    completion = Completion(row["token_ids"], row["logprobs"], row["finished"], free_logprobs=row.get(FREE) or [])
    if row.get("loss_mask") is None:
        return completion
    return replace(completion, loss_mask=row["loss_mask"], episode=Episode.of(row))


def text_of(completion: Any) -> str:
    """What was said: text as it stands, or the content of the assistant's last turn."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1]["content"]) if completion else ""
