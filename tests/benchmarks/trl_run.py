"""One run of a TRL trainer on a case: its settings, and what it tells the recorder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback

from tests.benchmarks.cases import Case
from tests.benchmarks.folder import CaseFolder
from tests.benchmarks.models import SETTINGS
from tests.benchmarks.recorder import Recorder
from tests.benchmarks.rows import Row


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
        if self.case.lora_r:
            from peft import LoraConfig

            config.model_init_kwargs = {"dtype": "bfloat16"}
            keywords["peft_config"] = LoraConfig(r=self.case.lora_r, lora_alpha=32, target_modules="all-linear")
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
