"""Rewards in a recipe: what they become, and what is said of mistakes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from artifacts.errors import RequestError, StageError
from flows.recipe import Recipe
from stages.identity import semantic_config
from stages.rl import Config, check
from stages.rollouts.reward_spec import unknown_rewards
from stages.rollouts.rewards import RewardSet
from tests.rollouts.scored import prompts, score, spec

RECIPE = """
stages:
  rl:
    uses: rl
    inputs: {{model: {folder}, dataset: {folder}}}
    with:
      rewards:
        - numeric_match
        - {reward}
"""


def mistakes(tmp_path, reward: str) -> list[str]:
    """What is wrong with a recipe with this reward, after its place."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, reward=reward))
    try:
        Recipe.load(str(tmp_path / "recipe.yaml"))
    except RequestError as error:
        return [
            f"{problem.where.removeprefix('recipe.yaml:').partition(':')[2].strip()}: {problem.what}"
            for problem in error.problems
            if "rewards" in problem.where or "reward" in problem.what
        ]
    return []


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{name: cosine_length}", "cosine_length needs max_len"),
        ("{name: cosine_length, parameters: {max_length: 3}}", "has no parameter 'max_length'; did you mean 'max_len'"),
        ("{name: cosine_length, parameters: {max_len: '3'}}", "parameter max_len: Input should be a valid integer"),
        ("{name: cosine_length, parameters: {max_len: 0}}", "max_len: Input should be greater than 0, found 0"),
        ("{name: cosine_length, parameters: {max_len: 3, correct: maths}}", "parameter correct: Input should be"),
        ("{name: exact_match, parameters: {colum: x}}", "'colum'; did you mean 'column'?; it has column"),
        ("{name: soft_overlong, parameters: {max_completion_len: 3, soft_punish_cache: 4}}", "4 is more than"),
        ("{name: repetition_penalty, parameters: {max_penalty: 1.0}}", "less than or equal to 0"),
        ("{name: regular_expression, parameters: {pattern: '('}}", "pattern '(' is no regular expression: missing"),
        ("{name: json_schema}", "give one of expected (a schema) and column"),
        ("{name: json_schema, parameters: {expected: {type: whole}}}", "not a JSON schema: 'whole' is not valid"),
        ("{name: multiple_choice, parameters: {letters: AAB}}", "letters has one twice: 'AAB'"),
        ("{name: multiple_choice, parameters: {letters: 'A]'}}", "letters are capital ASCII letters or digits"),
        ("{name: exact_match, parametres: {}}", "unknown key; did you mean 'parameters'?"),
        ("{name: exact_match, timeout_seconds: 0}", "expected a number above 0 or null, found 0"),
        ("{name: exact_match, on_timeout: skip}", "expected one of error, none, found text 'skip'"),
        ("{name: exact_match, on_error: none}", "on_error: for functions of your own, found the built-in exact_match"),
        (
            "{name: judge, parameters: {model: m}, on_error: none, max_tries: 2}",
            "on_error and max_tries: for functions of your own, found the built-in judge; its parameters have",
        ),
        ("{name: exact_match, label: x, on_error: unscored}", "expected one of error, none, found text 'unscored'"),
        ("{name: exact_match, label: x, max_tries: 0}", "expected a whole number above 0, found 0"),
        ("{parameters: {}}", "missing; expected a function (file.py:name)"),
        ("7", "expected a function (file.py:name) or a mapping with the fields name, parameters,"),
        ("cosine_length", "cosine_length needs max_len: write {name: cosine_length, parameters: {...}}"),
        ("exact_mach", "no built-in reward 'exact_mach'; did you mean 'exact_match'?"),
        ("accuracy_reward", "no built-in reward 'accuracy_reward'; here it is math (TRL)"),
        ("{name: exact_mach}", "no built-in reward 'exact_mach'; did you mean 'exact_match'?"),
        ("numeric_match", "two rewards have the name 'numeric_match'; give one of them a label"),
        ("'nowhere.py:judge'", "no such Python file: 'nowhere.py'"),
        ("{name: 'nowhere.py:judge'}", "no such Python file: 'nowhere.py'"),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, reward, message):
    found = mistakes(tmp_path, reward)
    assert len(found) == 1 and message in found[0], found


