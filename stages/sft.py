"""Supervised fine-tuning: next-token loss on the tokens that the dataset says the model should produce."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from stages.data.truncation import RowLimit, TruncationMode
from stages.data.types import SEQUENCE_TYPES
from stages.losses.supervised import SUPERVISED_LOSSES
from stages.stage import MODELS, Input, Stage
from stages.training.config import MeasuredConfig, PolicyConfig, check_measured, policy_outputs
from stages.training.memory import same_shape, training_step
from stages.training.memory_head import HeadUse
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request

if TYPE_CHECKING:
    from stages.context import Context
    from stages.data.ledger import RowLedger
    from stages.data.tokenize import TokenizedSequence
    from stages.data.types import Dataset
    from stages.training.batch import Group
    from stages.training.objective import Windows

    LossName = str
else:  # the table of losses is what may be chosen
    LossName = Literal[tuple(SUPERVISED_LOSSES)]

Weight = Annotated[float, Field(ge=0)]


class Config(PolicyConfig, MeasuredConfig):
    """Settings of supervised fine-tuning."""

    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate."""
    max_length: int = Field(1024, gt=1)
    """Longest row in tokens; what is done with longer ones says truncation_mode, the ledger counts them."""
    truncation_mode: TruncationMode = "keep_start"
    """Of longer rows, keep the first max_length tokens, or the last (keep_end); or drop them; or stop (error)."""
    completion_only_loss: bool | None = None
    """Train on the completion only; null: yes where the rows have a prompt and a completion."""
    assistant_only_loss: bool = False
    """Train on what the assistant says only: by the chat template's generation markers, or as it is seen to render."""
    packing: bool = False
    """Count packs of rows with max_length tokens, not rows, as the items of train_batch_size: steps of equal size. No
    row sees another one of its pack."""
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = "bfd"
    """bfd: best-fit decreasing, longer rows cut; bfd_split: longer rows go on in another piece; wrapped: all rows one
    after the other, cut every max_length tokens (rows see each other)."""
    loss_type: LossName = "nll"
    """nll: cross-entropy; dft: each token also weighs its own probability."""
    neftune_noise_alpha: float | None = Field(None, gt=0)
    """NEFTune: size of the uniform noise on embeddings while training, before division by sqrt(length x hidden)."""
    weight_column: str | None = None
    """Column with a number a row: its weight in the loss. Rows of input `eval_dataset` weigh 1 all, whatever is said
    here, so that runs with other weights can be compared."""
    source_column: str = "source"
    """Column that `source_weights` looks at."""
    source_weights: dict[str, Weight] = Field(default={})
    """Value of `source_column` -> weight of its rows in the loss; where given, every value that occurs is named. Not of
    the rows of input `eval_dataset`, as above."""


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration."""
    if config.packing_strategy != "bfd" and not config.packing:
        return ["packing_strategy is given, but packing is false, so it would not be used"]
    if config.packing and config.packing_strategy != "bfd" and config.truncation_mode != "keep_start":
        return [
            f"truncation_mode is given, but packing_strategy {config.packing_strategy} cuts no row off, so it would "
            f"not be used"
        ]
    weighted = config.weight_column is not None or bool(config.source_weights)
    if config.packing and config.packing_strategy == "wrapped" and weighted:
        return ["weights of rows need rows; packing_strategy wrapped knows none: take bfd or bfd_split"]
    if config.source_column != "source" and not config.source_weights:
        return ["source_column is given, but source_weights is not, so it would not be used"]
    return check_measured(config, wired)


def run(context: Context) -> None:
    """Train input `model` on input `dataset`, and measure it on input `eval_dataset` meanwhile."""
    from stages.data.dataset import read_dataset
    from stages.data.given_tokens import require_vocabulary
    from stages.data.ledger import RowLedger
    from stages.data.weights import row_weights, without_idle_rows
    from stages.training.export import export
    from stages.training.held_out import HeldOut
    from stages.training.language_modeling import NoisyWindows, TokenLoss
    from stages.training.start import start
    from stages.training.windows import DatasetWindows

    config: Config = context.config
    objective = TokenLoss(SUPERVISED_LOSSES[config.loss_type].function, config.neftune_noise_alpha)
    trainer, tokenizer = start(context, config, objective, own_dropout=True)
    ledger, dataset = RowLedger(), read_dataset(context.input("dataset"))
    require_vocabulary(dataset, trainer.scorer.vocabulary)
    weights = row_weights(dataset, config.weight_column, config.source_column, config.source_weights)
    if weights is not None:
        dataset = without_idle_rows(dataset, weights, ledger)
    longest = RowLimit.of(config.max_length, trainer.scorer.context_length)
    rows = tokenized(config, dataset, tokenizer, trainer.scorer.context_length, ledger)
    held_out = HeldOut.of(
        context,
        trainer.scorer.vocabulary,
        lambda dataset, ledger: [_group(row) for row in _sequences(config, dataset, tokenizer, longest, ledger)],
        [_group(row) for row in rows],
    )
    packs = None
    if config.packing:
        rows, packs = _packed(context, rows, longest, ledger)
    groups = [_group(row, weights) for row in rows]
    context.counts["rows"] = len(groups)
    windows: Windows = DatasetWindows(groups, config, packs)
    if config.neftune_noise_alpha is not None:
        windows = NoisyWindows(windows, config.seed)
    trained = trainer.run(windows, ledger.states, held_out)
    export(context, trained, ledger.to_json())


def tokenized(
    config: Config, dataset: Dataset, tokenizer: Any, context_length: int, ledger: RowLedger
) -> list[TokenizedSequence]:
    """The rows before they are packed, where that cuts them."""
    longest = RowLimit.of(config.max_length, context_length)
    whole = not config.packing or config.packing_strategy == "bfd"
    return _sequences(config, dataset, tokenizer, longest if whole else None, ledger)


def _sequences(
    config: Config, dataset: Dataset, tokenizer: Any, longest: int | None, ledger: RowLedger
) -> list[TokenizedSequence]:
    from stages.data.tokenize import tokenize_sequences

    return tokenize_sequences(
        dataset,
        tokenizer,
        max_length=longest,
        ledger=ledger,
        assistant_only_loss=config.assistant_only_loss,
        completion_only_loss=config.completion_only_loss,
        truncation_mode=config.truncation_mode,
    )


def _group(row: TokenizedSequence, weights: Mapping[str, float] | None = None) -> Group:
    """`weights`: of the rows by id; one may be in pieces."""
    from stages.training.language_modeling import RowSettings, sequence_group

    settings = None if weights is None else RowSettings(weights[row.row_id.partition("#")[0]])
    return sequence_group(row, settings)


def _packed(
    context: Context, rows: list[TokenizedSequence], longest: int, ledger: RowLedger
) -> tuple[list[TokenizedSequence], list[list[int]]]:
    """(rows, or pieces of them, indices of those in each pack)."""
    from stages.data.packing import best_fit_decreasing, fill, split, wrap

    strategy = context.config.packing_strategy
    if strategy == "wrapped":
        rows = wrap(rows, longest, ledger)
    elif strategy == "bfd_split":
        rows = split(rows, longest, ledger)
    lengths = [len(row.token_ids) for row in rows]
    packs = best_fit_decreasing(lengths, longest)
    context.counts["packs"] = len(packs)
    context.log(
        f"{len(rows)} rows in {len(packs)} packs of {longest} tokens, {fill(lengths, len(packs), longest):.1%} full"
    )
    return rows, packs


def memory(request: Request) -> list[Phase]:
    """One step after another."""
    # a pack is at most as long as a row may be
    work = request.passes(row=request.longest, rows=request.config.train_batch_size)
    return [training_step(request.training, work, HeadUse())]


STAGE = Stage(
    name="sft",
    version=4,
    config=Config,
    inputs={
        "model": Input(MODELS),
        "dataset": Input(("dataset",), types=SEQUENCE_TYPES),
        "eval_dataset": Input(("dataset",), types=SEQUENCE_TYPES, required=False),
    },
    outputs={"model": "model", "adapter": "adapter"},
    active_outputs=policy_outputs,
    run=run,
    check=check,
    summary="supervised fine-tuning, full or LoRA",
    main_metric="loss",
    memory=memory,
    shapes=same_shape,
    tokenized=tokenized,
)
