"""The stage `contamination`: planted leaks of every kind are found and removed, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import DataError
from tests.data.characters import answers, turns
from tests.data.test_dataset import write
from tests.stages.small_models import logged, output, read_json, read_lines, rows_of, run_stage

QUESTION = "How many apples does Ann have if she buys seven bags with three apples each and eats two of them?"
STORY = "Long ago a miller had three sons and nothing to leave them but his mill his donkey and a cat"
TRAIN = [
    ("t0", "What is the capital of the smallest country on the coast of the largest sea in the world today?"),
    ("t1", QUESTION.upper()),  # equal but for its case
    (
        "t2",
        "Tell me the rest of this tale as my grandmother did when we sat by the fire in the evenings of winter: "
        + STORY,
    ),
    ("t3", QUESTION.replace("seven", "eight")),  # one word of 20 replaced
    ("t4", "Name a river."),
    ("t5", QUESTION),
]
EVALUATION = [
    ("e0", QUESTION + "!"),
    ("e1", STORY + ", who could talk."),
    ("e2", "Name a mountain that is higher than all those which you can see from the harbour of the old town."),
    ("e3", "Name a river"),
]


def prompts(folder: Path, name: str, rows: list[tuple[str, str]]) -> Path:
    return write(folder / name, [{"row_id": row_id, "prompt": text} for row_id, text in rows], kind="prompt")


def compared(
    folder: Path, train: Path, evaluation: list[Path], **config: Any
) -> tuple[dict[str, Any], list[Any], Path]:
    inputs: Any = {"train": train, "evaluation": evaluation}
    context = run_stage("contamination", folder, inputs, **config)
    made = output(context, "contamination")
    return read_json(made / "contamination.json"), read_lines(made / "pairs.jsonl"), output(context, "train")


def test_planted_leaks_are_found_with_what_they_share(tmp_path: Path) -> None:
    train, evaluation = prompts(tmp_path, "train", TRAIN), prompts(tmp_path, "evaluation", EVALUATION)
    found, pairs, _ = compared(tmp_path / "run", train, [evaluation], similarity=0.5)
    # e0 is t1 and t5, and near t3: of 16 and 16 runs of five words, 11 are the same, so 11 / 21
    assert found["rows_by_kind"] == {"equal": 2, "near": 1, "overlap": 2}
    assert (found["contaminated_rows"], found["contaminated_rate"]) == (3, 0.75)
    assert (found["train_rows"], found["evaluation_rows"], found["train_rows_found"]) == (6, 4, 5)
    told = {(pair["kind"], pair["row"]): pair for pair in pairs}
    assert sorted(told) == [("equal", "e0"), ("equal", "e3"), ("near", "e0"), ("overlap", "e0"), ("overlap", "e1")]
    assert told["equal", "e0"]["train_row"] == "t1" and told["equal", "e3"]["train_row"] == "t4"
    assert told["near", "e0"]["train_row"] == "t3"
    assert told["near", "e0"]["score"] == pytest.approx(11 / 21)
    assert told["overlap", "e1"]["train_row"] == "t2" and told["overlap", "e1"]["text"] == STORY.lower()
    # 20 words of the 23 hold 8 of the 11 runs of 13
    assert told["overlap", "e1"]["score"] == pytest.approx(8 / 11)
    strict, _, _ = compared(tmp_path / "strict", train, [evaluation], ngram_size=None, similarity=0.9)
    assert strict["rows_by_kind"] == {"equal": 2, "near": 0, "overlap": 0}


def test_found_rows_are_removed_and_counted(tmp_path: Path) -> None:
    train, evaluation = prompts(tmp_path, "train", TRAIN), prompts(tmp_path, "evaluation", EVALUATION)
    settings = {"similarity": 0.5, "remove": True, "ngram_size": 20}
    _, _, made = compared(tmp_path / "run", train, [evaluation], **settings)
    assert [row["row_id"] for row in rows_of(made)] == ["t0"]
    ledger = read_json(made / "ledger.json")
    assert ledger["states"] == {
        "filtered: equals an evaluation row": 3,  # t1, t5 and t4
        "filtered: near duplicate of an evaluation row": 1,
        "filtered: overlaps an evaluation row": 1,
        "used": 1,
    }
    assert ledger["input"] == 6
    assert logged(made.parents[1]) == [
        "6 rows: 1 used; 5 dropped: 3 filtered: equals an evaluation row, 1 filtered: near duplicate of an evaluation "
        "row, 1 filtered: overlaps an evaluation row"
    ]


def test_near_duplicates_inside_the_training_data(tmp_path: Path) -> None:
    train = prompts(tmp_path, "train", TRAIN)
    other = prompts(tmp_path, "other", [("e", "Nothing of all this.")])
    settings = {"similarity": 0.5, "within_train": True, "remove": True}
    found, pairs, made = compared(tmp_path / "run", train, [other], **settings)
    assert (found["contaminated_rows"], found["rows_by_kind"]["within"]) == (0, 2)
    assert {(pair["row"], pair["train_row"]) for pair in pairs} == {("t3", "t1"), ("t5", "t1"), ("t5", "t3")}
    assert [row["row_id"] for row in rows_of(made)] == ["t0", "t1", "t2", "t4"]


def test_what_is_compared(tmp_path: Path) -> None:
    """The prompts, where both have some; all of the text, where they have no column in common; or what is named."""
    pair = {"row_id": "t", "prompt": turns(QUESTION), "completion": answers("Nineteen apples")}
    train = write(tmp_path / "train", [pair], conversational=True)
    evaluation = write(tmp_path / "chat", [{"row_id": "e", "prompt": turns(QUESTION)}], "prompt", conversational=True)
    assert compared(tmp_path / "a", train, [evaluation])[0]["rows_by_kind"]["equal"] == 1
    text = f"{QUESTION} nineteen apples"
    plain = write(tmp_path / "text", [{"row_id": "e", "text": text}], "language_modeling")
    assert compared(tmp_path / "b", train, [plain])[0]["rows_by_kind"]["equal"] == 1
    assert (
        compared(tmp_path / "c", train, [evaluation, prompts(tmp_path, "more", [("x", "y")])])[0]["contaminated_rate"]
        == 0.5
    )
    with pytest.raises(DataError, match=r"no column 'promt'; did you mean 'prompt'\?"):
        compared(tmp_path / "d", train, [evaluation], columns=["promt"])
    tokens = write(tmp_path / "tokens", [{"row_id": "e", "input_ids": [1]}], "pretokenized")
    with pytest.raises(DataError, match="a pretokenized dataset has no text to compare"):
        compared(tmp_path / "e", train, [tokens])


def test_the_order_of_rows_decides_nothing_but_which_comes_first(tmp_path: Path) -> None:
    evaluation = prompts(tmp_path, "evaluation", EVALUATION)
    found = [
        compared(tmp_path / f"run{n}", prompts(tmp_path, f"train{n}", rows), [evaluation], similarity=0.5)[0]
        for n, rows in enumerate((TRAIN, TRAIN[::-1]))
    ]
    for one in found:
        one.pop("pairs")
    assert found[0] == found[1]
