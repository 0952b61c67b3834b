"""Prompts with privileged context: what the student and what the teacher sees, written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from artifacts.errors import DataError
from stages.data.ledger import RowLedger
from stages.data.privileged import teacher_prompt, tokenize_privileged
from stages.distill import Config, check
from tests.data.characters import build_tokenizer, dataset, ids, turns

Row = dict[str, Any]


def tokenized(
    rows: list[Row], template: str, *, chat: bool = False, max_length: int = 40
) -> tuple[dict[str, tuple[list[int], Any]], Row]:
    ledger = RowLedger()
    data = dataset("privileged_context", rows, chat)
    prompts = tokenize_privileged(data, build_tokenizer(), template=template, max_length=max_length, ledger=ledger)
    return {prompt.row_id: (prompt.prompt_ids, prompt.teacher_ids) for prompt in prompts}, ledger.to_json()


def test_the_template_makes_the_teachers_prompt() -> None:
    rows = [{"prompt": "ab", "privileged_context": "cd"}]
    made, ledger = tokenized(rows, "{privileged_context} {prompt}{privileged_context}")
    assert made == {"r0": (ids("ab"), ids("cd abcd"))}
    assert ledger["states"] == {"used": 1}


def test_what_a_row_holds_is_no_template() -> None:
    row = {"row_id": "r0", "prompt": "{a}", "privileged_context": "{prompt}"}
    assert teacher_prompt(row, "{{{prompt}}} {privileged_context}") == "{{a}} {prompt}"


def test_of_a_conversation_the_last_question_is_replaced() -> None:
    rows = [
        {"prompt": turns("=h", "ab", "c", "d"), "privileged_context": turns("e", "f")},
        {"prompt": turns("a"), "privileged_context": turns("b")},
    ]
    made, _ = tokenized(rows, "{prompt} {privileged_context}", chat=True)
    # a line end, which this tokenizer does not know, stands between the messages of the context
    assert made == {
        "r0": (ids("=h<ab>c$<d>"), ids("=h<ab>c$<d e?f>")),
        "r1": (ids("<a>"), ids("<a b>")),
    }


def test_what_follows_the_last_question_stays() -> None:
    result = {"role": "tool", "content": "d"}
    prompt = [*turns("a", "b"), result]
    rows = [{"prompt": prompt, "privileged_context": turns("c")}]
    made, _ = tokenized(rows, "{prompt}{privileged_context}", chat=True)
    assert made == {"r0": (ids("<a>b$=d>"), ids("<ac>b$=d>"))}


def test_rows_whose_prompts_are_too_long_are_counted() -> None:
    rows = [
        {"prompt": "ab", "privileged_context": "c"},
        {"prompt": "ab", "privileged_context": "cd"},
        {"prompt": "abcd", "privileged_context": "c"},
    ]
    made, ledger = tokenized(rows, "{prompt}{privileged_context}", max_length=3)
    assert list(made) == ["r0"]
    long, teachers = "filtered: prompt too long", "filtered: teacher's prompt too long"
    assert ledger["states"] == {"used": 1, long: 1, teachers: 1}
    assert ledger["examples"][teachers] == [{"row": "r1", "detail": "4 tokens, max_length is 3"}]
    with pytest.raises(DataError, match="none of the 3 rows is left"):
        tokenized(rows, "{prompt}{privileged_context}", max_length=2)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{prompt}", r"takes the fields prompt and privileged_context, found prompt"),
        ("{prompt} {privileged_context} {hint}", r"found prompt, privileged_context, hint"),
        ("none", "found none"),
        ("{prompt} {privileged_context", "a lone brace at character 10"),
    ],
)
def test_templates_are_checked_before_anything_runs(template: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config(teacher_prompt_template=template)


def test_a_model_that_teaches_itself_samples_every_completion() -> None:
    assert check(Config(lmbda=0.5), frozenset({"model", "dataset", "teacher"})) == []
    assert check(Config(), frozenset({"model", "dataset"})) == []
    (problem,) = check(Config(lmbda=0.5), frozenset({"model", "dataset"}))
    assert "lmbda is 0.5, and must be 1; or wire a teacher" in problem


@pytest.mark.parametrize(
    ("settings", "wired", "said"),
    [
        ({"teacher_update_rate": 0.1}, ("teacher",), "input teacher stays as it is"),
        ({"teacher_update_rate": 0.1, "lora_r": 4}, (), "with lora_r only adapters are"),
        ({"teacher_sync_steps": 2}, (), "teacher_update_rate is null, so it would not be used"),
    ],
)
def test_a_teacher_that_cannot_follow(settings: Row, wired: tuple[str, ...], said: str) -> None:
    (problem,) = check(Config(**settings), frozenset({"model", "dataset", *wired}))
    assert said in problem
