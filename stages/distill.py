"""Distillation: a student learns a teacher's token distributions, on its own completions or on given ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from stages.stage import MODELS, Input, Stage
from stages.training.config import PolicyConfig, policy_outputs
from stages.training.memory import Phase, Request, same_shape, training_step
from stages.training.memory_head import HeadUse
from stages.training.memory_sampling import Sampled, sampling

if TYPE_CHECKING:
    from stages.context import Context


class Config(PolicyConfig):
    """Settings of distillation. An item of train_batch_size is a prompt with one completion."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW."""
    beta: float = Field(1.0, ge=0, le=1)
    """0: forward KL (teacher to student), 1: reverse KL, between: generalized Jensen-Shannon divergence."""
    lmbda: float = Field(1.0, ge=0, le=1)
    """Share of steps on the student's own completions; the others use the dataset's."""
    temperature: float = Field(1.0, gt=0)
    """Divides both models' logits, and the student's when it samples."""
    max_completion_length: int = Field(256, gt=0)
    """Most tokens of a sampled completion."""
    max_length: int = Field(1024, gt=1)
    """Longest row in tokens (prompt, where completions are sampled)."""


def run(context: Context) -> None:
    """Train input `model` (the student) towards input `teacher` on input `dataset`."""
    from stages.data.dataset import read_dataset
    from stages.data.ledger import RowLedger
    from stages.losses.distillation import divergence_of
    from stages.training.distill_windows import distill_windows, require_same_vocabulary
    from stages.training.distillation import DistillationLoss
    from stages.training.export import export
    from stages.training.start import frozen_scorer, start, tokenizer_of

    config: Config = context.config
    teacher = frozen_scorer(context, "teacher")
    objective = DistillationLoss(teacher, divergence_of(config.beta), config.temperature)
    trainer, tokenizer = start(context, config, objective)
    require_same_vocabulary(tokenizer, tokenizer_of(context, "teacher"))
    share = trainer.scorer.share_prefixes and teacher.share_prefixes
    trainer.scorer.share_prefixes = teacher.share_prefixes = share
    teacher.to(trainer.accelerator.device)
    ledger = RowLedger()
    windows = distill_windows(context, config, trainer, tokenizer, read_dataset(context.input("dataset")), ledger)
    trained = trainer.run(windows, ledger.states)
    export(context, trained, ledger.to_json(), samples=windows.samples)


def memory(request: Request) -> list[Phase]:
    """Sampling, where the student's completions are used, and the steps with the teacher beside them."""
    config, training, teacher = request.config, request.training, request.models["teacher"]
    own = config.max_completion_length if config.lmbda > 0 else 0
    row = min(request.longest + own, request.model.context)
    others = 4.0 * teacher.parameters + (training.policy_copy() if own else 0)
    work = request.passes(row=row, rows=config.train_batch_size)
    phases = [training_step(training, work, HeadUse(teacher=teacher), reference=others)]
    if own:
        state = training.state()
        resident = {"weights": state["weights"], "optimizer": state["optimizer"], "reference": others}
        asked = Sampled(-(-config.train_batch_size // request.setup.processes), max(1, row - own), own)
        phases.append(sampling(request.model, request.setup, asked, number=training.weight, resident=resident))
    return phases


STAGE = Stage(
    name="distill",
    version=2,
    config=Config,
    inputs={"model": Input(MODELS), "teacher": Input(MODELS), "dataset": Input(("dataset",))},
    outputs={"model": "model", "adapter": "adapter"},
    active_outputs=policy_outputs,
    run=run,
    summary="a student learns a teacher's distributions, on-policy or off-policy",
    main_metric="divergence",
    memory=memory,
    shapes=same_shape,
)
