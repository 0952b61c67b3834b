"""The datasets that `rescore` makes of rollouts: all of them, the best, pairs, and judged completions.

Every rollout ends in one state of the table's ledger, and every row names the rollouts it is of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.data.ledger import RowLedger
from stages.data.types import ROW_ID, Row
from stages.rollouts.recorded import FREE, Recorded, text_of

NOT_SCORED = "filtered: not scored"
BELOW = "filtered: below threshold"
NOT_BEST = "filtered: another of its group is better"
NO_PAIR = "filtered: in no pair"
AGAIN = "duplicate"
_OF_SAMPLING = ("prompt_ids", "token_ids", "logprobs", FREE, "group")
"""Columns that rows to train on have no use for."""


@dataclass(frozen=True)
class Table:
    """Rows of a dataset, and what became of the rollouts."""

    type: str
    rows: list[Row] = field(default_factory=list)
    ledger: RowLedger = field(default_factory=RowLedger)


def rollouts_table(recorded: Recorded, config: Any) -> Table:
    """Every rollout."""
    table = Table("prompt_completion", list(recorded.rows))
    table.ledger.use(len(table.rows))
    return table


def best_table(recorded: Recorded, config: Any) -> Table:
    """The best completion of each group, the earliest of equals, or all that are right; a text once for a prompt."""
    table = Table("prompt_completion")
    seen: set[tuple[str, str]] = set()
    for group in _groups(recorded):
        scored = _take_scored(group, table.ledger)
        right = [row for row in scored if config.threshold is None or row["reward"] >= config.threshold]
        best = [max(right, key=lambda row: row["reward"])] if right and config.keep == "best" else right
        for row in scored:
            if row not in right:
                table.ledger.drop(row[ROW_ID], BELOW, f"reward {row['reward']:.6g}")
            elif row not in best:
                table.ledger.drop(row[ROW_ID], NOT_BEST)
            elif _is_new(row, seen, table.ledger):
                table.rows.append(_lean(row, recorded))
    return table


def labels_table(recorded: Recorded, config: Any) -> Table:
    """Every completion, desirable where its reward reaches the threshold; a text once for a prompt."""
    table = Table("unpaired_preference")
    seen: set[tuple[str, str]] = set()
    for group in _groups(recorded):
        for row in _take_scored(group, table.ledger):
            if _is_new(row, seen, table.ledger):
                table.rows.append({**_lean(row, recorded), "label": row["reward"] >= config.threshold})
    return table


def pairs_table(recorded: Recorded, config: Any) -> Table:
    """The best against the worst of each group, then the second best against the second worst, ..."""
    table = Table("preference")
    seen: set[tuple[str, str, str]] = set()
    for group in _groups(recorded):
        scored = _take_scored(group, table.ledger)
        used: set[str] = set()
        for chosen, rejected in best_against_worst(scored, config.threshold, config.min_gap, config.pairs_per_group):
            texts = (chosen["prompt_row_id"], text_of(chosen["completion"]), text_of(rejected["completion"]))
            if texts not in seen:
                seen.add(texts)
                used |= {chosen[ROW_ID], rejected[ROW_ID]}
                pair = _pair(chosen, rejected, margin=config.margin)
                table.rows.append({**recorded.beside.get(chosen["prompt_row_id"], {}), **pair})
        for row in scored:
            if row[ROW_ID] in used:
                table.ledger.use(row[ROW_ID])
            else:
                table.ledger.drop(row[ROW_ID], NO_PAIR)
    return table


def best_against_worst(
    scored: Sequence[Row], threshold: float | None, min_gap: float, count: int
) -> Iterator[tuple[Row, Row]]:
    """At most `count` (chosen, rejected), no row twice, while the gap of their rewards is above 0 and at least
    `min_gap`. Chosen is right and rejected is wrong by `threshold`, where there is one. Equal texts are passed over.
    Of equal rewards the earlier one counts as better."""
    ranked = sorted(scored, key=lambda row: -row["reward"])
    for place in range(min(count, len(ranked) // 2)):
        chosen, rejected = ranked[place], ranked[-1 - place]
        high, low = chosen["reward"], rejected["reward"]
        if high <= low or high - low < min_gap or (threshold is not None and not high >= threshold > low):
            return
        if chosen["completion"] != rejected["completion"]:
            yield chosen, rejected


def _pair(chosen: Row, rejected: Row, *, margin: bool) -> Row:
    gap = {"margin": chosen["reward"] - rejected["reward"]} if margin else {}
    return {
        ROW_ID: f"{chosen[ROW_ID]}-{rejected[ROW_ID].rsplit('/', 1)[-1]}",
        "prompt": chosen["prompt"],
        "chosen": chosen["completion"],
        "rejected": rejected["completion"],
        "prompt_row_id": chosen["prompt_row_id"],
        "chosen_row_id": chosen[ROW_ID],
        "rejected_row_id": rejected[ROW_ID],
        "chosen_score": chosen["reward"],
        "rejected_score": rejected["reward"],
        **gap,
        "step": chosen["step"],
    }


def _groups(recorded: Recorded) -> Iterator[list[Row]]:
    for members in recorded.groups:
        yield [recorded.rows[index] for index in members]


def _take_scored(group: Sequence[Row], ledger: RowLedger) -> list[Row]:
    """Those with a reward; the others are dropped."""
    for row in group:
        if row["reward"] is None:
            ledger.drop(row[ROW_ID], NOT_SCORED)
    return [row for row in group if row["reward"] is not None]


def _is_new(row: Row, seen: set[tuple[str, str]], ledger: RowLedger) -> bool:
    """Whether the prompt has this completion for the first time; the row is used, or a duplicate."""
    text = (row["prompt_row_id"], text_of(row["completion"]))
    if text in seen:
        ledger.drop(row[ROW_ID], AGAIN)
        return False
    seen.add(text)
    ledger.use(row[ROW_ID])
    return True


def _lean(row: Row, recorded: Recorded) -> Row:
    """Without what only sampling knows, with what the prompt's dataset has beside it."""
    kept = {name: value for name, value in row.items() if name not in _OF_SAMPLING}
    return {**recorded.beside.get(row["prompt_row_id"], {}), **kept}


TABLES: dict[str, Callable[[Recorded, Any], Table]] = {
    "rollouts": rollouts_table,
    "best": best_table,
    "pairs": pairs_table,
    "labels": labels_table,
}
"""By output of the stage."""
