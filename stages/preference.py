"""Preference optimization: raise chosen over rejected completions relative to a fixed reference (DPO and relatives)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.stage import Input, Stage, operational
from stages.training.config import TrainingConfig
from stages.training.memory import Phase, Request, same_shape, scoring, training_step
from stages.training.memory_head import HeadUse

if TYPE_CHECKING:
    from stages.context import Context


class Config(TrainingConfig):
    """Settings of preference optimization."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """sigmoid: DPO; hinge: SLiC; ipo: IPO, on log-ratios per token."""
    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to the reference."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a label is wrong (conservative DPO); sigmoid only."""
    max_length: int = Field(1024, gt=1)
    """Longest prompt with completion in tokens; what is beyond is cut off and counted in the ledger."""
    shard_rows: int = operational(256, gt=0)
    """Rows of the reference pass that are saved at a time, where the reference is not precomputed."""


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration and the inputs together."""
    problems = []
    if {"reference_logprobs", "reference"} <= wired:
        problems.append("inputs reference_logprobs and reference exclude each other; wire one of them")
    if config.label_smoothing and config.loss_type != "sigmoid":
        problems.append(f"label_smoothing is of loss_type sigmoid; {config.loss_type} has none")
    return problems


def run(context: Context) -> None:
    """Train input `model` on the pairs of input `dataset`.

    The reference is input `reference_logprobs`, or input `reference`, or the input model itself; the latter two
    are computed once at the start and then leave memory.
    """
    from functools import partial

    from stages.data.dataset import read_dataset
    from stages.data.ledger import RowLedger
    from stages.data.pairs import tokenize_pairs
    from stages.losses.preference import PREFERENCE_LOSSES, PairLogprobs
    from stages.training.export import export
    from stages.training.pairs import PreferenceLoss, Reference, pair_group
    from stages.training.reference import read_references, score_rows
    from stages.training.start import frozen_scorer, start
    from stages.training.windows import DatasetWindows

    config: Config = context.config
    smoothing = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
    loss = partial(PREFERENCE_LOSSES[config.loss_type], beta=config.beta, **smoothing)
    loss(PairLogprobs.example())
    trainer, tokenizer = start(context, config, PreferenceLoss(loss, config.beta))
    ledger = RowLedger()
    pairs = tokenize_pairs(
        read_dataset(context.input("dataset")),
        tokenizer,
        max_length=min(config.max_length, trainer.scorer.context_length),
        ledger=ledger,
    )
    plain = [pair_group(pair) for pair in pairs]
    if context.has("reference_logprobs"):
        references = read_references(context.input("reference_logprobs"), plain)
    else:
        context.phase("log-probabilities of the reference")
        scorer = frozen_scorer(context, "reference" if context.has("reference") else "model")
        rows = score_rows(
            context,
            trainer.accelerator,
            scorer.to(trainer.accelerator.device),
            plain,
            config=config,
        )
        references = [Reference(*row["sums"]) for row in rows]
        del scorer
    groups = [pair_group(pair, reference) for pair, reference in zip(pairs, references, strict=True)]
    context.counts["pairs"] = len(groups)
    trained = trainer.run(DatasetWindows(groups, config))
    export(context, trained, context.input("model"), ledger.to_json())


def memory(request: Request) -> list[Phase]:
    """The pass of the reference, where it is not precomputed, and the steps. A pair may share no token."""
    config, pair = request.config, 2 * request.longest
    work = request.passes(row=pair, rows=config.train_batch_size)
    phases = [training_step(request.training, work, HeadUse(together=True))]
    if "reference_logprobs" not in request.wired:
        scored = request.passes(row=pair, rows=config.shard_rows)
        weights = {"weights": request.training.state()["weights"]}
        reference = request.models.get("reference", request.model)
        phases.append(scoring(reference, request.setup, scored, resident=weights, own="reference"))
    return phases


STAGE = Stage(
    name="preference",
    version=1,
    config=Config,
    inputs={
        "model": Input(("model",)),
        "dataset": Input(("dataset",)),
        "reference_logprobs": Input(("logprobs",), required=False),
        "reference": Input(("model",), required=False),
    },
    outputs={"model": "model"},
    run=run,
    summary="DPO, IPO, SLiC: preference pairs against a fixed reference",
    check=check,
    main_metric="rewards/accuracies",
    memory=memory,
    shapes=same_shape,
)
