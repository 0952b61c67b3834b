"""Preference optimization: raise chosen over rejected completions, held to a reference or without one (DPO and kin)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.stage import MODELS, Input, Stage
from stages.training.config import policy_outputs
from stages.training.memory import Phase, Request, reference_scoring, same_shape, training_step
from stages.training.memory_head import HeadUse
from stages.training.preference_config import PreferenceConfig, check, names_of

if TYPE_CHECKING:
    from stages.context import Context
    from stages.data.pairs import TokenizedPair
    from stages.training.loop import Trainer
    from stages.training.objective import Windows
    from stages.training.pairs import Reference

Config = PreferenceConfig


def run(context: Context) -> None:
    """Train input `model` on the pairs of input `dataset`.

    The reference, where the loss has one, is input `reference_logprobs`, or input `reference`, or the input model
    itself; the latter two are computed once at the start and then leave memory. With adapters the input model is there
    already, and no second one is loaded.
    """
    from stages.data.dataset import read_dataset
    from stages.data.given_tokens import require_vocabulary
    from stages.data.ledger import RowLedger
    from stages.data.pairs import tokenize_pairs
    from stages.data.truncation import RowLimit
    from stages.training.export import export
    from stages.training.pair_losses import following_reference, pair_loss, pair_settings
    from stages.training.pair_windows import CoupledWindows
    from stages.training.pairs import NO_REFERENCE, pair_group
    from stages.training.preference import PreferenceLoss
    from stages.training.start import start
    from stages.training.windows import DatasetWindows

    config: Config = context.config
    loss, settings = pair_loss(config), pair_settings(config)
    trainer, tokenizer = start(context, config, PreferenceLoss(loss, settings))
    ledger = RowLedger()
    dataset = read_dataset(context.input("dataset"))
    gold = any(one.gold for one in config.losses)
    _require_gold(config, dataset.type)
    require_vocabulary(dataset, trainer.scorer.vocabulary)
    pairs = tokenize_pairs(
        dataset,
        tokenizer,
        max_length=RowLimit.of(config.max_length, trainer.scorer.context_length),
        ledger=ledger,
        truncation_mode=config.truncation_mode,
    )
    fixed = config.needs_reference and not config.sync_ref_model
    references = _references(context, trainer, pairs) if fixed else [NO_REFERENCE] * len(pairs)
    groups = [pair_group(pair, one, with_gold=gold) for pair, one in zip(pairs, references, strict=True)]
    context.counts["pairs"] = len(groups)
    windows: Windows = DatasetWindows(groups, config)
    if config.sync_ref_model:
        windows = following_reference(context, trainer, windows, settings)
    if any(one.couples_rows for one in config.losses):
        windows = CoupledWindows(windows, trainer, settings, loss)
    trained = trainer.run(windows, ledger.states)
    export(context, trained, ledger.to_json())


def _require_gold(config: Config, dataset_type: str) -> None:
    from artifacts.errors import DataError

    needing = [loss for loss in config.losses if loss.gold]
    if needing and dataset_type != "triple_preference":
        raise DataError(
            f"loss_type {names_of(needing)} takes triple preferences, the dataset is of type {dataset_type}: normalize "
            "the source with type: triple_preference"
        )


def _references(context: Context, trainer: Trainer, pairs: Sequence[TokenizedPair]) -> list[Reference]:
    """Of every pair, from the artifact or computed here."""
    from stages.training.initial import reference_of
    from stages.training.pairs import pair_group
    from stages.training.reference import pair_references, read_references, score_rows

    config: Config = context.config
    plain = [pair_group(pair) for pair in pairs]
    if context.has("reference_logprobs"):
        return read_references(context.input("reference_logprobs"), plain, ld_alpha=config.ld_alpha)
    context.phase("log-probabilities of the reference")
    with reference_of(context, trainer)() as scorer:
        rows = score_rows(
            context,
            trainer.accelerator,
            scorer,
            plain,
            config=config,
            per_token=config.ld_alpha is not None,
        )
    return pair_references(rows, config.ld_alpha)


def memory(request: Request) -> list[Phase]:
    """The pass of the reference, where it is not precomputed, and the steps. A pair may share no token."""
    config = request.config
    completions = 3 if any(loss.gold for loss in config.losses) else 2
    work = request.passes(row=completions * request.longest, rows=config.train_batch_size)
    reference = request.models.get("reference", request.model)
    follower = 4.0 * reference.parameters if config.sync_ref_model else 0.0
    step = training_step(request.training, work, HeadUse(together=True), reference=follower)
    return [step, *(reference_scoring(request) if config.needs_reference and not config.sync_ref_model else ())]


STAGE = Stage(
    name="preference",
    version=5,
    config=Config,
    inputs={
        "model": Input(MODELS),
        "dataset": Input(("dataset",)),
        "reference_logprobs": Input(("logprobs",), required=False),
        "reference": Input(MODELS, required=False),
    },
    outputs={"model": "model", "adapter": "adapter"},
    active_outputs=policy_outputs,
    run=run,
    summary="preference pairs, against a reference or without: DPO, IPO, APO, AOT, SimPO, ORPO, TPO and relatives",
    check=check,
    main_metric="rewards/accuracies",
    memory=memory,
    shapes=same_shape,
)
