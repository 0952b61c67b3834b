"""Rewards: verdicts, totals, and what is said of a function that misbehaves."""

import re
import traceback

import pytest

from artifacts.errors import DataError, RequestError, StageError
from stages.rollouts.rewards import REWARD_MODEL, RewardSet, unknown_rewards
from tests.rollouts.scored import prompts, score


@pytest.fixture
def function(tmp_path):
    """function(source) -> reference to its function `judge`."""

    def write(source):
        (tmp_path / "judges.py").write_text(source)
        return f"{tmp_path}/judges.py:judge"

    return write


def test_exact_match_trims_white_space():
    scores = score(RewardSet(["exact_match"]), prompts("yes ", "no"), [["yes", " yes\n", "Yes"], ["no", ""]])
    assert scores.by_function == {"exact_match": [[1.0, 1.0, 0.0], [1.0, 0.0]]}
    assert scores.totals == [[1.0, 1.0, 0.0], [1.0, 0.0]]


def test_the_reference_may_be_a_conversational_completion():
    rows = prompts([{"role": "assistant", "content": "42"}], column="completion")
    rows[0].row["prompt"] = [{"role": "user", "content": "6 * 7?"}]
    assert score(RewardSet(["exact_match"]), rows, [["42", "43"]]).totals == [[1.0, 0.0]]


def test_numeric_match_compares_values():
    rows = prompts("so it is\n#### 1,000", 0.5, "none of them")
    texts = [["1000", "A: 1000.0", "1000 or 2000"], ["1/2", ".50"], ["1"]]
    scores = score(RewardSet(["numeric_match"]), rows, texts)
    assert scores.totals == [[1.0, 1.0, 0.0], [1.0, 1.0], [None]]


def test_a_dataset_without_reference_is_named():
    with pytest.raises(DataError, match="the dataset has question, row_id; keep one"):
        score(RewardSet(["exact_match"]), prompts("x", column="question"), [["y"]])


def test_functions_get_what_trl_gives_them(function):
    reference = function(
        "def judge(prompts, completions, completion_ids, level, **columns):\n"
        "    assert prompts == ['question 0', 'question 0', 'question 1'], prompts\n"
        "    assert completions == ['a', 'b', 'c'] and completion_ids == [[97], [98], [99]]\n"
        "    assert columns == {'row_id': ['row0', 'row0', 'row1']}, columns\n"
        "    return level\n"
    )
    assert score(RewardSet([reference]), prompts(3, 4, column="level"), [["a", "b"], ["c"]]).totals == [[3, 3], [4]]


def test_conversational_completions_are_messages(function):
    reference = function(
        "def judge(prompts, completions):\n"
        "    assert prompts[0][0]['role'] == 'user'\n"
        "    return [len(one[0]['content']) for one in completions if one[0]['role'] == 'assistant']\n"
    )
    rows = prompts("x")
    rows[0].row["prompt"] = [{"role": "user", "content": "hi"}]
    assert score(RewardSet([reference]), rows, [["abc"]]).totals == [[3.0]]


def test_weights_and_missing_scores(function):
    # 2 * exact + 0.5 * judge; where judge gives None only the first counts
    reference = function(
        "def judge(completions, **columns):\n    return [None if c == 'a' else -1 for c in completions]"
    )
    scores = score(RewardSet(["exact_match", reference], [2.0, 0.5]), prompts("a"), [["a", "b"]])
    assert scores.by_function == {"exact_match": [[1.0, 0.0]], "judge": [[None, -1.0]]}
    assert scores.totals == [[2.0, -0.5]]


def test_a_reward_model_scores_token_ids():
    def model(prompts, completions, texts):
        return [
            [sum(prompt.prompt_ids) + sum(one.token_ids) for one in group]
            for prompt, group in zip(prompts, completions, strict=True)
        ]

    scores = score(RewardSet(["exact_match"], [1, 0.1], reward_model=model), prompts("a", "a"), [["a"], ["b", "c"]])
    assert scores.by_function[REWARD_MODEL] == [[100.0], [101.0, 102.0]]
    assert scores.totals == [[1 + 0.1 * 100.0], [0.1 * 101.0, 0.1 * 102.0]]


def test_async_functions_run_together(tmp_path):
    # each waits for the other, so one after the other would not end
    (tmp_path / "judges_meeting_point.py").write_text(
        "import asyncio\nhere, there = asyncio.Event(), asyncio.Event()\n"
    )
    for name, mine, others, value in (("first", "here", "there", 1.0), ("second", "there", "here", 2.0)):
        (tmp_path / f"{name}.py").write_text(
            "import asyncio\n"
            "from judges_meeting_point import here, there\n"
            f"async def {name}(completions, **columns):\n"
            f"    {mine}.set()\n"
            f"    await asyncio.wait_for({others}.wait(), 60)\n"
            f"    return [{value}] * len(completions)\n"
        )
    rewards = RewardSet([f"{tmp_path}/first.py:first", f"{tmp_path}/second.py:second"])
    assert score(rewards, prompts("a"), [["a", "b"]]).totals == [[3.0, 3.0]]


