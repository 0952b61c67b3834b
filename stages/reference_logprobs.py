"""Log-probabilities of a dataset's completions under a fixed model, once: reused by every loss, beta and recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.data.truncation import RowLimit, TruncationMode
from stages.data.types import PAIRED, SEQUENCE_TYPES
from stages.stage import MODELS, Input, Stage
from stages.training.config import PassConfig
from stages.training.memory import scoring
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stages.context import Context
    from stages.data.ledger import RowLedger
    from stages.data.types import Dataset
    from stages.training.batch import Group


class Config(PassConfig):
    """Settings of the reference pass."""

    truncation_mode: TruncationMode = "keep_start"
    """What is done with longer rows; must be that of the stage that uses the result."""
    per_token: bool = False
    """Keep every token's log-probability besides the sums."""


def run(context: Context) -> None:
    """Score input `dataset` under input `model`."""
    from stages.data.dataset import read_dataset
    from stages.data.given_tokens import require_vocabulary
    from stages.data.ledger import RowLedger, say_dropped
    from stages.training.processes import prepare_process
    from stages.training.reference import UNPAIRED, score_rows
    from stages.training.reporting import peak_memory_gb
    from stages.training.start import frozen_scorer

    config: Config = context.config
    accelerator = prepare_process(context)
    context.phase("loading the model")
    scorer = frozen_scorer(context, "model", bf16=config.bf16).to(accelerator.device)
    dataset, ledger = read_dataset(context.input("dataset")), RowLedger()
    require_vocabulary(dataset, scorer.vocabulary)
    groups, names = _groups(context, dataset, RowLimit.of(config.max_length, scorer.context_length), ledger)
    say_dropped(context, ledger.states)
    scored = score_rows(context, accelerator, scorer, groups, config=config, per_token=config.per_token)
    if context.is_main:
        folder = context.output("logprobs")
        _write(folder, scored, groups, names, context.input_digest("model"))
        ledger.write(folder)
        context.counts["rows"] = len(scored)
        own = 1 if names == UNPAIRED else len(names)  # a mismatched completion says nothing about the rows
        tokens = sum(sum(row["tokens"][:own]) for row in scored)
        context.metrics["mean_logprob_per_token"] = sum(sum(row["sums"][:own]) for row in scored) / max(1, tokens)
        context.timings["peak_memory_gb"] = peak_memory_gb()


def _groups(
    context: Context, dataset: Dataset, longest: int, ledger: RowLedger
) -> tuple[Sequence[Group], tuple[str, ...]]:
    """(the rows, names of the completions of each)."""
    from stages.data.pairs import tokenize_pairs
    from stages.data.tokenize import tokenize_sequences
    from stages.data.types import PAIRED
    from stages.data.unpaired import mismatched, tokenize_unpaired
    from stages.training.language_modeling import sequence_group
    from stages.training.pairs import pair_group
    from stages.training.reference import PAIR, UNPAIRED
    from stages.training.start import tokenizer_of
    from stages.training.unpaired import judged_groups, scored_groups

    tokenizer = tokenizer_of(context, "model")
    limits: Any = {"max_length": longest, "truncation_mode": context.config.truncation_mode, "ledger": ledger}
    if dataset.type in PAIRED:
        return [pair_group(pair) for pair in tokenize_pairs(dataset, tokenizer, **limits)], PAIR
    if dataset.type == "unpaired_preference":
        judged = tokenize_unpaired(dataset, tokenizer, **limits)
        others = mismatched(judged, longest)
        return scored_groups(judged_groups(judged, others)), UNPAIRED if others is not None else UNPAIRED[:1]
    rows = tokenize_sequences(dataset, tokenizer, **limits)
    return [sequence_group(row) for row in rows], ("completion",)


def _write(
    folder: Path, rows: list[dict[str, Any]], groups: Sequence[Group], names: tuple[str, ...], model: str
) -> None:
    """`model`: the digest of the one whose log-probabilities they are."""
    from stages.training.reference import write_references
    from stages.training.row_digest import branches_sha256

    digests = [branches_sha256(group) for group in groups]
    columns: dict[str, list[Any]] = {"row_id": [row["row_id"] for row in rows]}
    for branch, name in enumerate(names):
        columns[f"{name}_logps"] = [row["sums"][branch] for row in rows]
        columns[f"{name}_tokens"] = [row["tokens"][branch] for row in rows]
        columns[f"{name}_sha256"] = [row[branch] for row in digests]
        if "logprobs" in rows[0]:
            columns[f"{name}_token_logps"] = [row["logprobs"][branch] for row in rows]
    write_references(folder, columns, model)


def memory(request: Request) -> list[Phase]:
    """One pass after another. A pair may share no token."""
    work = request.passes(row=2 * request.longest, rows=request.config.shard_rows)
    return [scoring(request.model, request.setup, work, bf16=request.config.bf16)]


STAGE = Stage(
    name="reference_logprobs",
    version=4,
    config=Config,
    inputs={
        "model": Input(MODELS),
        "dataset": Input(("dataset",), types=(*SEQUENCE_TYPES, *PAIRED, "unpaired_preference")),
    },
    outputs={"logprobs": "logprobs"},
    run=run,
    summary="log-probabilities of the completions under a fixed model, resumable by shard",
    main_metric="mean_logprob_per_token",
    memory=memory,
)
