"""Students learn from teachers of other tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.stages.cross_tokenizer_runs import talk
from tests.stages.small_models import output, read_lines, save_dataset
from tests.stages.test_other_engines import done


def made(folder: Path, stage: str, inputs: dict[str, Path], name: str = "model", **settings: Any) -> Path:
    return output(done(stage, folder, inputs, **settings), name)


@pytest.mark.parametrize(
    ("cross", "merges", "settings"),
    [
        # ranks alone do not say which token is likely; beside the cross-entropy, as in the paper
        ({"crossentropy_weight": 1.0}, 29, {"lmbda": 0.0}),
        (
            {
                "loss_type": "hybrid",
                "token_merge_strategy": "bayesian",
                "matched_weight": 1.0,
                "unmatched_weight": 0.2,
            },
            5,
            {"lmbda": 0.3, "beta": 0.5},
        ),
    ],
)
def test_a_student_learns_what_is_held_out(
    tmp_path: Path, cross: dict[str, Any], merges: int, settings: dict[str, Any]
) -> None:
    """Both tokenizers are trained on the rows: bytes with merges, and characters. The teacher has learnt to turn two
    words around."""
    words = ["été", "blue", "zwölf", "red"]
    rows = [
        {"prompt": talk(f"{one} {two}"), "completion": [talk("", f"{two} {one}")[1]]} for one in words for two in words
    ]
    apart = [3, 9, 14]
    sets = {
        "dataset": save_dataset(
            tmp_path / "rows",
            "prompt_completion",
            [row for place, row in enumerate(rows) if place not in apart],
            conversational=True,
        ),
        "eval_dataset": save_dataset(
            tmp_path / "apart", "prompt_completion", [rows[place] for place in apart], conversational=True
        ),
    }
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {"bytes": {"vocab_size": 261 + merges}, "characters": {"tokenizer": "characters", "seed": 3}}
    given = {"dataset": sets["dataset"]}
    bases = {name: made(tmp_path / name, "init_model", given, **sizes, **one) for name, one in own.items()}
    training = {"learning_rate": 1e-2, "train_batch_size": 13, "max_steps": 50}
    teacher = made(tmp_path / "sft", "sft", {"model": bases["bytes"], **sets}, **training)
    student = made(
        tmp_path / "student",
        "distill",
        {"model": bases["characters"], "teacher": teacher, **sets},
        cross_tokenizer=cross,
        max_completion_length=16,
        eval_steps=10,
        **training,
        **settings,
    )
    for folder in (teacher, student):
        measured = [row["eval/loss"] for row in read_lines(folder / "metrics.jsonl") if "eval/loss" in row]
        assert measured[-1] < 0.5 * measured[0]
