"""Built-in rewards: values by hand, and completions that try to get more than they deserve."""

from __future__ import annotations

import json

import pytest

from artifacts.errors import DataError
from stages.rollouts.choices import MultipleChoice, final_choice, right_choice
from stages.rollouts.formats import JsonSchema, RegularExpression, ThinkFormat
from stages.rollouts.lengths import CosineLength, RepetitionPenalty, SoftOverlong
from stages.rollouts.verdicts import ExactMatch, NumericMatch


def test_the_right_answer_stands_in_the_column_that_is_named():
    columns = {"answer": ["1"], "gold": ["2"]}
    assert NumericMatch().score(completions=["2"], **columns) == [0.0]
    assert NumericMatch(column="gold").score(completions=["2"], **columns) == [1.0]
    assert ExactMatch().score(completions=["2"], solution=["2"], row_id=["r"]) == [1.0]
    with pytest.raises(DataError, match="compares with column gold; the dataset has answer"):
        NumericMatch(column="gold").score(completions=["2"], answer=["1"])


CHOICES = [
    ("B", "B"),
    (" (b) ", "B"),
    ("B.", "B"),
    ("B) Paris", "B"),
    ("(B) Paris", "B"),
    ("**B**", "B"),
    ("The answer is B.", "B"),
    ("The answer is (b), since A is wrong.", "B"),
    ("Answer: C", "C"),
    ("First I thought the answer is A. Then: the answer is D", "D"),
    ("so it is \\boxed{C}", "C"),
    ("\\boxed{A} or rather \\boxed{\\text{B}}", "B"),
    ("the answer is A, but boxed I write \\boxed{C}", "C"),
    ("Let us think.\nA is wrong, C too.\n\nD", "D"),
    ("The answer is:\nB", "B"),
    ("The answer is A because it is so", "A"),
    ("Option A is wrong.\nOption B is wrong.\nC", "C"),
    ("The answer is A? No.\nB", "B"),
    ("The correct option is (d)", "D"),
    ("A. is wrong. The answer is B.", "B"),
    # no choice, or more than one
    ("Option A is wrong. Option B is wrong too.", None),
    ("The answer is not B", None),
    ("", None),
    ("the answer is a matter of taste", None),
    ("I think it is Paris", None),
    ("The answer is A or B", None),
    ("Answer: A, B, C, D", None),
    ("\\boxed{A, B}", None),
    ("A B C D", None),
    ("A\nB\nC or D", None),
    ("K", None),
    ("The answer is A great city", None),
]


@pytest.mark.parametrize(("text", "letter"), CHOICES)
def test_the_choice_that_a_completion_settles_on(text, letter):
    assert final_choice(text, "ABCDEFGHIJ") == letter


def test_right_choices_are_letters_or_places():
    for reference, letter in (
        ("C", "C"),
        ("c", "C"),
        ("(C)", "C"),
        ("(c) text", "C"),
        ("C. text", "C"),
        ("2", "C"),
        ("10", None),
        ("Paris", None),
        ("A great city", None),
        ("I", "I"),
        ("", None),
        ("-1", None),
    ):
        assert right_choice(reference, "ABCDEFGHIJ") == letter, reference
    reward = MultipleChoice(letters="ABCD")
    answers = ["B", 1, "b", None, "E", 7]
    assert reward.score(completions=["(B)"] * 6, answer=answers) == [1.0, 1.0, 1.0, None, None, None]
    assert reward.score(completions=["A or B", "E", ""], answer=["B", "B", "B"]) == [0.0, 0.0, 0.0]


def test_think_format():
    texts = ["<think>a</think>b", "<think></think>", "<think>a", "a<think>b</think>", "<think>a<think>b</think>", ""]
    assert ThinkFormat().score(completions=texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    # the template wrote the tag; one of the model's own is a second
    opened = ThinkFormat(prefix="<think>\n")
    assert opened.score(completions=["a</think>b", "<think>a</think>b", "a"]) == [1.0, 0.0, 0.0]


def test_regular_expression():
    whole = RegularExpression(pattern=r"\d+")
    assert whole.score(completions=["12", " 12\n", "12a", "", "1\n2"]) == [1.0, 1.0, 0.0, 0.0, 0.0]
    anywhere = RegularExpression(pattern=r"(?i)answer: \d", match="anywhere")
    assert anywhere.score(completions=["so ANSWER: 1.", "answer 1"]) == [1.0, 0.0]


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "pattern": "^[A-Z]"}, "people": {"type": "integer", "minimum": 0}},
    "required": ["city"],
    "additionalProperties": False,
}
JSON = [
    ('{"city": "Paris", "people": 3}', 1.0),
    (' {"city": "Paris"}\n', 1.0),
    ('{"city": "paris"}', 0.0),
    ('{"people": 3}', 0.0),
    ('{"city": "Paris", "people": -1}', 0.0),
    ('{"city": "Paris", "more": 1}', 0.0),
    ('{"city": "Paris"} and more', 0.0),
    ('{"city": "Paris", "people": NaN}', 0.0),
    ('{"people": "many", "city": "x", "city": "Paris"}', 0.0),
    ('{"city": "x", "city": "Paris"}', 0.0),
    ("[" * 100_000, 0.0),
    ('{"a":' * 100_000, 0.0),
    ("9" * 10_000, 0.0),
    ("", 0.0),
    ('"\ud800"', 0.0),
]


