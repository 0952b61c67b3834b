"""What the teacher is shown, token by token, of plain and conversational prompts; what is not taught, and how it is
recorded."""

from __future__ import annotations

from typing import Any

import pytest

from artifacts.errors import DataError
from stages.data.chat import Encoder
from stages.data.encode import encode_prompts
from stages.data.privileged import with_request
from stages.data.tokenize import TokenizedPrompt
from stages.rollouts.requests import Completion
from stages.sdpo import Config
from stages.training.lesson import Lesson, lesson_metrics
from stages.training.lessons import Lessons, without_thinking
from stages.training.rollout_records import Sampled, rollout_records
from tests.data.characters import build_tokenizer, dataset, ids, turns

TEMPLATES = {
    "reprompt_template": "a{prompt}b{solution}{feedback}",
    "solution_template": "c{successful_previous_attempt}c",
    "feedback_template": "d{feedback_raw}d",
}


def sampled(prompt: Any, texts: list[str], rewards: list[float | None]) -> Sampled:
    row = {"row_id": "r7", "prompt": prompt}
    completions = [Completion([3], [-1.0], True) for _ in texts]
    return Sampled(TokenizedPrompt("r7", [9], row), completions, texts, {"one": list(rewards)}, list(rewards))


def lessons(
    prompt: Any, texts: list[str], rewards: list[float | None], said: list[str | None], longest: int = 99, **more: Any
) -> list[Lesson]:
    """Of one group."""
    feedback = {"feedback_column": "said"} if any(said) else {"feedback_template": Config(rewards=()).feedback_template}
    config = Config(rewards=["exact_match"], **{**TEMPLATES, **feedback, **more})
    encoder, rows = Encoder(build_tokenizer()), dataset("prompt", [{"prompt": prompt}], not isinstance(prompt, str))

    def encode(prompts: list[TokenizedPrompt]) -> list[list[int]]:
        return encode_prompts(encoder, rows, [one.row for one in prompts]) if prompts else []

    (found,) = Lessons(config, encode, longest, lambda _: [said])([sampled(prompt, texts, rewards)])
    return found.lessons


def test_of_a_plain_prompt() -> None:
    """The first success teaches all others, the second one teaches it; the same prompt is made once."""
    found = lessons("gh", ["e", "f", "ee", "ff"], [0.0, 1.0, None, 1.5], [None] * 4)
    assert [one.solution for one in found] == [1, 3, 1, 1]
    assert [one.teacher_ids for one in found] == [ids(f"aghbc{text}c") for text in ("f", "ff", "f", "f")]
    assert found[0].teacher_ids is found[2].teacher_ids


def test_of_a_conversation() -> None:
    """The solution goes into the last turn of the user, and all else stays."""
    prompt = turns("=h", "g", "e", "gg")
    found = lessons(prompt, ["f", "e"], [1.0, 0.0], ["hh", "g"])
    assert found[0].teacher_ids == ids("=h<g>e$<aggbdhhd>")
    assert found[1].teacher_ids == ids("=h<g>e$<aggbcfcdgd>")
    # where the assistant's answer has begun, what it has said stays behind
    begun = [*prompt, {"role": "assistant", "content": "e"}]
    assert with_request({"row_id": "r0", "prompt": begun}, lambda text: text + "!")[-2:] == [
        {"role": "user", "content": "gg!"},
        {"role": "assistant", "content": "e"},
    ]


def test_a_conversation_without_a_user() -> None:
    with pytest.raises(DataError, match=r"row r3: its prompt has no message of a user"):
        with_request({"row_id": "r3", "prompt": turns("=h")}, str)


def test_feedback_where_there_is_no_solution() -> None:
    said = ["g", None, "h"]
    one = lessons("gh", ["e", "f", "ff"], [0.0, 0.0, 0.0], said)
    assert [lesson.teacher_ids for lesson in one] == [ids("aghbdgd"), [], ids("aghbdhd")]
    only = lessons("gh", ["e", "f", "ff"], [0.0, 1.0, 0.0], said, environment_feedback_only_without_solution=True)
    assert [lesson.teacher_ids for lesson in only] == [ids("aghbcfc"), [], ids("aghbcfc")]
    assert [lesson.feedback for lesson in only] == [None] * 3


def test_longer_prompts_are_not_taught_and_counted() -> None:
    """7 tokens fit; 8 do not, and are not cut."""
    found = lessons("gh", ["ff", "e", "e"], [1.0, 1.0, 0.0], [None] * 3, longest=7)
    assert [one.teacher_ids for one in found] == [ids("aghbcec"), [], []]
    assert [one.is_too_long for one in found] == [False, True, True]
    metrics = lesson_metrics([found, lessons("g", ["e"] * 3, [0.0] * 3, [None] * 3)])
    assert metrics == {
        "self_distillation/success_group_fraction": 0.5,
        "self_distillation/success_sample_fraction": 0.5,
        "self_distillation/feedback_available_fraction": 0.0,
        "self_distillation/feedback_used_fraction": 0.0,
        "self_distillation/reprompt_sample_fraction": pytest.approx(1 / 6),
        "self_distillation/too_long_fraction": pytest.approx(2 / 6),
        "self_distillation/reprompt_mean_length": 7.0,
    }
    assert lesson_metrics([[], []]) == {}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>a\nb</think> c ", "c"),
        ("a<think>b</think>c<think>d</think>", "ac"),
        # the prompt began the thought, and the end of a completion cut one off
        ("a b</think>c", "c"),
        ("c<think>a b", "c"),
        ("a</think>c<think>d</think>e", "ce"),
        ("no thought", "no thought"),
    ],
)
def test_thoughts_are_left_out(text: str, left: str) -> None:
    assert without_thinking(text) == left


def test_nothing_but_a_thought_is_no_solution() -> None:
    texts = ["<think>a</think>", "<think>a</think>b", "c"]
    found = lessons("gh", texts, [1.0, 1.0, 0.0], [None] * 3, remove_thinking_from_demonstration=True)
    assert [one.solution for one in found] == [1, None, 1]
    assert found[2].teacher_ids == ids("aghbcbc")


def test_records_say_who_taught() -> None:
    """By row ids, which go on where a prompt is sampled again."""
    one = sampled("gh", ["e", "f"], [0.0, 1.0])
    taught = Sampled(
        one.prompt,
        one.completions,
        one.texts,
        one.rewards,
        one.totals,
        lessons=[Lesson(False, 1, "g", "g", [5, 6]), Lesson(True)],
    )
    rows = rollout_records([taught, taught], [[0.0, 0.0]] * 2, 3)
    assert [row["row_id"] for row in rows] == ["r7/3/0", "r7/3/1", "r7/3/2", "r7/3/3"]
    assert [row["taught_by"] for row in rows] == ["r7/3/1", None, "r7/3/3", None]
    assert [(row["feedback"], row["teacher_prompt_ids"]) for row in rows[:2]] == [("g", [5, 6]), (None, [])]
    assert "taught_by" not in rollout_records([one], [[0.0, 0.0]], 1)[0]
