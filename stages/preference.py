"""Preference optimization: raise chosen over rejected completions, held to a reference or without one (DPO and kin)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from stages.data.pairs import pairs_of
from stages.data.types import PAIRED
from stages.stage import MODELS, Input, Stage
from stages.training.config import policy_outputs
from stages.training.memory import reference_scoring, same_shape, training_step
from stages.training.memory_head import HeadUse
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request
from stages.training.preference_config import PreferenceConfig, check, names_of

if TYPE_CHECKING:
    from stages.context import Context
    from stages.data.ledger import RowLedger
    from stages.data.types import Dataset
    from stages.training.batch import Group
    from stages.training.loop import Trainer
    from stages.training.objective import Windows

Config = PreferenceConfig


def run(context: Context) -> None:
    """Train input `model` on the pairs of input `dataset`, and measure it on those of input `eval_dataset` meanwhile.

    The reference, where the loss has one, is input `reference_logprobs`, or input `reference`, or the input model
    itself; the latter two are computed once at the start and then leave memory. With adapters the input model is there
    already, and no second one is loaded.
    """
    from stages.data.dataset import read_dataset
    from stages.data.given_tokens import require_vocabulary
    from stages.data.ledger import RowLedger
    from stages.training.export import export
    from stages.training.held_out import HeldOut, together
    from stages.training.pair_losses import pair_loss, pair_settings
    from stages.training.pairs import NO_REFERENCE, pair_group
    from stages.training.preference import PreferenceLoss
    from stages.training.start import start
    from stages.training.windows import DatasetWindows

    config: Config = context.config
    trainer, tokenizer = start(context, config, PreferenceLoss(pair_loss(config), pair_settings(config)))
    gold = any(one.gold for one in config.losses)

    def groups_of(dataset: Dataset, ledger: RowLedger) -> list[Group]:
        _require_gold(config, dataset.type)
        pairs = pairs_of(config, dataset, tokenizer, trainer.scorer.context_length, ledger)
        return [pair_group(pair, NO_REFERENCE, with_gold=gold) for pair in pairs]

    ledger, vocabulary = RowLedger(), trainer.scorer.vocabulary
    groups = groups_of(require_vocabulary(read_dataset(context.input("dataset")), vocabulary), ledger)
    context.counts["pairs"] = len(groups)
    held_out = HeldOut.of(context, vocabulary, groups_of, groups)
    if config.needs_reference and not config.sync_ref_model:
        groups, held_out = together(groups, held_out, partial(_referenced, context, trainer))
    windows = _windows(context, trainer, DatasetWindows(groups, config))
    trained = trainer.run(windows, ledger.states, held_out)
    export(context, trained, ledger.to_json())


def _windows(context: Context, trainer: Trainer, windows: Windows) -> Windows:
    """With what the loss knows beside a fixed reference and single pairs."""
    from stages.training.pair_losses import following_reference, pair_loss, pair_settings
    from stages.training.pair_windows import CoupledWindows

    config: Config = context.config
    settings = pair_settings(config)
    if config.sync_ref_model:
        windows = following_reference(context, trainer, windows, settings)
    if any(one.couples_rows for one in config.losses):
        windows = CoupledWindows(windows, trainer, settings, pair_loss(config))
    return windows


def _require_gold(config: Config, dataset_type: str) -> None:
    from artifacts.errors import DataError

    needing = [loss for loss in config.losses if loss.gold]
    if needing and dataset_type != "triple_preference":
        raise DataError(
            f"loss_type {names_of(needing)} takes triple preferences, the dataset is of type {dataset_type}: normalize "
            "the source with type: triple_preference"
        )


def _referenced(context: Context, trainer: Trainer, sets: Sequence[Sequence[Group]]) -> list[list[Group]]:
    """The pairs that are trained on, and those apart, with their references from the artifacts or computed here."""
    from stages.training.initial import reference_of
    from stages.training.reference import (
        LOGPROBS,
        pair_references,
        read_references,
        require_one_reference,
        score_rows,
    )

    config: Config = context.config
    named = [
        (name, [replace(group, branches=group.branches[:2], data=None) for group in groups])
        for name, groups in zip(LOGPROBS, sets, strict=False)
    ]
    if context.has(LOGPROBS[0]):
        require_one_reference(context)
        found = [read_references(context, name, plain, ld_alpha=config.ld_alpha) for name, plain in named]
    else:
        context.phase("log-probabilities of the reference")
        with reference_of(context, trainer)() as scorer:
            scored = [
                score_rows(
                    context,
                    trainer.accelerator,
                    scorer,
                    plain,
                    config=config,
                    per_token=config.ld_alpha is not None,
                    shards=name,
                )
                for name, plain in named
            ]
        found = [pair_references(rows, config.ld_alpha) for rows in scored]
    return [
        [replace(group, data=one) for group, one in zip(groups, references, strict=True)]
        for groups, references in zip(sets, found, strict=True)
    ]


def memory(request: Request) -> list[Phase]:
    """The pass of the reference, where it is not precomputed, and the steps. A pair may share no token."""
    config = request.config
    completions = 3 if any(loss.gold for loss in config.losses) else 2
    work = request.passes(row=completions * request.longest, rows=config.train_batch_size)
    reference = request.models.get("reference", request.model)
    follower = request.following(reference) if config.sync_ref_model else 0.0
    step = training_step(request.training, work, HeadUse(together=True), reference=follower)
    return [step, *(reference_scoring(request) if config.needs_reference and not config.sync_ref_model else ())]


STAGE = Stage(
    name="preference",
    version=8,
    config=Config,
    inputs={
        "model": Input(MODELS),
        "dataset": Input(("dataset",), types=PAIRED),
        "reference_logprobs": Input(("logprobs",), required=False),
        "reference": Input(MODELS, required=False),
        "eval_dataset": Input(("dataset",), types=PAIRED, required=False),
        "eval_reference_logprobs": Input(("logprobs",), required=False),
    },
    outputs={"model": "model", "adapter": "adapter"},
    active_outputs=policy_outputs,
    run=run,
    summary="preference pairs, against a reference or without: DPO, IPO, APO, AOT, SimPO, ORPO, TPO and relatives",
    check=check,
    main_metric="rewards/accuracies",
    memory=memory,
    shapes=same_shape,
    tokenized=pairs_of,
)
