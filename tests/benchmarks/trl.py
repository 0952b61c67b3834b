"""TRL's trainers on a case: at their defaults, and at their best settings for it.

TRL computes what it computes; what is set from outside is the rows (tokenized already, in the order of the steps),
the optimizer's numbers, and that nothing is written or reported. Where TRL has no entry for recorded completions
(GRPO, distillation) its generation is replaced by padding them, so that an update is timed and nothing else.
Batches hold rows of like length for its defaults too, which spares them padding that a random draw would cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.utils import pad

from tests.benchmarks.cases import Case
from tests.benchmarks.folder import CaseFolder
from tests.benchmarks.models import BETA, EPSILON
from tests.benchmarks.online import require_length, text_of
from tests.benchmarks.online_reward import even_share
from tests.benchmarks.recorder import Recorder
from tests.benchmarks.rows import PAD, Row
from tests.benchmarks.trl_run import Run

ROWS_PER_PASS = 8
BEST: dict[str, Any] = {"logging_steps": 10_000}
"""Over the defaults, which compute in bfloat16 with checkpointing whatever the case says. Packing and padding-free
batches are left off: without a flash-attention kernel they pay for the whole batch as one row."""


def run_default(case: Case, steps: Sequence[Sequence[Row]], folder: CaseFolder, recorder: Recorder) -> None:
    """Every step in turn, at TRL's defaults."""
    STAGES[case.stage](Run(case, steps, folder, recorder, {}, {}))


def run_best(case: Case, steps: Sequence[Sequence[Row]], folder: CaseFolder, recorder: Recorder) -> None:
    """Every step in turn, at TRL's best settings."""
    of_stage = {"precompute_ref_log_probs": True} if case.stage == "dpo" else {}
    best = {**BEST, "bf16": case.bf16, "gradient_checkpointing": case.checkpointing}
    STAGES[case.stage](Run(case, steps, folder, recorder, best, of_stage))


def _sft(run: Run) -> None:
    rows = Dataset.from_list(
        [
            {"input_ids": row.prompt + completion, "labels": [-100] * len(row.prompt) + completion}
            for row in run.rows
            for completion in row.completions
        ]
    )
    arguments = run.arguments(run.case.prompts, max_length=None, train_sampling_strategy="sequential")
    run.start(SFTTrainer, SFTConfig(**arguments), rows).train()