@pytest.mark.parametrize(
    "reward",
    [
        "math",
        "{name: numeric_match, label: again}",
        "{name: soft_overlong, parameters: {max_completion_len: 5, soft_punish_cache: 5}}",
        "{name: regular_expression, parameters: {pattern: 'a{2}'}, timeout_seconds: 1, on_timeout: none}",
        "{name: judge, parameters: {model: some/model, sampling: {temperature: 0.5, stop: [x]}}, cache: false}",
    ],
)
def test_good_ones_are_taken(tmp_path, reward):
    assert mistakes(tmp_path, reward) == []


def test_a_name_alone_stays_what_it_was():
    config = Config.model_validate({"rewards": ["numeric_match"]})
    assert config.rewards == ("numeric_match",)
    assert semantic_config(config)["rewards"] == ["numeric_match"]
    assert check(config, frozenset({"model", "dataset"})) == []


def test_defaults_are_part_of_what_a_result_is_and_the_cache_is_not():
    def semantic(**fields: Any) -> Any:
        config = Config.model_validate({"rewards": [{"name": "math", **fields}]})
        again = Config.model_validate(config.model_dump(mode="json"))
        assert again == config
        return semantic_config(config)["rewards"]

    parameters = {"column": None, "extraction": "latex", "after": None, "comparison_seconds": 5.0}
    assert semantic() == semantic(parameters={"extraction": "latex"}, cache=True)
    assert semantic()[0]["parameters"] == parameters
    assert semantic() != semantic(parameters={"extraction": "any"})


def test_a_function_counts_by_its_source(tmp_path):
    path = tmp_path / "mine.py"
    found = []
    for body in ("return [1]", "return [2]", "return [1]"):
        path.write_text(f"def judge(completions):\n    {body}\n")
        config = Config.model_validate({"rewards": [{"name": f"{path}:judge", "parameters": {"a": [1, "x"]}}]})
        found.append(semantic_config(config)["rewards"])
    assert found[0] == found[2] != found[1]
    assert found[0][0]["parameters"] == {"a": [1, "x"]} and str(tmp_path) not in str(found)


def test_parameters_of_a_function_come_before_columns(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def judge(completions, answer, wanted):\n"
        "    return [(c == wanted) + 10 * (answer != 'x') for c in completions]\n"
        "def all_of_it(completions, **rest):\n    return [len(rest['answer']) for _ in completions]\n"
    )
    judge = spec(f"{tmp_path}/mine.py:judge", parameters={"wanted": "b", "answer": "given"})
    other = spec(f"{tmp_path}/mine.py:all_of_it", parameters={"answer": "four"})
    scores = score(RewardSet([judge, other]), prompts("x"), [["a", "b"]])
    assert scores.by_function == {"judge": [[10.0, 11.0]], "all_of_it": [[4.0, 4.0]]}
    with pytest.raises(StageError, match="'judge' takes no colour; correct its parameters"):
        score(RewardSet([spec(judge.name, parameters={"wanted": 1, "colour": 2})]), prompts("x"), [["a"]])


def test_a_module_serves_as_a_file_does(tmp_path, monkeypatch):
    (tmp_path / "judges_of_a_module.py").write_text("def judge(completions):\n    return [2] * len(completions)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert score(RewardSet(["judges_of_a_module:judge"]), prompts("x"), [["a"]]).totals == [[2.0]]


def test_one_reward_twice_under_two_labels():
    rewards = [
        spec("regular_expression", parameters={"pattern": "a+"}, label="letters"),
        spec("regular_expression", parameters={"pattern": "[0-9]+"}, label="digits"),
    ]
    assert unknown_rewards(rewards) == []
    scores = score(RewardSet(rewards, [1.0, 3.0]), prompts("x"), [["aa", "12", "-"]])
    assert scores.by_function == {"letters": [[1.0, 0.0, 0.0]], "digits": [[0.0, 1.0, 0.0]]}
    assert scores.totals == [[1.0, 3.0, 0.0]]
    with pytest.raises(ValidationError, match="pattern"):
        spec("math", label="two words")
