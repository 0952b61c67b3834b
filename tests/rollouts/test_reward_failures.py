"""Functions that raise and may: they are called again, or leave completions unscored, which is counted and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from artifacts import open_store
from artifacts.errors import StageError
from stages.rollouts.rewards import RewardSet
from tests.rollouts.scored import prompts, score, spec

# writes down what it is called with; "bad" makes it raise, and "soon" until a call has been made so often
JUDGE = """
from pathlib import Path
ASKED = Path(__file__).with_suffix(".asked")
{prefix}def judge(completions, answer, patience=0):
    with open(ASKED, "a") as stream:
        stream.write(" ".join(completions) + "\\n")
    calls = ASKED.read_text().splitlines().count(" ".join(completions))
    if "bad" in completions or ("soon" in completions and calls <= patience):
        raise ValueError(completions[-1])
    return [float(len(text)) for text in completions]
"""


class World:
    """Rewards of a recipe, and what the function was called with and what was said since one last asked."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.source = folder / "judges.py"
        self.source.write_text(JUDGE.format(prefix=prefix))
        self.said: list[str] = []

    def rewards(self, *more: Any, **fields: Any) -> RewardSet:
        store = open_store(str(self.source.parent / "store"))
        judge = spec(f"{self.source}:judge", **fields)
        return RewardSet([judge, *more], open_shards=store.shards, say=self.said.append)

    def asked(self) -> list[str]:
        path = self.source.with_suffix(".asked")
        found = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return found


@pytest.fixture(params=["", "async "])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return World(tmp_path, request.param)


SAID = (
    "reward function 'judge' failed for 2 of 4 completions, which it leaves unscored (on_error: none); the first, row "
    "row0, completion 1: ValueError: bad (judges.py:9)"
)


def test_what_it_cannot_score_is_left_out_and_said(world: World) -> None:
    """Of four completions it raises for two; another function has a value for all."""
    rewards = world.rewards("exact_match", on_error="none")
    scores = score(rewards, prompts("a", "bad"), [["a", "bad"], ["bad", "ccc"]])
    assert scores.by_function == {"judge": [[1.0, None], [None, 3.0]], "exact_match": [[1.0, 0.0], [1.0, 0.0]]}
    assert scores.totals == [[2.0, 0.0], [1.0, 3.0]]
    assert scores.failed == {"judge": [[False, True], [True, False]]} and rewards.may_fail == ["judge"]
    assert world.said == [SAID]
    assert world.asked() == ["a bad bad ccc", "a", "bad", "bad", "ccc"]
    assert score(rewards, prompts("a"), [["a"]]).failed == {"judge": [[False]]} and len(world.said) == 1


def test_without_it_the_stage_ends(world: World) -> None:
    with pytest.raises(StageError, match=r"raised ValueError: bad \(judges\.py:9\), for row row0, completion 1: 'bad'"):
        score(world.rewards(), prompts("a"), [["a", "bad"]])
    assert score(world.rewards(), prompts("a"), [["a"]]).failed == {}


def test_it_is_called_again_with_the_same(world: World) -> None:
    """Twice it raises, the third time not: three tries are enough, two are not."""
    texts = [["a", "soon"]]
    scores = score(world.rewards(max_tries=3, parameters={"patience": 2}), prompts("x"), texts)
    assert scores.totals == [[1.0, 4.0]] and world.asked() == ["a soon"] * 3
    again = world.rewards(max_tries=2, parameters={"patience": 2})
    with pytest.raises(StageError, match=r"\(judges\.py:9\), in the last of 2 tries, for row row0, completion 1"):
        score(again, prompts("x"), texts)
    assert world.asked() == ["a soon"] * 2 + ["a"] + ["soon"] * 2
    # alone each has its tries too
    patient = world.rewards(max_tries=2, on_error="none", parameters={"patience": 1})
    assert score(patient, prompts("x"), [["bad", "soon"]]).totals == [[None, 4.0]]
    assert world.asked() == ["bad soon"] * 2 + ["bad", "soon"] * 2


def test_a_slow_call_is_not_made_again(tmp_path: Path) -> None:
    """Nor is a slow completion one that failed."""
    (tmp_path / "judges.py").write_text(
        "import asyncio\ncalls = []\nasync def judge(completions):\n    calls.append(completions)\n"
        "    if 'slow' in completions: await asyncio.sleep(600)\n"
        "    if 'bad' in completions: raise ValueError(len(calls))\n"
        "    return [float(len(calls))] * len(completions)\n"
    )
    fields = {"timeout_seconds": 0.1, "on_timeout": "none", "max_tries": 3, "on_error": "none"}
    scores = score(RewardSet([spec(f"{tmp_path}/judges.py:judge", **fields)]), prompts("x"), [["slow", "bad", "a"]])
    # call 1 for all; 2 to 4 for each; 5 and 6 again for the one that raised
    assert scores.by_function["judge"] == [[None, None, 4.0]]
    assert scores.failed == {"judge": [[False, True, False]]}


def test_an_exception_in_the_place_of_a_value(tmp_path: Path) -> None:
    (tmp_path / "judges.py").write_text("def judge(completions):\n    return [1, ValueError('found nothing')]\n")
    said: list[str] = []
    rewards = RewardSet([spec(f"{tmp_path}/judges.py:judge", on_error="none")], say=said.append)
    assert score(rewards, prompts("x"), [["a", "b"]]).totals == [[1.0, None]]
    assert said[0].endswith(
        "failed for 1 of 2 completions, which it leaves unscored (on_error: none); the first, row "
        "row0, completion 1: found nothing"
    )


def test_what_is_wrong_with_the_function_is_no_failure(tmp_path: Path) -> None:
    for source, message in (
        ("def judge(completions, nowhere):\n    return [1]\n", "'judge' asks for nowhere; it can have: answer"),
        ("def judge(completions):\n    return [1, 2]\n", "returned 2 values for 1 completions"),
        ("def judge(completions):\n    return [float('nan')]\n", "returned nan for row row0, completion 0"),
    ):
        (tmp_path / "judges.py").write_text(source)
        with pytest.raises(StageError, match=message):
            score(RewardSet([spec(f"{tmp_path}/judges.py:judge", on_error="none", max_tries=2)]), prompts("x"), [["a"]])


def test_where_nothing_is_scored_the_first_error_is_told(world: World) -> None:
    with pytest.raises(
        StageError, match=r"scored any of 2 completions .* first of row row0; .* failed for 2 of 2 .*:9"
    ):
        score(world.rewards(on_error="none"), prompts("x"), [["bad", "bad"]])


def test_failures_are_not_cached(world: World) -> None:
    """As what was too slow: the next run asks again for them, and only for them."""
    texts = [["a", "bad", "bad"]]
    for expected in (["a bad", "a", "bad"], ["bad"]):
        scores = score(world.rewards(on_error="none", cache=True), prompts("x"), texts)
        assert scores.totals == [[1.0, None, None]] and scores.failed == {"judge": [[False, True, True]]}
        assert world.asked() == expected