# (body of the function, what the message must say); completions are 'a', 'b' of row0 and 'c' of row1
FAULTS = [
    (
        "return [1 / (c != 'b') for c in completions]",
        r"'judge' raised ZeroDivisionError: division by zero \(judges\.py:2\), for row row0, completion 1: 'b'",
    ),
    (
        "assert len(completions) < 2; return [1]",
        r"raised AssertionError \(judges\.py:2\), for 3 completions together, though not",
    ),
    ("return [1, 2]", r"returned 2 values for 3 completions \(rows row0 to row1\); it must return a list of 3"),
    ("return None", r"returned None; it must return a list of 3, one number \(or None\) a completion"),
    ("return 1.0", r"returned 1\.0; it must return a list of 3"),
    ("return [1, float('nan'), 2]", r"returned nan for row row0, completion 1; give a finite number"),
    ("return [1, 2, float('inf')]", r"returned inf for row row1, completion 0"),
    ("return [1, '2', 3]", r"returned '2' for row row0, completion 1"),
    ("return [1, [2], 3]", r"returned \[2\] for row row0, completion 1"),
    ("return [1, b'2', 3]", r"returned b'2' for row row0, completion 1"),
    ("return [1, 10**400, 3]", r"returned 1000.* for row row0, completion 1"),
    ("return [1, 1j, 3]", r"returned 1j for row row0, completion 1"),
    ("return [[1, 2, 3]]", r"returned 1 values for 3 completions"),
    ("import numpy; return numpy.ones((3, 2))", r"returned \[1\.0, 1\.0\] for row row0, completion 0"),
    ("import torch; return torch.tensor([1.0, float('nan'), 1.0])", r"returned nan for row row0, completion 1"),
    ("return {'a': 1, 'b': 2, 'c': 3}", r"returned \{'a': 1.*; it must return a list of 3"),
    ("return (1 for _ in completions)", r"returned <generator .*; it must return a list of 3"),
    ("return '123'", r"returned '123'; it must return a list of 3"),
    ("return [1, ValueError('found nothing'), 3]", r"'judge' found nothing, for row row0, completion 1: 'b'"),
    ("return [None, None, None]", r"no reward function scored any of 3 completions .* first of row row0; .* judge"),
]


@pytest.mark.parametrize("prefix", ["", "async "])
@pytest.mark.parametrize(("body", "message"), FAULTS)
def test_faults_are_named(function, prefix, body, message):
    rewards = RewardSet([function(f"{prefix}def judge(completions, **columns):\n    {body}\n")])
    with pytest.raises(StageError, match=message):
        score(rewards, prompts("x", "y"), [["a", "b"], ["c"]])


def test_an_error_names_the_users_line_and_keeps_the_users_frames(function):
    """Also where a library raises it: the innermost line of the user's file is 5, below that come frames of json."""
    source = "import json\ndef judge(completions):\n    return read('x')\n\ndef read(text): return json.loads(text)\n"
    rewards = RewardSet([function(source)])
    with pytest.raises(
        StageError, match=r"raised JSONDecodeError: .* \(judges\.py:5\), for row row0, completion 0"
    ) as caught:
        score(rewards, prompts("x"), [["a"]])
    shown = "".join(traceback.format_exception(caught.value))
    assert re.findall(r'judges\.py", line (\d+), in (\w+)', shown) == [("3", "judge"), ("5", "read")]


def test_a_function_that_asks_for_a_column_that_is_not_there(function):
    rewards = RewardSet([function("def judge(completions, solution):\n    return [1]\n")])
    with pytest.raises(
        StageError, match=r"'judge' asks for solution; it can have: answer, completion_ids, completions,"
    ):
        score(rewards, prompts("x"), [["a"]])


def test_a_column_that_is_looked_up_in_vain(function):
    """Those that there are are told; not of a key of another mapping that is a column, or where none are taken so."""
    rewards = RewardSet([function("def judge(completions, **columns):\n    return columns['solution']\n")])
    with pytest.raises(
        StageError,
        match=r"raised KeyError: 'solution' \(judges\.py:2\), which is none of answer, row_id, prompts, completions, "
        r"completion_ids, for row row0, completion 0",
    ):
        score(rewards, prompts("x"), [["a"]])
    for parameters, key in (("**columns", "answer"), ("completions", "solution")):
        rewards = RewardSet([function(f"def judge({parameters}):\n    return {{}}['{key}']\n")])
        with pytest.raises(StageError, match=rf"raised KeyError: '{key}' \(judges\.py:2\), for row row0"):
            score(rewards, prompts("x"), [["a"]])


def test_numbers_of_other_kinds_are_taken(function):
    rewards = RewardSet(
        [function("import numpy\ndef judge(completions, **c):\n    return numpy.array([True, False])\n")]
    )
    assert score(rewards, prompts("x"), [["a", "b"]]).totals == [[1.0, 0.0]]


def test_requests_that_cannot_work(function):
    assert unknown_rewards(["exact_match", "file.py:anything"]) == []
    with pytest.raises(RequestError, match=r"no built-in reward 'exact_mach'; did you mean 'exact_match'\?"):
        RewardSet(["exact_mach"])
    with pytest.raises(RequestError, match="3 reward_weights for 1 rewards: exact_match"):
        RewardSet(["exact_match"], [1, 2, 3])
    with pytest.raises(RequestError, match="two rewards have one name: judge, judge"):
        RewardSet([function("def judge(**c): ...\n")] * 2)
    with pytest.raises(
        StageError, match=r"cannot load reward .*judges\.py:judge: ModuleNotFoundError: .*'nowhere' \(judges\.py:1\)"
    ):
        RewardSet([function("import nowhere\ndef judge(**c): ...\n")])


def test_no_completions_give_no_rewards():
    scores = score(RewardSet(["exact_match"]), prompts("a"), [[]])
    assert scores.by_function == {"exact_match": [[]]} and scores.totals == [[]]
