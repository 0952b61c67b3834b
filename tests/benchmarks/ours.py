"""posttrain's own engine: its objectives through its Trainer, as the stages start them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from stages.context import Context, local_context
from stages.held import Held
from stages.losses.distillation import divergence_of
from stages.losses.policy import POLICY_LOSSES
from stages.losses.preference import sigmoid
from stages.training.batch import Branch, Group
from stages.training.classifiers import load_reward_model
from stages.training.distillation import DistillationLoss
from stages.training.kept_teacher import KeptTeacher, keep_states, write_kept
from stages.training.language_modeling import TokenLoss
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.objective import Objective, Window
from stages.training.out_of_memory import TokenBudget
from stages.training.pairs import Reference, RewardLoss
from stages.training.policy import PolicyLoss
from stages.training.policy_known import Rollouts
from stages.training.policy_terms import PolicySettings
from stages.training.preference import PairSettings, PreferenceLoss
from stages.training.processes import prepare_process
from stages.training.reference import branch_logprobs
from stages.training.start import frozen_scorer, settle_packing, start
from stages.training.state_files import StateFiles
from stages.training.teachers import LocalTeacher
from tests.benchmarks.cases import Case
from tests.benchmarks.folder import CaseFolder
from tests.benchmarks.models import BETA, EPSILON, SETTINGS
from tests.benchmarks.recorder import Recorder
from tests.benchmarks.rows import PAD, Row, make_rows

GPU_BATCH_TOKENS = 16_384
StepOf = Callable[[Sequence[Row]], dict[str, Any]]
"""Rows of a step -> what the parity gate compares."""


def run(case: Case, steps: Sequence[Sequence[Row]], folder: CaseFolder, recorder: Recorder) -> None:
    """Every step in turn."""
    step = STAGES[case.stage](case, folder)
    recorder.begin()
    for rows in steps:
        recorder.done(step(rows))


class Training:
    """A Trainer with groups made of a step's rows."""

    def __init__(self, trainer: Trainer, case: Case, group: Callable[[Row], Group]) -> None:
        self.trainer, self.case, self.group, self.done = trainer, case, group, 0

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """One optimizer step."""
        row, _ = self.trainer.step(self.done, self.case.steps, Window([self.group(one) for one in rows]))
        self.done += 1
        return {"loss": row["loss"], "grad_norm": row["grad_norm"]}


def _sft(case: Case, folder: CaseFolder) -> StepOf:
    context = _context("sft", case, folder)
    return Training(_trainer(context, TokenLoss()), case, _sequence)


def _reference(case: Case, folder: CaseFolder) -> StepOf:
    context = _context("reference_logprobs", case, folder)
    accelerator = prepare_process(context)
    scorer = frozen_scorer(context, "model", bf16=case.bf16).to(accelerator.device)
    budget = TokenBudget(context, context.config.micro_batch_tokens)

    def score(rows: Sequence[Row]) -> dict[str, Any]:
        scored = branch_logprobs(scorer, [_branches(row) for row in rows], budget)
        return {"logprobs": [total for branches in scored for _, total in branches]}

    return score


def _dpo(case: Case, folder: CaseFolder) -> StepOf:
    loss = partial(sigmoid, beta=BETA)
    trainer = _trainer(_context("preference", case, folder), PreferenceLoss(loss, PairSettings(BETA)))
    references = folder.references()
    return Training(trainer, case, lambda row: _branches(row, Reference(*references[row.row_id])))


def _reward(case: Case, folder: CaseFolder) -> StepOf:
    context = _context("reward_model", case, folder)
    accelerator = prepare_process(context)

    def build() -> Scorer:
        model = load_reward_model(context.input("model"))
        model.config.pad_token_id = PAD
        return Scorer(model)

    scorer = build()
    settle_packing(context, scorer)
    trainer = Trainer(context, context.config, accelerator, scorer, RewardLoss(0.0), build)
    return Training(trainer, case, _branches)


