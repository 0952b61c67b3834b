"""What an evaluation measures: the tasks that it is asked for, or all that model, dataset and inputs permit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from artifacts.errors import StageError
from stages.data.types import PAIRED, SEQUENCE_TYPES, TOKEN_TYPES

if TYPE_CHECKING:
    from stages.context import Context
    from stages.data.types import Dataset

Task = Literal["accuracy", "preference_accuracy", "loss", "reward"]


def holds_reward_model(folder: Path) -> bool:
    """Whether the model in the folder gives a score and not tokens."""
    from stages.adapters import is_adapter
    from stages.training.model_check import check_model_folder

    if is_adapter(folder):
        return False
    check_model_folder(folder)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return any(str(name).endswith("ForSequenceClassification") for name in values.get("architectures") or ())


def permitted_tasks(context: Context, dataset: Dataset, is_reward_model: bool) -> tuple[Task, ...]:
    """The tasks asked for, or all that can be done. Raises StageError for one that cannot."""
    obstacles = _obstacles(context, dataset, is_reward_model)
    if named := context.config.tasks:
        for task in named:
            if obstacles[task]:
                raise StageError(f"task {task}: {obstacles[task]}")
        return tuple(task for task in obstacles if task in named)
    possible: tuple[Task, ...] = tuple(task for task, obstacle in obstacles.items() if not obstacle)
    if not possible:
        reasons = "; ".join(f"{task}: {obstacle}" for task, obstacle in obstacles.items())
        raise StageError(f"there is nothing to evaluate with these inputs ({reasons})")
    return possible


def obstacles_of_type(dataset: Dataset) -> dict[Task, str]:
    """Why a task cannot be done with such rows, whatever the model; empty where it can."""
    of_type = f"this dataset is of type {dataset.type}"
    plain = dataset.type == "language_modeling" and not dataset.conversational
    no_prompt = plain or dataset.type in TOKEN_TYPES
    answers = f"it takes prompts as text, {of_type} without conversations" if no_prompt else ""
    return {
        "accuracy": answers,
        "preference_accuracy": "" if dataset.type in PAIRED else f"it takes type preference, {of_type}",
        "loss": "" if dataset.type in SEQUENCE_TYPES else f"it takes {' or '.join(SEQUENCE_TYPES)}, {of_type}",
        "reward": answers,
    }


def _obstacles(context: Context, dataset: Dataset, is_reward_model: bool) -> dict[Task, str]:
    """Why a task cannot be done; empty where it can."""
    of_type = obstacles_of_type(dataset)
    scores = "the model is a reward model, which gives scores and no tokens" if is_reward_model else ""
    no_judge = "" if context.config.rewards else "no rewards are given that judge a completion"
    not_wired = "" if context.has("reward_model") else "input reward_model is not wired in"
    return {
        "accuracy": scores or of_type["accuracy"] or no_judge,
        "preference_accuracy": of_type["preference_accuracy"],
        "loss": scores or of_type["loss"],
        "reward": scores or of_type["reward"] or not_wired,
    }
