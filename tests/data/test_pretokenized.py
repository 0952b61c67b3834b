"""Rows that bring their token ids: masks by hand, every mistake named, and training equal to that of the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from artifacts.errors import DataError
from stages.data import RowLedger, tokenize_prompts, tokenize_sequences
from stages.data.given_tokens import require_vocabulary
from tests.data.characters import build_tokenizer, dataset, ids
from tests.stages.normalized import Normalized, write_jsonl
from tests.stages.small_models import output, read_lines, run_stage, save_dataset, save_model, states

IDS = [3, 5, 7, 9]


def normalized(folder: Path, rows: list[dict[str, Any]], **config: Any) -> Normalized:
    return Normalized(folder, write_jsonl(folder / "in" / "rows.jsonl", rows), **config)


def test_rows_are_recognized_and_kept_as_they_are(tmp_path: Path) -> None:
    row = {"input_ids": IDS, "labels": [-100, -100, 7, 9], "completion_mask": [0, 0, 1, 1], "source": "web"}
    made = normalized(tmp_path, [row, {**row, "input_ids": IDS[:2], "labels": [-100, 5], "completion_mask": [0, 1]}])
    assert (made.dataset().type, made.dataset().conversational) == ("pretokenized", False)
    assert made.rows()[0] == {**row, "completion_mask": [False, False, True, True]}
    kept = normalized(tmp_path / "kept", [row], keep_columns=[])
    assert kept.rows() == [{name: value for name, value in made.rows()[0].items() if name != "source"}]


def test_a_pair_without_a_prompt_has_what_both_begin_with(tmp_path: Path) -> None:
    rows = [{"chosen_ids": [1, 2, 3], "rejected_ids": [1, 2, 4, 5]}, {"chosen_ids": [1, 2], "rejected_ids": [1, 2, 3]}]
    made = normalized(tmp_path, rows)
    assert made.dataset().type == "pretokenized_preference"
    assert made.rows() == [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]},
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2, 3]},
    ]


def test_rows_of_no_use_are_counted(tmp_path: Path) -> None:
    made = normalized(tmp_path, [{"input_ids": [1]}, {"input_ids": []}])
    assert made.ledger()["states"] == {"filtered: no tokens": 1, "used": 1}
    same = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}
    made = normalized(tmp_path / "pairs", [same, {**same, "rejected_ids": [3]}])
    assert made.ledger()["states"] == {"filtered: chosen equals rejected": 1, "used": 1}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input_ids": "1 2"}, r"field 'input_ids': must be a list of token ids; found text"),
        ({"input_ids": [1, -2]}, r"field 'input_ids\[1\]': a token id is a whole number of at least 0; found -2"),
        ({"input_ids": [1, True]}, r"field 'input_ids\[1\]'"),
        ({"input_ids": IDS, "labels": IDS[:3]}, r"field 'labels': must be as long as input_ids; found 3 for 4 tokens"),
        ({"input_ids": IDS, "labels": [-100, 7, 9, 5]}, r"field 'labels\[1\]': a label is -100 .* found 7 for token 5"),
        ({"input_ids": IDS, "completion_mask": [0, 0, 2, 1]}, r"field 'completion_mask\[2\]': a mask holds 0 and 1"),
        ({"input_ids": IDS, "assistant_masks": 1}, r"field 'assistant_masks': must be a list with a number a token"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl row 1: {problem}"):
        normalized(tmp_path, [row])


def test_all_rows_have_the_same_masks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 2: field 'labels': no 'labels', and the rows before it have one"):
        normalized(tmp_path, [{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS}])
    with pytest.raises(DataError, match="filters count characters, and a pretokenized row has none"):
        normalized(tmp_path / "filter", [{"input_ids": IDS}], filters={"min_characters": 2})


def masks(row: dict[str, Any], **settings: Any) -> str:
    data = dataset("pretokenized", [row])
    data = type(data)(data.type, False, ("row_id", *row), data.rows)
    (one,) = tokenize_sequences(data, build_tokenizer(), max_length=None, ledger=RowLedger(), **settings)
    assert one.token_ids == row["input_ids"]
    return "".join("x" if trained else "." for trained in one.loss_mask)


def test_what_is_trained() -> None:
    """Nothing predicts the first token; labels always hold, the masks when they are asked for."""
    plain: dict[str, Any] = {"input_ids": [3, 4, 5, 6, 7, 8]}
    completion = {"completion_mask": [False, False, True, True, True, True]}
    assistant = {"assistant_masks": [False, True, False, True, True, False]}
    assert masks(plain) == ".xxxxx"
    assert masks(plain | {"labels": [3, 4, -100, -100, 7, 8]}) == ".x..xx"
    assert masks(plain | completion) == "..xxxx"
    assert masks(plain | completion, completion_only_loss=False) == ".xxxxx"
    assert masks(plain | assistant) == ".xxxxx"
    assert masks(plain | completion | assistant, assistant_only_loss=True) == "...xx."
    with pytest.raises(DataError, match="assistant_only_loss: this pretokenized dataset has no column"):
        masks(plain, assistant_only_loss=True)
    with pytest.raises(DataError, match="completion_only_loss: this pretokenized dataset has no column"):
        masks(plain, completion_only_loss=True)


def test_token_ids_of_another_vocabulary_are_refused() -> None:
    data = dataset("pretokenized", [{"input_ids": [1, 2]}, {"input_ids": [1, 2, 40]}])
    with pytest.raises(DataError, match=r"row r1: field 'input_ids\[2\]': token id 40, but .* vocabulary has 30"):
        require_vocabulary(data, 30)
    assert require_vocabulary(data, 41) is data
    pairs = dataset("pretokenized_preference", [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [99]}])
    with pytest.raises(DataError, match=r"row r0: field 'rejected_ids\[0\]': token id 99"):
        require_vocabulary(pairs, 99)
    with pytest.raises(DataError, match="of type pretokenized; this stage takes language_modeling or prompt or"):
        tokenize_prompts(data, build_tokenizer(), max_length=None, ledger=RowLedger())


@pytest.mark.parametrize("stage", ["sft", "distill", "reference_logprobs", "evaluate"])
def test_every_stage_asks_its_model(tmp_path: Path, stage: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    save_model(tmp_path / "model", seed=3)
    data = save_dataset(tmp_path / "data", "pretokenized", [{"input_ids": [3, 4]}, {"input_ids": [3, 400]}])
    inputs = {"model": tmp_path / "model", "dataset": data}
    if stage == "distill":
        inputs["teacher"] = tmp_path / "model"
    with pytest.raises(DataError, match=r"row r1: field 'input_ids\[1\]': token id 400, but the model's vocabulary"):
        run_stage(stage, tmp_path / "run", inputs)


TEXT = [{"prompt": "abc", "completion": "de"}, {"prompt": "da", "completion": "bbcaaa"}]
TOKENS = [
    {
        "input_ids": ids(row["prompt"] + row["completion"] + "$"),
        "completion_mask": [False] * len(row["prompt"]) + [True] * (len(row["completion"]) + 1),
    }
    for row in TEXT
]
PAIRS = [{"prompt": "abc", "chosen": "de", "rejected": "h"}, {"prompt": "da", "chosen": "bb", "rejected": "gaa"}]
PAIR_TOKENS = [
    {
        "prompt_ids": ids(row["prompt"]),
        "chosen_ids": ids(row["chosen"] + "$"),
        "rejected_ids": ids(row["rejected"] + "$"),
    }
    for row in PAIRS
]


@pytest.mark.parametrize(
    ("stage", "forms", "config"),
    [
        ("sft", {"prompt_completion": TEXT, "pretokenized": TOKENS}, {"max_length": 7}),
        ("preference", {"preference": PAIRS, "pretokenized_preference": PAIR_TOKENS}, {"loss_type": "orpo"}),
        ("reward_model", {"preference": PAIRS, "pretokenized_preference": PAIR_TOKENS}, {}),
    ],
)
def test_training_is_that_of_the_same_text(tmp_path: Path, stage: str, forms: dict[str, Any], config: Any) -> None:
    """Bit for bit the metrics of rows of text whose tokens they are, cut and counted alike."""
    save_model(tmp_path / "model", seed=3)
    made = []
    for kind, rows in forms.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        data = save_dataset(tmp_path / kind / "data", kind, rows)
        settings = {"train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, **config}
        context = run_stage(stage, tmp_path / kind, {"model": tmp_path / "model", "dataset": data}, **settings)
        name = next(iter(context.stage.outputs))
        made.append((read_lines(output(context, name) / "metrics.jsonl"), states(output(context, name))))
    assert made[0] == made[1]