def _grpo(case: Case, folder: CaseFolder) -> StepOf:
    settings = PolicySettings(
        loss=POLICY_LOSSES["dapo"],
        temperature=1.0,
        max_completion_length=case.completion_tokens,
        tolerance=None,
        parameters={"epsilon": EPSILON},
    )
    return Training(_trainer(_context("rl", case, folder), PolicyLoss(settings)), case, _rollouts)


def _distill(case: Case, folder: CaseFolder) -> StepOf:
    context = _context("distill", case, folder, teacher=folder.teacher)
    teacher = LocalTeacher(frozen_scorer(context, "teacher", bf16=case.bf16), None, 1.0)
    trainer = _trainer(context, DistillationLoss(teacher, divergence_of(1.0), 1.0))
    teacher.join(trainer)
    return Training(trainer, case, _branches)


def _distill_kept(case: Case, folder: CaseFolder) -> StepOf:
    teacher = KeptTeacher({"dataset": StateFiles(folder.states, "teacher_states")}, None, 1.0)
    trainer = _trainer(_context("distill", case, folder), DistillationLoss(teacher, divergence_of(1.0), 1.0))
    teacher.join(trainer)
    return Training(trainer, case, lambda row: teacher.taught("dataset", [_branches(row)])[0])


def save_states(case: Case, folder: CaseFolder) -> None:
    """What stage `teacher_states` makes of all rows, before any step."""
    context = _context("teacher_states", case, folder, model=folder.teacher)
    accelerator = prepare_process(context)
    teacher = frozen_scorer(context, "model", bf16=case.bf16).to(accelerator.device)
    groups = [_branches(row) for row in make_rows(case)]
    names = keep_states(context, accelerator, teacher, groups, context.config)
    folder.states.mkdir()
    write_kept(context, folder.states, teacher, groups, names)


STAGES: dict[str, Callable[[Case, CaseFolder], StepOf]] = {
    "sft": _sft,
    "reference": _reference,
    "dpo": _dpo,
    "reward": _reward,
    "grpo": _grpo,
    "distill": _distill,
    "distill_kept": _distill_kept,
}
"""Stage -> what makes its steps, the model loaded and the optimizer built."""


def _context(stage: str, case: Case, folder: CaseFolder, **inputs: Path) -> Context:
    """A context outside any recipe."""
    settings: dict[str, Any] = {"bf16": case.bf16}
    if stage not in ("reference_logprobs", "teacher_states"):
        settings |= {**SETTINGS, "max_steps": case.steps, "train_batch_size": case.prompts * case.completions}
        settings |= {"lora_r": case.lora_r, "gradient_checkpointing": case.checkpointing}
    if case.bf16:  # the stages' default leaves a large GPU waiting for its host
        settings["micro_batch_tokens"] = GPU_BATCH_TOKENS
    # which weights they are is nobody's question here, and reading gigabytes of them to tell would be slow
    with patch("stages.external.folder_digest", lambda _: "0" * 64):
        made = local_context(stage, settings, folder=folder.scratch / "ours", inputs={"model": folder.model, **inputs})
    made.held = Held([], [], made.scratch / "expected.json")
    return made


def _trainer(context: Context, objective: Objective) -> Trainer:
    trainer, _ = start(context, context.config, objective)
    return trainer


def _sequence(row: Row) -> Group:
    """A whole row of which the completion is trained, as stage `sft` lays it out."""
    (completion,) = row.completions
    mask = [False] * len(row.prompt) + [True] * len(completion)
    return Group(row.row_id, (), (Branch([*row.prompt, *completion], mask),))


def _branches(row: Row, data: object = None) -> Group:
    """Completions of one prompt."""
    return Group(row.row_id, row.prompt, tuple(map(Branch, row.completions)), data)


def _rollouts(row: Row) -> Group:
    """On policy: the log-probabilities at sampling time are those of the step itself."""
    unused = tuple([0.0] * len(completion) for completion in row.completions)
    return _branches(row, Rollouts(advantages=row.advantages, sampled_logprobs=unused))
