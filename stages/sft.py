"""Supervised fine-tuning: next-token loss on the tokens that the dataset says the model should produce."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from stages.stage import Input, Stage
from stages.training.config import TrainingConfig
from stages.training.memory import Phase, Request, same_shape, training_step
from stages.training.memory_head import HeadUse

if TYPE_CHECKING:
    from stages.context import Context


class Config(TrainingConfig):
    """Settings of supervised fine-tuning."""

    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate of AdamW."""
    max_length: int = Field(1024, gt=1)
    """Longest row in tokens; what is beyond is cut off and counted in the ledger."""
    completion_only_loss: bool | None = None
    """Train on the completion only; null: yes where the rows have a prompt and a completion."""
    assistant_only_loss: bool = False
    """Train on what the assistant says only; needs a chat template with generation markers."""


def run(context: Context) -> None:
    """Train input `model` on input `dataset`."""
    from stages.data.dataset import read_dataset
    from stages.data.ledger import RowLedger
    from stages.data.tokenize import tokenize_sequences
    from stages.training.batch import Branch, Group
    from stages.training.export import export
    from stages.training.language_modeling import TokenLoss
    from stages.training.start import start
    from stages.training.windows import DatasetWindows

    config: Config = context.config
    trainer, tokenizer = start(context, config, TokenLoss())
    ledger = RowLedger()
    rows = tokenize_sequences(
        read_dataset(context.input("dataset")),
        tokenizer,
        max_length=min(config.max_length, trainer.scorer.context_length),
        ledger=ledger,
        assistant_only_loss=config.assistant_only_loss,
        completion_only_loss=config.completion_only_loss,
    )
    groups = [Group(row.row_id, (), (Branch(row.token_ids, row.loss_mask),)) for row in rows]
    context.counts["rows"] = len(groups)
    trained = trainer.run(DatasetWindows(groups, config))
    export(context, trained, context.input("model"), ledger.to_json())


def memory(request: Request) -> list[Phase]:
    """One step after another."""
    work = request.passes(row=request.longest, rows=request.config.train_batch_size)
    return [training_step(request.training, work, HeadUse())]


STAGE = Stage(
    name="sft",
    version=1,
    config=Config,
    inputs={"model": Input(("model",)), "dataset": Input(("dataset",))},
    outputs={"model": "model"},
    run=run,
    summary="supervised fine-tuning, full or LoRA",
    main_metric="loss",
    memory=memory,
    shapes=same_shape,
)