@pytest.mark.parametrize(("text", "reward"), JSON)
def test_json_schema(text, reward):
    assert JsonSchema(expected=SCHEMA).score(completions=[text]) == [reward]


def test_json_in_a_fenced_block():
    good, bad = '{"city": "Paris"}', '{"city": 1}'
    texts = [f"Here:\n```json\n{good}\n```\n", f"```\n{bad}\n```\nno:\n```\n{good}\n```", good, f"```json\n{bad}\n```"]
    assert JsonSchema(expected=SCHEMA, fenced=True).score(completions=texts) == [1.0, 1.0, 0.0, 0.0]


def test_long_hostile_texts_take_no_quadratic_time():
    """Each would take hours if it did."""
    size = 300_000
    hostile = ["answer" + " " * size, "answer is " * (size // 8), "\\boxed{" * (size // 7), "answer" + " \n" * size]
    for text in [*hostile, "(" * size, "B" * size, "- " * size]:
        assert final_choice(text, "ABCD") is None
    fences = JsonSchema(expected=SCHEMA, fenced=True)
    assert fences.score(completions=["```\nx" * (size // 5), "```\n" * (size // 4)]) == [0.0, 0.0]


def test_every_row_may_have_a_schema_of_its_own():
    reward = JsonSchema(column="form")
    forms = [{"type": "integer"}, json.dumps({"type": "string"}), None]
    assert reward.score(completions=["1", "1", "1"], form=forms) == [1.0, 0.0, None]
    with pytest.raises(DataError, match="row r1, column 'form': not a JSON schema: 'whole' is not valid"):
        reward.score(completions=["1", "1"], form=[{}, {"type": "whole"}], row_id=["r0", "r1"])
    with pytest.raises(DataError, match="no column 'form'; it has row_id"):
        reward.score(completions=["1"], row_id=["r0"])


def test_a_schema_is_never_fetched():
    """A reference elsewhere is an error, whatever the completion; no network is asked."""
    reward = JsonSchema(expected={"$ref": "http://127.0.0.1:9/schema.json"})
    with pytest.raises(Exception, match="Unresolvable"):
        reward.score(completions=["1"])


def test_repetition_penalty():
    # 4 bigrams of 5 5 5 5 5, one of them different: 1 - 1/4; 1 2 1 2 1 has 12 21 12 21: 1 - 2/4
    reward = RepetitionPenalty(ngram_size=2, max_penalty=-2.0)
    ids = [[1, 2, 3, 4], [5] * 5, [1, 2, 1, 2, 1], [7], []]
    assert reward.score(completion_ids=ids) == [0.0, -1.5, -1.0, 0.0, 0.0]


def test_soft_overlong():
    # free up to 80; 90 is half of the way to 100
    reward = SoftOverlong(max_completion_len=100, soft_punish_cache=20)
    assert reward.score(completion_ids=[[1] * n for n in (0, 80, 85, 90, 100, 101)]) == [0, 0, -0.25, -0.5, -1, -1]
    sharp = SoftOverlong(max_completion_len=10, soft_punish_cache=0)
    assert sharp.score(completion_ids=[[1] * 10, [1] * 11]) == [0.0, -1.0]


def test_cosine_length():
    # cos is 1, 0 and -1 at 0, half and all of max_len; beyond it stays where it is
    reward = CosineLength(max_len=10, correct="exact_match")
    ids = [[1] * n for n in (0, 5, 10, 20)]
    right = reward.score(completions=["x"] * 4, completion_ids=ids, answer=["x"] * 4)
    wrong = reward.score(completions=["y"] * 4, completion_ids=ids, answer=["x"] * 4)
    assert right == pytest.approx([1.0, 0.75, 0.5, 0.5], abs=1e-15)
    assert wrong == pytest.approx([-1.0, -0.75, -0.5, -0.5], abs=1e-15)
    assert reward.score(completions=["x"], completion_ids=[[1]], answer=[None]) == [None]
    chosen = CosineLength(max_len=10, correct="multiple_choice", column="key", max_value_correct=3.0)
    assert chosen.score(completions=["(B)"], completion_ids=[[]], key=["B"], answer=["A"]) == [3.0]
