"""Rewards that were paid for once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from artifacts import open_store
from artifacts.errors import StageError
from stages.rollouts.reward_cache import reward_identity
from stages.rollouts.rewards import RewardSet
from tests.rollouts.scored import prompts, score, spec

# writes down what it was asked for
JUDGE = """
from pathlib import Path
def judge(completions, answer, factor=1):
    with open(Path(__file__).with_suffix(".asked"), "a") as stream:
        stream.writelines(text + "\\n" for text in completions)
    if "bad" in completions:
        raise ValueError("bad")
    return [None if text == "?" else factor * len(text) / 3 for text in completions]
"""


@pytest.fixture
def world(tmp_path):
    """world(rewards of a recipe...) -> a fresh RewardSet on the store, as another run has it; asked() -> texts."""
    source = tmp_path / "judges.py"
    source.write_text(JUDGE)

    class World:
        judge = f"{source}:judge"

        def __init__(self):
            self.store = open_store(str(tmp_path / "store"))

        def rewards(self, **fields):
            return RewardSet([spec(self.judge, cache=True, **fields)], open_shards=self.store.shards)

        def asked(self):
            path = source.with_suffix(".asked")
            found = path.read_text().split() if path.exists() else []
            path.unlink(missing_ok=True)
            return found

    return World()


def test_nothing_is_asked_twice_and_nothing_changes(world, tmp_path):
    texts = [["a", "bb", "?"], ["ccccc"]]
    plain = score(RewardSet([world.judge]), prompts("x", "y"), texts)
    world.asked()
    first = score(world.rewards(), prompts("x", "y"), texts)
    assert first == plain and world.asked() == ["a", "bb", "?", "ccccc"]
    # another run; what was not scored is asked again
    assert score(world.rewards(), prompts("x", "y"), texts) == plain
    assert world.asked() == ["?"]
    # a part of it, in another order, with something new
    mixed = score(world.rewards(), prompts("x", "y"), [["new", "a"], ["ccccc"]])
    assert mixed.totals == [[1.0, 1 / 3], [5 / 3]] and world.asked() == ["new"]
    # equal completions of a row, and those of an earlier call
    assert score(world.rewards(), prompts("x"), [["two", "two"]]).totals == [[1.0, 1.0]] and world.asked() == ["two"]
    rewards = world.rewards()
    assert score(rewards, prompts("x"), [["once"]]) == score(rewards, prompts("x"), [["once"]])
    assert world.asked() == ["once"]


def test_row_parameters_and_source_count(world):
    rows = prompts("x")
    score(world.rewards(), rows, [["a"]])
    assert world.asked() == ["a"]
    score(world.rewards(), prompts("other answer"), [["a"]])
    assert world.asked() == ["a"]
    assert score(world.rewards(parameters={"factor": 2}), rows, [["a"]]).totals == [[2 / 3]]
    assert world.asked() == ["a"]
    path = Path(world.judge.rpartition(":")[0])
    path.write_text(JUDGE.replace("/ 3", "/ 4"))
    assert score(world.rewards(), rows, [["a"]]).totals == [[0.25]]
    assert world.asked() == ["a"]
    path.write_text(JUDGE)
    assert score(world.rewards(label="other", timeout_seconds=60), rows, [["a"]]).totals == [[1 / 3]]
    assert world.asked() == []


def test_what_was_paid_before_a_failure_is_kept(world, monkeypatch):
    monkeypatch.setattr("stages.rollouts.rewards._SAVED_AT_ONCE", 2)
    texts = [["a", "bb", "c", "bad", "dd"]]
    with pytest.raises(StageError, match=r"raised ValueError: bad \(.*:\d+\), for row row0, completion 3: 'bad'"):
        score(world.rewards(), prompts("x"), texts)
    # the first two together; c and bad together, then one by one to find the culprit
    assert world.asked() == ["a", "bb", "c", "bad", "c", "bad"]
    with pytest.raises(StageError):
        score(world.rewards(), prompts("x"), texts)
    assert world.asked() == ["c", "bad", "c", "bad"]


def test_another_functions_failure_costs_nothing(world, tmp_path):
    (tmp_path / "others.py").write_text("def raises(completions):\n    raise ValueError('mine')\n")
    other = f"{tmp_path}/others.py:raises"
    for order in ([world.judge, other], [other, world.judge]):
        rewards = RewardSet([spec(name, cache=True) for name in order], open_shards=world.store.shards)
        with pytest.raises(
            StageError, match=r"'raises' raised ValueError: mine \(others\.py:2\), for row row0, completion 0"
        ):
            score(rewards, prompts("x"), [["a"]])
    assert world.asked() == ["a"]


def test_a_damaged_entry_is_asked_again(world, tmp_path):
    score(world.rewards(), prompts("x"), [["a", "bb"]])
    world.asked()
    (shard,) = [path for path in (tmp_path / "store").rglob("*") if path.is_file() and "shards" in path.parts]
    assert sorted(json.loads(shard.read_text()).values()) == [1 / 3, 2 / 3]
    shard.write_text(shard.read_text().replace("0.3", "0.9"))
    assert score(world.rewards(), prompts("x"), [["a", "bb"]]).totals == [[1 / 3, 2 / 3]]
    assert world.asked() == ["a", "bb"]


def test_what_json_has_not_is_named(world):
    with pytest.raises(StageError, match=r"'judge' cannot be cached, since a column holds what JSON has not.*cache: f"):
        score(world.rewards(), prompts({1, 2}), [["a"]])


def test_it_is_off_unless_asked_for(world, tmp_path):
    rewards = RewardSet(["exact_match", world.judge], open_shards=open_store(str(tmp_path / "store")).shards)
    for _ in range(2):
        score(rewards, prompts("x"), [["a"]])
    assert world.asked() == ["a", "a"]


def test_identities():
    judge = spec("judge", parameters={"model": "m"})
    slower = spec("judge", parameters={"model": "m", "max_concurrent": 1, "api_key_variable": None}, timeout_seconds=9)
    assert reward_identity(judge) == reward_identity(slower)
    assert reward_identity(judge) != reward_identity(spec("judge", parameters={"model": "n"}))
    assert reward_identity(spec("math"))["version"] == 1
