"""Log-probabilities of a dataset's completions under a fixed model: once per (model, rows), resumable by shard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from artifacts.errors import StageError
from stages.context import Context
from stages.data.dataset import read_parquet
from stages.shards import in_shards
from stages.training.batch import Group, TokenBatch
from stages.training.model import Scorer, token_logprobs
from stages.training.out_of_memory import TokenBudget
from stages.training.pairs import Reference, sum_of_tokens
from stages.training.passes import without_gradients
from stages.training.row_digest import branches_sha256

_TABLE, _MODEL = "logprobs.parquet", b"model"
"""The file, and the key in its metadata that says whose log-probabilities they are."""
LOGPROBS = ("reference_logprobs", "eval_reference_logprobs")
"""Inputs with the log-probabilities of the reference: of the rows that are trained on, and of those apart."""


class ScoringConfig(Protocol):
    """How a pass over fixed rows is cut up; none of it is part of the result."""

    @property
    def micro_batch_tokens(self) -> int:
        """Most tokens (padding included) of one forward pass."""

    @property
    def shard_rows(self) -> int:
        """Rows of one shard: what a killed run computes again at most."""


def branch_logprobs(
    scorer: Scorer, groups: Sequence[Group], budget: TokenBudget, *, temperature: float = 1.0
) -> list[list[tuple[list[float], float]]]:
    """For every group, for every branch: (log-probabilities of its asked-for tokens, their sum)."""
    results: list[Any] = [None] * len(groups)

    def compute(indices: list[int], batch: TokenBatch) -> None:
        logprobs_N = scorer(batch, token_logprobs(batch, temperature=temperature)).logprobs_N
        sums_K = batch.sum_by_branch(logprobs_N).tolist()
        per_branch = [part.tolist() for part in logprobs_N.cpu().split(batch.counts)]
        start = 0
        for index in indices:
            stop = start + len(groups[index].branches)
            results[index] = list(zip(per_branch[start:stop], sums_K[start:stop], strict=True))
            start = stop

    scorer.eval()
    without_gradients(scorer, groups, budget, compute)
    return results


def score_rows(
    context: Context,
    accelerator: Accelerator,
    scorer: Scorer,
    groups: Sequence[Group],
    *,
    config: ScoringConfig,
    per_token: bool = False,
    shards: str = "logprobs",
) -> list[dict[str, Any]]:
    """One row a group: row_id, `sums`, `tokens`, and `logprobs` where asked for. Shards go to the ranks in turn; what
    they are called tells them from those of another set of groups."""
    budget = TokenBudget(context, config.micro_batch_tokens)

    def compute(part: Sequence[Group]) -> list[dict[str, Any]]:
        context.tokens += sum(group.length for group in part)
        return _shard_rows(part, branch_logprobs(scorer, part, budget), per_token)

    return in_shards(context, accelerator, shards, groups, compute, size=config.shard_rows)


def _shard_rows(groups: Sequence[Group], scored: Sequence[Any], per_token: bool) -> list[dict[str, Any]]:
    rows = []
    for group, branches in zip(groups, scored, strict=True):
        row: dict[str, Any] = {
            "row_id": group.row_id,
            "sums": [total for _, total in branches],
            "tokens": [len(values) for values, _ in branches],
        }
        if not all(map(math.isfinite, row["sums"])):
            raise StageError(f"row {group.row_id}: its log-probability under the reference model is not finite")
        if per_token:
            row["logprobs"] = [values for values, _ in branches]
        rows.append(row)
    return rows


PAIR = ("chosen", "rejected")
"""Columns of pairs' log-probabilities."""


def read_references(
    context: Context, name: str, groups: Sequence[Group], *, ld_alpha: float | None = None
) -> list[Reference]:
    """The references of preference groups from input `name`, a `logprobs` artifact.

    Raises StageError where a row is missing or its token counts differ (another dataset, tokenizer or max_length), or
    where `ld_alpha` needs every token's value and only sums were kept.
    """
    table = _read_table(context, name)
    if "chosen_logps" not in table.column_names:
        raise StageError(f"input {name}: the log-probabilities are not of preference pairs (no column chosen_logps)")
    per_token = ld_alpha is not None
    if per_token and "chosen_token_logps" not in table.column_names:
        raise StageError(
            f"input {name}: ld_alpha needs the log-probability of every token; compute them with per_token: true"
        )
    rows = {row["row_id"]: row for row in table.to_pylist()}
    found = [_read_row(name, rows.get(group.row_id), group, PAIR, per_token) for group in groups]
    return pair_references(found, ld_alpha)


