"""Learning from completions that were judged one by one, desirable or not: KTO, BCO and unpaired APO."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.data.truncation import RowLimit
from stages.data.types import PAIRED
from stages.losses.unpaired import UNPAIRED_LOSSES
from stages.stage import MODELS, Input, Stage
from stages.training.config import MeasuredConfig, PolicyConfig, check_measured, policy_outputs
from stages.training.length_settings import ReferencedConfig, one_reference
from stages.training.memory import reference_scoring, same_shape, training_step
from stages.training.memory_head import HeadUse
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request

if TYPE_CHECKING:
    from stages.context import Context
    from stages.data.ledger import RowLedger
    from stages.data.types import Dataset
    from stages.data.unpaired import TokenizedCompletion
    from stages.training.batch import Group
    from stages.training.loop import Trainer
    from stages.training.objective import Windows

    LossName = str
else:  # the table of losses is what may be chosen
    LossName = Literal[tuple(UNPAIRED_LOSSES)]


class Config(ReferencedConfig, PolicyConfig, MeasuredConfig):
    """Settings of learning from judged completions."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    loss_type: LossName = "kto"
    """One of the unpaired losses in docs/training.md."""
    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to the reference."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of desirable completions (kto, apo_zero_unpaired)."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of undesirable completions (kto, apo_zero_unpaired)."""
    use_density_ratio: bool = False
    """Weigh undesirable completions by how much their prompt looks like a desirable one's (bco)."""
    prompt_sample_size: int = Field(1024, gt=0)
    """Prompts of each kind that the density ratio is learnt from, at most."""
    min_density_ratio: float = Field(0.5, gt=0)
    """Smaller density ratios count as this."""
    max_density_ratio: float = Field(10.0, gt=0)
    """Larger density ratios count as this."""


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration and the inputs together."""
    problems = one_reference(wired)
    weights = (config.desirable_weight, config.undesirable_weight)
    if "desirable_weight" not in UNPAIRED_LOSSES[config.loss_type].parameters and weights != (1.0, 1.0):
        takers = ", ".join(loss.name for loss in UNPAIRED_LOSSES.values() if "desirable_weight" in loss.parameters)
        problems.append(
            f"desirable_weight and undesirable_weight are of loss_type {takers}; {config.loss_type} has none"
        )
    if config.loss_type != "bco" and config.use_density_ratio:
        problems.append(f"use_density_ratio is of loss_type bco; {config.loss_type} has none")
    if not config.use_density_ratio:
        problems += [
            f"{name} is given, but use_density_ratio is false, so it would not be used"
            for name in ("prompt_sample_size", "min_density_ratio", "max_density_ratio")
            if getattr(config, name) != type(config).model_fields[name].default
        ]
    if config.min_density_ratio > config.max_density_ratio:
        problems.append(
            f"min_density_ratio {config.min_density_ratio} is above max_density_ratio {config.max_density_ratio}"
        )
    if config.use_density_ratio and "eval_dataset" in wired:
        problems.append(
            "use_density_ratio weighs rows by the prompts of input dataset, so rows of eval_dataset have no weight; "
            "leave one of them out"
        )
    return problems + check_measured(config, wired)


def run(context: Context) -> None:
    """Train input `model` on the judged completions of input `dataset`, and measure it on those of input `eval_dataset`
    meanwhile; pairs count as one of each kind.

    The reference is input `reference_logprobs`, or input `reference`, or the input model itself; the latter two
    are computed once at the start and then leave memory.
    """
    from stages.data.dataset import read_dataset
    from stages.data.given_tokens import require_vocabulary
    from stages.data.ledger import RowLedger
    from stages.training.export import export
    from stages.training.held_out import HeldOut, together
    from stages.training.start import start
    from stages.training.unpaired import UnpairedLoss
    from stages.training.windows import DatasetWindows

    config: Config = context.config
    loss = UNPAIRED_LOSSES[config.loss_type].with_settings(config.model_dump())
    measured = {"kto": ("kl",), "bco": ("delta",)}.get(config.loss_type, ())
    trainer, tokenizer = start(context, config, UnpairedLoss(loss, config.beta, measured))
    context_length = trainer.scorer.context_length

    def groups_of(dataset: Dataset, ledger: RowLedger) -> list[Group]:
        rows = tokenized(config, dataset, tokenizer, context_length, ledger)
        return _judged(config, rows, RowLimit.of(config.max_length, context_length))

    ledger, vocabulary = RowLedger(), trainer.scorer.vocabulary
    groups = groups_of(require_vocabulary(read_dataset(context.input("dataset")), vocabulary), ledger)
    good = sum(group.data.desirable for group in groups)
    context.counts.update({"desirable": good, "undesirable": len(groups) - good})
    _advise(context, good, len(groups) - good)
    held_out = HeldOut.of(context, vocabulary, groups_of, groups)
    groups, held_out = together(groups, held_out, partial(_referenced, context, trainer))
    windows = _windows(trainer, DatasetWindows(groups, config), config)
    trained = trainer.run(windows, ledger.states, held_out)
    export(context, trained, ledger.to_json())


def tokenized(
    config: Config, dataset: Dataset, tokenizer: Any, context_length: int, ledger: RowLedger
) -> list[TokenizedCompletion]:
    """Each completion after its prompt."""
    from stages.data.unpaired import tokenize_unpaired

    longest = RowLimit.of(config.max_length, context_length)
    return tokenize_unpaired(
        dataset, tokenizer, max_length=longest, ledger=ledger, truncation_mode=config.truncation_mode
    )


def _windows(trainer: Trainer, windows: Windows, config: Config) -> Windows:
    """With what the loss knows beside single completions."""
    from stages.training.unpaired import KLWindows, ShiftWindows

    if config.loss_type == "kto":
        return KLWindows(windows, trainer)
    return ShiftWindows(windows, trainer, config.beta) if config.loss_type == "bco" else windows


def _judged(config: Config, rows: Sequence[TokenizedCompletion], longest: int) -> list[Group]:
    """Every completion, for kto with one of another prompt."""
    from artifacts.errors import DataError
    from stages.data.unpaired import mismatched
    from stages.training.unpaired import judged_groups

    others = mismatched(rows, longest) if config.loss_type == "kto" else None
    if others is None and config.loss_type == "kto":
        raise DataError(
            f"all {len(rows)} completions have one and the same prompt; the KL term of kto compares completions of "
            "different ones: choose another loss_type, or add rows"
        )
    return judged_groups(rows, others)


def _referenced(context: Context, trainer: Trainer, sets: Sequence[Sequence[Group]]) -> list[list[Group]]:
    """The completions that are trained on, and those apart, with all that the reference says of them."""
    from stages.training.density_ratio import with_densities
    from stages.training.initial import reference_of
    from stages.training.reference import LOGPROBS, read_unpaired, require_one_reference, score_rows
    from stages.training.unpaired import referenced, scored_groups

    config: Config = context.config
    named = [(name, scored_groups(groups)) for name, groups in zip(LOGPROBS, sets, strict=False)]
    scored: list[list[dict[str, Any]]] = []
    if known := context.has(LOGPROBS[0]):
        require_one_reference(context)
        scored = [read_unpaired(context, name, plain) for name, plain in named]
    if not known or config.use_density_ratio:
        context.phase("log-probabilities of the reference")
        with reference_of(context, trainer)() as scorer:
            if config.use_density_ratio:
                sets = [with_densities(scorer, sets[0], context, config)]
            if not known:
                scored = [
                    score_rows(context, trainer.accelerator, scorer, plain, config=config, shards=name)
                    for name, plain in named
                ]
    return [referenced(groups, rows) for groups, rows in zip(sets, scored, strict=True)]


def _advise(context: Context, good: int, bad: int) -> None:
    """KTO's authors: the weights times the numbers of both kinds stand as 1 to 1, up to 4 to 3."""
    config: Config = context.config
    if config.loss_type != "kto" or not (good and bad):
        return
    ratio = config.desirable_weight * good / (config.undesirable_weight * bad)
    if not 1.0 <= ratio <= 4 / 3:
        low, high = (factor * config.undesirable_weight * bad / good for factor in (1.0, 4 / 3))
        context.log(
            f"{good} desirable and {bad} undesirable completions: desirable_weight x {good} over undesirable_weight x "
            f"{bad} is {ratio:.2f}; 1 to 1.33 is what the paper advises, so desirable_weight {low:.2f} to {high:.2f}"
        )


def memory(request: Request) -> list[Phase]:
    """The pass of the reference, where it is not precomputed, and the steps. KTO's other completion stands apart."""
    config = request.config
    work = request.passes(row=request.longest, rows=config.train_batch_size)
    return [training_step(request.training, work, HeadUse(together=True)), *reference_scoring(request)]


STAGE = Stage(
    name="unpaired_preference",
    version=6,
    config=Config,
    inputs={
        "model": Input(MODELS),
        "dataset": Input(("dataset",), types=("unpaired_preference", *PAIRED)),
        "reference_logprobs": Input(("logprobs",), required=False),
        "reference": Input(MODELS, required=False),
        "eval_dataset": Input(("dataset",), types=("unpaired_preference", *PAIRED), required=False),
        "eval_reference_logprobs": Input(("logprobs",), required=False),
    },
    outputs={"model": "model", "adapter": "adapter"},
    active_outputs=policy_outputs,
    run=run,
    summary="completions judged one by one, desirable or not: KTO, BCO, unpaired APO",
    check=check,
    main_metric="rewards/chosen",
    memory=memory,
    shapes=same_shape,
    tokenized=tokenized,
)
