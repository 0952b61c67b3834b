"""Reward `code`: no hack is paid, no honest program is not, and what it says of tests that it cannot use."""

import pytest

from artifacts.errors import DataError, StageError
from stages.rollouts import code_tests
from stages.rollouts.code_reward import Code, code_of, verdicts
from stages.rollouts.rewards import RewardSet
from stages.rollouts.sandbox.limits import Limits
from stages.rollouts.sandbox.sandbox import Sandbox
from tests.rollouts.sandbox.hacks import HACKS, SQUARES
from tests.rollouts.sandbox.honest import HONEST, WRONG
from tests.rollouts.scored import prompts, score, spec

confined = pytest.mark.usefixtures("confining_kernel")


@pytest.fixture(scope="module", params=[True, False], ids=["namespaces", "bare"])
def quick(request, confining_kernel):
    """A sandbox with and without the outer layer."""
    with Sandbox(Limits(cpu_seconds=1, wall_seconds=60), namespaces=request.param) as sandbox:
        yield sandbox


def judged(sandbox, programs):
    """The verdicts by name."""
    return {
        name: all(verdicts(sandbox, source, code_tests.tests_of(tests), stop_early=True))
        for name, (source, tests) in programs.items()
    }


def test_no_hack_is_paid(quick):
    assert len(HACKS) >= 25
    assert judged(quick, HACKS) == dict.fromkeys(HACKS, False)


def test_a_hack_is_no_hindrance_to_the_next_program(quick):
    honest = "def square(n): return n * n"
    for source, _ in HACKS.values():
        verdicts(quick, source, code_tests.tests_of(SQUARES[:1]))
        assert verdicts(quick, honest, code_tests.tests_of(SQUARES)) == [True] * 3


def test_every_honest_program_passes(quick):
    assert len(HONEST) >= 25
    assert judged(quick, HONEST) == dict.fromkeys(HONEST, True)


def test_wrong_programs_do_not_pass(quick):
    assert judged(quick, WRONG) == dict.fromkeys(WRONG, False)


@confined
def test_the_reward_of_several_rows():
    """Rows go to several sandboxes; each reward comes back in its place."""
    names = [*HONEST, *WRONG]
    programs = [(HONEST | WRONG)[name] for name in names]
    fenced = [[{"role": "assistant", "content": f"So:\n```python\n{source}\n```\nDone."}] for source, _ in programs]
    rewards = Code(cpu_seconds=1, wall_seconds=60, workers=2).score(fenced, [tests for _, tests in programs])
    assert dict(zip(names, rewards, strict=True)) == dict.fromkeys(HONEST, 1.0) | dict.fromkeys(WRONG, 0.0)


@confined
def test_a_share_of_the_tests():
    source = "def square(n): return abs(n) * 3\n"  # right for 3 alone
    assert Code(credit="share", workers=1).score([source], [SQUARES]) == [1 / 3]
    # what came before an early end counts, what comes after does not
    early = "import os\ndef square(n): return n * n if n > 0 else os._exit(0)"
    assert Code(credit="share", workers=1).score([early], [SQUARES]) == [1 / 3]


@confined
def test_rows_without_tests_and_rows_with_unusable_ones():
    rewards = Code(workers=1).score(["x = 1"] * 3, [None, [], ["assert x == 1"]])
    assert rewards[0] is None and isinstance(rewards[1], DataError) and rewards[2] == 1.0


def rows_with(*tests):
    """Rows row0, row1, ... with these tests; see tests/rollouts/scored.py."""
    return prompts(*tests, column="tests")


@confined
def test_the_reward_in_a_set():
    """As a recipe names it: a row's tests are of all its completions."""
    rewards = RewardSet([spec("code", parameters={"workers": 1, "credit": "share"})], [2.0])
    rows = rows_with(SQUARES, ['{"call": "cube(2)", "expected": 8}'], None)
    made = ["def square(n): return n * n", "def square(n): return 9", "def cube(n): return n ** 3"]
    scores = score(rewards, rows, [made, made[1:], made[:1]])
    assert scores.by_function == {"code": [[1.0, 1 / 3, 0.0], [0.0, 1.0], [None]]}
    assert scores.totals == [[2.0, 2 / 3, 0.0], [0.0, 2.0], [None]]


@confined
def test_unusable_tests_name_their_row():
    with pytest.raises(StageError, match=r"judged by the program.*assert f\(1\) > 2") as error:
        score(RewardSet([spec("code")]), rows_with(["assert f(1) == 2"], ["assert f(1) > 2"]), [["x = 1"], ["x = 2"]])
    message = str(error.value)
    assert message.startswith("reward function 'code' cannot use the row's tests: a test would have to be judged")
    assert message.endswith("for row row1, completion 0: 'x = 2'")


@confined
def test_what_runs_before():
    made, tests = "def root(n): return sqrt(n)", ["assert root(9) == 3"]
    assert Code(workers=1).score([made, made], [tests, tests], ["from math import sqrt", None]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("First\n```python\nx = 1\n```\nbetter:\n```py\nx = 2\n```", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\ns = '```'\n```\n", "s = '```'\n"),
        ("```python\nx = 1", "```python\nx = 1"),
    ],
)
def test_the_code_of_a_completion(text, code):
    assert code_of(text) == code


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ("assert f(1) == 2", "must hold a list"),
        ([], "holds no test"),
        (["f(1) == 2"], "must be an assertion"),
        (["assert f(1) == g(2)"], "judged by the program that it tests: assert f(1) == g(2)"),
        (["assert f(1) > 2"], "judged by the program"),
        (["assert f(1) == 2 and f(2) == 3"], "judged by the program"),
        (["assert isinstance(f(1), int)"], "judged by the program"),
        (["assert (f(1) == 2) is True"], "judged by the program"),
        (["assert all(x == 1 for x in f(1))"], "judged by the program"),
        (["assert f(1) == "], "is no Python"),
        (['{"call": "f(1)"}'], "is none of an assertion"),
        (['{"call": "f(1", "expected": 1}'], "is no Python"),
        (['{"call": "f(1)", "expected": 1, "tolerance": "x"}'], "is none of"),
        ([{"input": 1, "output": "2"}], "is none of"),
        (['{"input": '], "no JSON"),
        ([3], "is none of"),
    ],
)
def test_tests_that_cannot_be_used(tests, said):
    with pytest.raises(DataError, match=r"tests|judged") as error:
        code_tests.tests_of(tests)
    assert said in str(error.value)


def test_expected_values_are_in_no_question():
    tests = code_tests.tests_of('["assert f(2) == 4711", "assert abs(f(2) - 4711) < 1", "assert not f(2)"]')
    assert [test.expression for test in tests] == ["f(2)"] * 3
    assert [test.accepts(4711) for test in tests] == [True, True, False]
    assert [test.accepts(4711.5) for test in tests] == [False, True, False]
    assert [test.accepts(0) for test in tests] == [False, False, True]


def test_null_may_be_expected():
    (test,) = code_tests.tests_of([{"call": "f(1)", "expected": None, "tolerance": None, "input": None}])
    assert test.accepts(None) and not test.accepts(False)
