"""A tiny recipe with every stage in it, and its run on a local store, which several tests look at.

What the golden tests expect follows from all that is here; so it borrows nothing from other tests' recipes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.in_process import Payload, run_here

TASK = """
def rows():
    for left in range(12):
        for right in range(10):
            yield {"prompt": f"{left}+{right}=", "completion": str(left + right), "answer": str(left + right)}


def pairs():
    for left in range(12):
        for right in range(10):
            yield {"prompt": f"{left}+{right}=", "chosen": str(left + right), "rejected": str(left + right + 1)}


def steps():
    for left in range(12):
        for right in range(10):
            whole = left + right
            answers = [str(whole), str(whole + right % 2)]
            yield {"prompt": f"{left}+{right}=", "completions": answers, "labels": [True, right % 2 == 0]}


def length(completions, **_):
    return [len(completion) / 4 for completion in completions]
"""

TRAINING = {"learning_rate": 1e-3, "train_batch_size": 8, "max_length": 48, "max_steps": 3}
SIZES = {
    "architecture": "llama",
    "tokenizer": "characters",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

EVERY_STAGE: dict[str, Any] = {
    "rows": {"uses": "normalize", "with": {"source": {"function": "task.py:rows"}, "type": "prompt_completion"}},
    "pairs": {"uses": "normalize", "with": {"source": {"function": "task.py:pairs"}, "type": "preference"}},
    "doubled": {
        "uses": "mixture",
        "inputs": {"datasets": ["rows", "further"]},
        "with": {"weights": [1, 3], "rows": 150, "names": ["right", "wrong"]},
    },
    "further": {
        "uses": "normalize",
        "with": {
            "source": {"function": "task.py:pairs"},
            "type": "prompt_completion",
            "columns": {"completion": "rejected"},
            "keep_columns": [],
            "limit": 30,
        },
    },
    "leaks": {
        "uses": "contamination",
        "inputs": {"train": "rows", "evaluation": ["further"]},
        "with": {"remove": True, "columns": ["prompt"], "within_train": True},
    },
    "solutions": {"uses": "normalize", "with": {"source": {"function": "task.py:steps"}}},
    "base": {"uses": "init_model", "inputs": {"dataset": "rows"}, "with": SIZES},
    "student": {
        "uses": "init_model",
        "inputs": {"dataset": "rows"},
        "with": {**SIZES, "hidden_size": 16, "intermediate_size": 24, "seed": 1},
    },
    "chatty": {"uses": "set_chat_template", "inputs": {"model": "base"}},
    "sft": {"uses": "sft", "inputs": {"model": "base", "dataset": "rows"}, "with": TRAINING},
    "drawn": {
        "uses": "sample",
        "inputs": {"model": "sft", "dataset": "rows"},
        "with": {
            "rewards": ["task.py:length"],
            "threshold": None,
            "outputs": ["completions", "pairs"],
            "limit": 8,
            "max_completion_length": 6,
        },
    },
    "reference": {
        "uses": "reference_logprobs",
        "inputs": {"model": "sft", "dataset": "pairs"},
        "with": {"max_length": 48},
    },
    "dpo": {
        "uses": "preference",
        "inputs": {"model": "sft", "dataset": "pairs", "reference_logprobs": "reference"},
        "with": TRAINING,
    },
    "kto": {"uses": "unpaired_preference", "inputs": {"model": "sft", "dataset": "pairs"}, "with": TRAINING},
    "judge": {"uses": "reward_model", "inputs": {"model": "sft", "dataset": "pairs"}, "with": TRAINING},
    "judge_of_steps": {
        "uses": "process_reward_model",
        "inputs": {"model": "sft", "dataset": "solutions"},
        "with": {**TRAINING, "step_separator": "="},
    },
    "grpo": {
        "uses": "rl",
        "inputs": {"model": "dpo", "dataset": "rows", "reward_model": "judge"},
        "with": {
            **TRAINING,
            "max_steps": 2,
            "rewards": ["task.py:length"],
            "num_generations": 4,
            "max_completion_length": 6,
        },
    },
    "rescored": {
        "uses": "rescore",
        "inputs": {"rollouts": "grpo.rollouts", "dataset": "rows"},
        "with": {
            "rewards": ["task.py:length"],
            "outputs": ["rollouts", "best", "pairs", "labels"],
            "threshold": 1.3,
        },
    },
    "ppo": {
        "uses": "ppo",
        "inputs": {"model": "sft", "dataset": "rows", "reward_model": "judge"},
        "with": {
            **TRAINING,
            "max_steps": 4,
            "rewards": ["task.py:length"],
            "num_ppo_epochs": 2,
            "max_completion_length": 6,
            "missing_eos_penalty": 0.5,
        },
    },
    "online": {
        "uses": "online_dpo",
        "inputs": {"model": "sft", "dataset": "rows", "reward_model": "judge"},
        "with": {**TRAINING, "max_steps": 2, "rewards": ["task.py:length"], "max_completion_length": 6},
    },
    "explored": {
        "uses": "online_dpo",
        "inputs": {"model": "sft", "dataset": "rows", "reference": "base"},
        "with": {
            **TRAINING,
            "max_steps": 2,
            "rewards": ["task.py:length"],
            "max_completion_length": 6,
            "xpo_alpha": 0.1,
        },
    },
    "contest": {
        "uses": "nash_md",
        "inputs": {"model": "sft", "dataset": "rows", "reference": "base", "reward_model": "judge"},
        "with": {**TRAINING, "max_steps": 2, "rewards": ["task.py:length"], "max_completion_length": 6},
    },
    "regressed": {
        "uses": "a2po",
        "inputs": {"model": "sft", "dataset": "rows", "samples": "drawn.completions"},
        "with": {**TRAINING, "max_steps": 2, "rewards": ["task.py:length"], "max_completion_length": 6, "beta2": 0.1},
    },
    "self_taught": {
        "uses": "sdpo",
        "inputs": {"model": "sft", "dataset": "rows", "reward_model": "judge"},
        "with": {
            **TRAINING,
            "max_steps": 2,
            "rewards": ["task.py:length"],
            "success_reward_threshold": 1.5,
            "distillation_weight": 0.5,
            "distillation_mode": "topk_logits",
            "distillation_topk": 5,
            "num_generations": 4,
            "max_completion_length": 6,
            "reprompt_template": "{prompt}{solution}",
            "solution_template": "{successful_previous_attempt}=",
        },
    },
    "small": {
        "uses": "distill",
        "inputs": {"model": "student", "teacher": "grpo", "dataset": "rows"},
        "with": {**TRAINING, "lmbda": 0.5, "beta": 0.5, "max_completion_length": 6},
    },
    "small_by_sampling": {
        "uses": "distill",
        "inputs": {"model": "student", "teacher": "grpo", "dataset": "rows"},
        "with": {**TRAINING, "loss_type": "minillm", "gamma": 0.9, "max_steps": 2, "max_completion_length": 6},
    },
    "bytes": {
        "uses": "init_model",
        "inputs": {"dataset": "rows"},
        "with": {**SIZES, "tokenizer": "byte_bpe", "vocab_size": 270},
    },
    "small_of_bytes": {
        "uses": "distill",
        "inputs": {"model": "student", "teacher": "bytes", "dataset": "rows"},
        "with": {
            **TRAINING,
            "lmbda": 0.5,
            "beta": 0.5,
            "max_completion_length": 6,
            "cross_tokenizer": {"loss_type": "hybrid", "crossentropy_weight": 0.5},
        },
    },
    "taught": {"uses": "teacher_states", "inputs": {"model": "grpo", "dataset": "rows"}, "with": {"max_length": 48}},
    "small_of_taught": {
        "uses": "distill",
        "inputs": {"model": "student", "teacher_states": "taught", "dataset": "rows"},
        "with": {**TRAINING, "lmbda": 0.0, "max_steps": 2},
    },
    "adapter": {
        "uses": "sft",
        "inputs": {"model": "base", "dataset": "rows"},
        "with": {**TRAINING, "lora_r": 4, "merge_adapters": False},
    },
    "adapter_dpo": {
        "uses": "preference",
        "inputs": {"model": "adapter", "dataset": "pairs"},
        "with": {**TRAINING, "merge_adapters": False},
    },
    "merged": {"uses": "merge_adapter", "inputs": {"adapter": "adapter_dpo"}},
    "averaged": {
        "uses": "sft",
        "inputs": {"model": "base", "dataset": "rows"},
        "with": {**TRAINING, "weight_averaging": {"kind": "bema", "update_freq": 1}},
    },
    "merged_by_sign": {
        "uses": "average",
        "inputs": {"models": ["sft", "dpo", "kto"], "base": "base"},
        "with": {"method": "ties", "density": 0.4, "weights": [2, 1, 1]},
    },
    "dropped": {
        "uses": "average",
        "inputs": {"models": ["sft", "kto"], "base": "base"},
        "with": {"method": "dare_linear", "density": 0.5, "scale": 0.5},
    },
    "soup": {"uses": "average", "inputs": {"models": ["sft", "dpo", "kto"]}, "with": {"weights": [2, 1, 1]}},
    "scores": {
        "uses": "evaluate",
        "inputs": {"model": "sft", "dataset": "rows", "reward_model": "judge"},
        "with": {"rewards": ["exact_match"], "limit": 16, "max_length": 48, "max_completion_length": 6},
    },
    "scores_before": {
        "uses": "evaluate",
        "inputs": {"model": "base", "dataset": "rows", "reward_model": "judge"},
        "with": {"rewards": ["exact_match"], "limit": 16, "max_length": 48, "max_completion_length": 6},
    },
    "better": {
        "uses": "gate",
        "inputs": {"model": "sft", "candidate": "scores", "baseline": "scores_before"},
        "with": {"metrics": {"loss": 0.001}, "limits": {"accuracy": 0.0}, "passes": "if_better"},
    },
}


@dataclass(frozen=True)
class Done:
    """A finished run with its recipe and its store."""

    recipe: Path
    store: Path
    payload: Payload


_done: list[Done] = []


@pytest.fixture(scope="session")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Made once a session, whichever modules import it."""
    if not _done:
        folder = tmp_path_factory.mktemp("every_stage")
        (folder / "task.py").write_text(TASK)
        recipe = folder / "every.yaml"
        recipe.write_text(json.dumps({"name": "every", "launch": {"threads": 1}, "stages": EVERY_STAGE}))
        _done.append(Done(recipe, folder / "store", run_here(recipe, folder / "store")))
    return _done[0]