class TokenizedDPOTrainer(DPOTrainer):
    """Takes rows that are tokenized already and carry the reference's log-probabilities."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return dataset


def _dpo_trainer(run: Run, references: dict[str, list[float]]) -> Any:
    arguments = run.arguments(run.case.prompts, beta=BETA, max_length=None, train_sampling_strategy="sequential")
    rows = [_pair(row, references) for row in run.rows]
    return run.start(TokenizedDPOTrainer, DPOConfig(**arguments), Dataset.from_list(rows))


def _pair(row: Row, references: dict[str, list[float]]) -> dict[str, Any]:
    chosen, rejected = row.completions
    ids = {"prompt_ids": row.prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    if not references:
        return ids
    return ids | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), references[row.row_id], strict=True))


def _dpo(run: Run) -> None:
    _dpo_trainer(run, run.folder.references()).train()


def _reference(run: Run) -> None:
    """As `precompute_ref_log_probs` scores its batches."""
    trainer = _dpo_trainer(run, {})
    trainer.model.eval()
    run.recorder.begin()
    for rows in run.steps:
        batch = trainer.data_collator([_pair(row, {}) for row in rows])
        inputs = {name: values.to(trainer.accelerator.device) for name, values in batch.items()}
        chosen, rejected = trainer.compute_ref_log_probs(trainer.model, inputs)
        run.recorder.done({"logprobs": torch.stack([chosen, rejected], 1).flatten().tolist()})


def _reward(run: Run) -> None:
    rows = [
        dict(zip(("chosen_ids", "rejected_ids"), (row.prompt + tail for tail in row.completions), strict=True))
        for row in run.rows
    ]
    arguments = run.arguments(run.case.prompts, max_length=None, train_sampling_strategy="sequential")
    run.start(RewardTrainer, RewardConfig(**arguments), Dataset.from_list(rows)).train()


def recorded(trainer_class: Any, rows: Sequence[Row]) -> Any:
    """The trainer with recorded completions in the place of its generation, padded as it pads what it generates."""
    by_id = {row.row_id: row for row in rows}

    class Recorded(trainer_class):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            completions = len(by_id[inputs[0]["prompt"]].completions)
            found = [by_id[one["prompt"]] for one in inputs[::completions]]
            return _padded(found, self.accelerator.device)

    return Recorded


def _padded(rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
    prompts = [torch.tensor(row.prompt) for row in rows for _ in row.completions]
    completions = [torch.tensor(completion) for row in rows for completion in row.completions]

    def ones(values: list[Tensor]) -> list[Tensor]:
        return [torch.ones_like(one) for one in values]

    tensors = {
        "prompt_ids": pad(prompts, padding_value=PAD, padding_side="left"),
        "prompt_mask": pad(ones(prompts), padding_value=0, padding_side="left"),
        "completion_ids": pad(completions, padding_value=PAD, padding_side="right"),
        "completion_mask": pad(ones(completions), padding_value=0, padding_side="right"),
        "advantages": torch.tensor([value for row in rows for value in row.advantages]),
        "num_items_in_batch": torch.tensor(sum(row.completion_tokens for row in rows)),
    }
    return {name: values.to(device) for name, values in tensors.items()}


def _grpo(run: Run) -> None:
    case, rows_of_step = run.case, run.case.prompts * run.case.completions
    arguments = run.arguments(
        min(ROWS_PER_PASS, rows_of_step),
        gradient_accumulation_steps=max(1, rows_of_step // ROWS_PER_PASS),
        num_generations=case.completions,
        epsilon=EPSILON,
        loss_type="dapo",
        beta=0.0,
        shuffle_dataset=False,
    )
    rows = Dataset.from_list([{"prompt": row.row_id} for row in run.rows])
    run.start(recorded(GRPOTrainer, run.rows), GRPOConfig(**arguments), rows, reward_funcs=[_no_reward]).train()


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    """The recorded rows have their advantages."""
    return [0.0] * len(completions)


def _distill(run: Run) -> None:
    arguments = run.arguments(run.case.prompts, beta=1.0, shuffle_dataset=False)
    rows = Dataset.from_list([{"prompt": row.row_id} for row in run.rows])
    run.start(
        recorded(DistillationTrainer, run.rows),
        DistillationConfig(**arguments),
        rows,
        teacher_model=str(run.folder.teacher),
    ).train()


def _online(run: Run) -> None:
    """Whole steps: it generates with the model's own `generate`, all completions of a step at once."""
    case, rows_of_step = run.case, run.case.prompts * run.case.completions
    arguments = run.arguments(
        min(ROWS_PER_PASS, rows_of_step),
        gradient_accumulation_steps=max(1, rows_of_step // ROWS_PER_PASS),
        num_generations=case.completions,
        max_completion_length=case.completion_tokens,
        epsilon=EPSILON,
        loss_type="dapo",
        beta=0.0,
    )
    rows = Dataset.from_list([{"prompt": text_of(row)} for row in run.steps[0]])

    class Checked(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            found = super()._generate_and_score_completions(inputs)
            require_length(case, found["completion_mask"].sum(1).float().mean().item())
            return found

    run.start(Checked, GRPOConfig(**arguments), rows, reward_funcs=[even_share]).train()


STAGES: dict[str, Callable[[Run], None]] = {
    "sft": _sft,
    "reference": _reference,
    "dpo": _dpo,
    "reward": _reward,
    "grpo": _grpo,
    "distill": _distill,
    "distill_kept": _distill,
    "online": _online,
}
