"""Mathematical answers: verdicts, hostile formulas, and TRL's verdicts on the same texts."""

from __future__ import annotations

import os
import threading

import pytest
from trl.rewards import accuracy_reward, get_cosine_scaled_reward, reasoning_accuracy_reward

from stages.rollouts.lengths import CosineLength
from stages.rollouts.math_answers import WORKER, Math
from stages.rollouts.reward_base import OvertimeError
from stages.rollouts.rewards import RewardSet
from tests.rollouts.scored import prompts, score
from tests.waiting import LIMIT_SECONDS

# (right answer, completion, reward)
VERDICTS = [
    (r"\frac{1}{3}", r"My answer is \boxed{\frac{1}{3}}", 1.0),
    (r"\frac{1}{3}", r"\boxed{\frac{2}{6}}", 1.0),
    (r"\frac{1}{3}", r"\boxed{\frac{1}{2}}", 0.0),
    (r"$\frac{1}{3}$", r"\boxed{0.3333333}", 1.0),
    (r"$\frac{1}{3}$", r"\boxed{0.33}", 0.0),
    ("42", r"\boxed{42}", 1.0),
    ("42", "The final answer is $42$.", 1.0),
    ("42", "$42$", 0.0),
    ("42", "42", 0.0),
    ("#### 42", r"so \boxed{41 + 1}", 1.0),
    (r"$x^2 + 2x + 1$", r"\boxed{(x+1)^2}", 1.0),
    (r"$\{1, 2\}$", r"\boxed{\{2, 1\}}", 1.0),
    (r"$\sqrt{8}$", r"\boxed{2\sqrt{2}}", 1.0),
    ("no mathematics", r"\boxed{1}", None),
    ("", r"\boxed{1}", None),
    ("42", "", 0.0),
    ("42", r"\boxed{}", 0.0),
    ("42", r"\boxed{\frac{1}{0}}", 0.0),
    ("42", "\\boxed{42" + "{" * 200, 0.0),
    ("42", "\x00\ud83d", 0.0),
]


@pytest.mark.parametrize(("right", "completion", "reward"), VERDICTS)
def test_verdicts(right, completion, reward):
    assert Math().score(completions=[completion], answer=[right]) == [reward]


def test_what_counts_as_an_answer():
    assert Math(extraction="any").score(completions=["it is 42", "it is 43"], answer=["42", "42"]) == [1.0, 0.0]
    texts = [
        r"\boxed{1}</think>\boxed{42}",
        r"\boxed{42}</think>\boxed{1}",
        r"\boxed{42}",
        r"a</think>b</think>\boxed{42}",
    ]
    assert Math(after="</think>").score(completions=texts, answer=["42"] * 4) == [1.0, 0.0, 0.0, 1.0]


HOSTILE = [
    r"\boxed{9^{9^{9^{9^9}}}}",
    r"\boxed{(10^{10})!}",
    r"\boxed{\int_0^1 e^{x^{x^{x^x}}} \sin(x^{99}) dx}",
    r"\boxed{\sum_{n=1}^{10^{12}} \frac{1}{n^n}}",
]


@pytest.mark.parametrize("formula", HOSTILE)
def test_a_formula_that_never_ends_is_wrong_and_the_next_one_is_judged(formula):
    found = Math(comparison_seconds=0.4).score(completions=[formula, r"\boxed{42}"], answer=["42", "42"])
    assert found == [0.0, 1.0]


def test_a_right_answer_that_never_ends_is_said():
    right = "$" + "x + 1 - " * 3000 + "x$"
    (found,) = Math(comparison_seconds=0.02).score(completions=[r"\boxed{1}"], answer=[right])
    assert isinstance(found, OvertimeError) and "could not read the right answer '$x + 1 - x" in str(found)


def test_the_limit_holds_in_every_thread():
    found = []
    work = threading.Thread(
        target=lambda: found.extend(
            Math(comparison_seconds=0.4).score(completions=[HOSTILE[0], r"\boxed{42}"], answer=["42", "42"])
        )
    )
    work.start()
    work.join(LIMIT_SECONDS)
    assert found == [0.0, 1.0]


def test_the_worker_knows_no_secret(monkeypatch):
    monkeypatch.setenv("A_SECRET", "x")
    WORKER.stop()
    assert Math().score(completions=[r"\boxed{1}"], answer=["1"]) == [1.0]
    with open(f"/proc/{WORKER._process.pid}/environ", "rb") as stream:
        assert b"A_SECRET" not in stream.read()
    assert os.environ["A_SECRET"] == "x"


def turns(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_verdicts_are_those_of_trl():
    rights, texts = [case[0] for case in VERDICTS], [case[1] for case in VERDICTS]
    assert Math().score(completions=texts, solution=rights) == accuracy_reward(turns(texts), rights)
    thoughts = [text + "</think>" + text if index % 2 else text for index, text in enumerate(texts)]
    # TRL does not look at the right answer of an unfinished thought; we say None where it cannot be read
    mine = Math(after="</think>").score(completions=thoughts, solution=rights)
    assert [value or 0.0 for value in mine] == [
        value or 0.0 for value in reasoning_accuracy_reward(turns(thoughts), rights)
    ]


def test_cosine_length_is_trls():
    rights, texts = [case[0] for case in VERDICTS], [case[1] for case in VERDICTS]
    ids = [[1] * (7 * index % 40) for index in range(len(texts))]
    theirs = get_cosine_scaled_reward(30, -2.0, -0.25, 0.1, 1.5)(turns(texts), rights, ids)
    mine = CosineLength(
        max_len=30, min_value_wrong=-2.0, max_value_wrong=-0.25, min_value_correct=0.1, max_value_correct=1.5
    ).score(completions=texts, completion_ids=ids, solution=rights)
    assert mine == theirs


def test_it_is_ready_for_use_by_name():
    found = score(RewardSet(["math"]), prompts("42", "42", column="solution"), [[r"\boxed{42}"], [r"\boxed{43}"]])
    assert found.totals == [[1.0], [0.0]]