def write_references(folder: Path, columns: dict[str, list[Any]], model: str) -> None:
    """A `logprobs` artifact's table; `model`: the digest of the one whose log-probabilities they are."""
    import pyarrow
    import pyarrow.parquet as parquet

    table = pyarrow.table(columns).replace_schema_metadata({_MODEL: model})
    parquet.write_table(table, folder / _TABLE, write_page_checksum=True)


def _read_table(context: Context, name: str) -> Any:
    return read_parquet(context.input(name) / _TABLE)


def require_one_reference(context: Context) -> None:
    """Raises StageError where inputs with log-probabilities are of several models."""
    import pyarrow.parquet as parquet

    models = {
        name: (parquet.read_schema(context.input(name) / _TABLE).metadata or {}).get(_MODEL, b"").decode()
        for name in LOGPROBS
        if context.has(name)
    }
    if len(set(models.values())) > 1:
        found = " and ".join(f"{name} of {model or 'an unnamed one'}" for name, model in models.items())
        raise StageError(f"log-probabilities of two reference models: {found}; make both by one")


UNPAIRED = ("completion", "mismatched")
"""Columns of an unpaired dataset's log-probabilities; the second of the completions of `data.unpaired.mismatched`."""


def read_unpaired(context: Context, name: str, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Rows of input `name` as `score_rows` gives them, for groups of one completion, or of two with the mismatched one.

    Raises StageError where a row is missing, or its token counts differ.
    """
    table = _read_table(context, name)
    missing = [f"{column}_logps" for column in UNPAIRED[: len(groups[0].branches)]]
    missing = [column for column in missing if column not in table.column_names]
    if missing:
        raise StageError(
            f"input {name}: the log-probabilities are not of judged completions (no column {missing[0]}); compute them "
            "on the same dataset, normalized to type unpaired_preference"
        )
    rows = {row["row_id"]: row for row in table.to_pylist()}
    return [_read_row(name, rows.get(group.row_id), group, UNPAIRED[: len(group.branches)], False) for group in groups]


def _read_row(
    name: str, row: dict[str, Any] | None, group: Group, columns: Sequence[str], per_token: bool
) -> dict[str, Any]:
    if row is None:
        raise StageError(
            f"input {name} has no log-probability of row {group.row_id}; compute them on the same dataset, with the "
            "same max_length"
        )
    found = tuple(row[f"{column}_tokens"] for column in columns)
    expected = tuple(len(branch.token_ids) for branch in group.branches)
    if found != expected:
        raise StageError(
            f"input {name}: row {group.row_id}: log-probabilities are of {found} tokens, the row has {expected}; "
            "compute them with the same tokenizer and max_length"
        )
    for column, digest in zip(columns, branches_sha256(group), strict=True):
        if row.get(f"{column}_sha256") != digest:
            raise StageError(
                f"input {name}: row {group.row_id}: the log-probability of its {column} is of other tokens; compute "
                "them on exactly these rows, with the tokenizer and chat template of the model that is trained"
            )
    read: dict[str, Any] = {"sums": [row[f"{column}_logps"] for column in columns]}
    if per_token:
        read["logprobs"] = [row[f"{column}_token_logps"] for column in columns]
    return read


def pair_references(rows: Sequence[dict[str, Any]], ld_alpha: float | None) -> list[Reference]:
    """References from rows of scores; with `ld_alpha`, tokens beyond the shorter completion count that much."""
    if ld_alpha is None:
        return [Reference(*row["sums"]) for row in rows]
    references = []
    for row in rows:
        shared = min(len(values) for values in row["logprobs"])
        references.append(Reference(*(sum_of_tokens(values, shared, ld_alpha) for values in row["logprobs"])))
    return references
