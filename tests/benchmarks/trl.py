"""TRL's trainers on a case: at their defaults, and at their best settings for it.

TRL computes what it computes; what is set from outside is the rows (tokenized already, in the order of the steps),
the optimizer's numbers, and that nothing is written or reported. Where TRL has no entry for recorded completions
(GRPO, distillation) its generation is replaced by padding them, so that an update is timed and nothing else.
Batches hold rows of like length for its defaults too, which spares them padding that a random draw would cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback
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
from tests.benchmarks.models import BETA, EPSILON, SETTINGS, CaseFolder
from tests.benchmarks.recorder import Recorder
from tests.benchmarks.rows import PAD, Row

ROWS_PER_PASS = 8
BEST: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False, "logging_steps": 10_000}
"""Over the defaults, which compute in bfloat16 with checkpointing. Packing and padding-free batches are left off:
without a flash-attention kernel they pay for the whole batch as one row."""


def run_default(case: Case, steps: Sequence[Sequence[Row]], folder: CaseFolder, recorder: Recorder) -> None:
    """Every step in turn, at TRL's defaults."""
    STAGES[case.stage](Run(case, steps, folder, recorder, {}, {}))


def run_best(case: Case, steps: Sequence[Sequence[Row]], folder: CaseFolder, recorder: Recorder) -> None:
    """Every step in turn, at TRL's best settings."""
    of_stage = {"precompute_ref_log_probs": True} if case.stage == "dpo" else {}
    STAGES[case.stage](Run(case, steps, folder, recorder, BEST, of_stage))


@dataclass(frozen=True)
class Run:
    """What a stage's run needs."""

    case: Case
    steps: Sequence[Sequence[Row]]
    folder: CaseFolder
    recorder: Recorder
    settings: dict[str, Any]
    settings_of_stage: dict[str, Any]

    @property
    def rows(self) -> list[Row]:
        """Of all steps, one after the other."""
        return [row for rows in self.steps for row in rows]

    def arguments(self, rows_per_pass: int, **of_stage: Any) -> dict[str, Any]:
        """Keywords of a TRL config."""
        common = {
            "output_dir": str(self.folder.scratch / "trl"),
            "use_cpu": not torch.cuda.is_available(),
            "per_device_train_batch_size": rows_per_pass,
            "max_steps": self.case.steps,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "learning_rate": SETTINGS["learning_rate"],
            "lr_scheduler_type": SETTINGS["lr_scheduler_type"],
            "weight_decay": SETTINGS["weight_decay"],
            "adam_beta1": SETTINGS["betas"][0],
            "adam_beta2": SETTINGS["betas"][1],
            "adam_epsilon": SETTINGS["adam_epsilon"],
            "max_grad_norm": SETTINGS["max_grad_norm"],
        }
        return common | self.settings | of_stage | self.settings_of_stage

    def start(self, trainer_class: Any, config: Any, rows: Any, **keywords: Any) -> Any:
        """A trainer on the case's model that tells the recorder of every step."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder.model)
        return recording(trainer_class)(
            model=str(self.folder.model),
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[Steps(self.recorder)],
            **keywords,
        )


class Steps(TrainerCallback):
    """Hands the steps' beginnings and ends to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.losses: list[Tensor] = []
        self.grad_norm: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Memory and time count from the first."""
        if state.global_step == 0:
            self.recorder.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The loss of a step is the sum over its micro-batches."""
        self.recorder.done({"loss": torch.stack(self.losses).sum(), "grad_norm": self.grad_norm})
        self.losses = []


def recording(trainer_class: Any) -> Any:
    """The trainer, keeping the losses and gradient norms that it computes anyway."""

    class Recording(trainer_class):  # type: ignore[misc]
        def training_step(self, *args: Any, **keywords: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **keywords)
            _steps_of(self).losses.append(loss.detach())
            return loss

        def _clip_grad_norm(self, model: Any) -> Any:
            norm = super()._clip_grad_norm(model)
            _steps_of(self).grad_norm = norm
            return norm

    return Recording


def _steps_of(trainer: Any) -> Steps:
    found: Steps = next(one for one in trainer.callback_handler.callbacks if isinstance(one, Steps))
    return found


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
    case = run.case
    arguments = run.arguments(
        ROWS_PER_PASS,
        gradient_accumulation_steps=case.prompts * case.completions // ROWS_PER_PASS,
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


STAGES: dict[str, Callable[[Run], None]] = {
    "sft": _sft,
    "reference": _reference,
    "dpo": _dpo,
    "reward": _reward,
    "grpo": _grpo,
    "distill": _distill,
}
