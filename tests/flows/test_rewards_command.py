"""`posttrain rewards`: the example of each built-in reward is worth what it says, and is what a recipe takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from flows import cli
from stages.rl import Config as RlConfig
from stages.rollouts.judge import Judge
from stages.rollouts.reward_base import BuiltIn
from stages.rollouts.reward_spec import REWARDS, unknown_rewards
from stages.rollouts.sandbox.kernel import probe


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["rewards", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def scored(reward: BuiltIn, example: dict[str, Any]) -> Any:
    """What the reward itself says of the example; a judge of the reply."""
    if isinstance(reward, Judge):
        return reward.read(example["reply"])
    row = dict(example["row"])
    arguments = {"prompts": [row.pop("prompt")], "completions": [example["completion"]]}
    arguments |= {name: [value] for name, value in row.items()}
    if "completion_ids" in example:
        arguments["completion_ids"] = [example["completion_ids"]]
    named = reward.score.__code__.co_varnames[1 : reward.score.__code__.co_argcount]
    takes_all = bool(reward.score.__code__.co_flags & 0x08)  # **columns
    (value,) = reward.score(**{name: value for name, value in arguments.items() if takes_all or name in named})
    return value


@pytest.mark.parametrize("name", REWARDS)
def test_an_example_is_worth_what_it_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "code" and (lacks := probe().missing()):
        pytest.skip(f"no sandbox on this kernel: {'; '.join(lacks)}")
    (found,) = asked(capsys, name).values()
    settings = RlConfig.model_validate(yaml.safe_load(found["recipe"]))
    assert unknown_rewards(settings.rewards) == []
    (entry,) = settings.rewards
    reward = REWARDS[name].model_validate({} if isinstance(entry, str) else entry.parameters)
    assert scored(reward, found["example"]) == pytest.approx(found["example"]["score"], abs=1e-12)
    assert found["example"]["why"]


def test_all_of_them_with_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys)
    assert list(found) == list(REWARDS)
    for name, reward in REWARDS.items():
        assert found[name]["summary"] == " ".join((reward.__doc__ or "").split("\n\n")[0].split())
        assert [field["name"] for field in found[name]["fields"]] == list(reward.model_fields)
        assert all(field["meaning"] for field in found[name]["fields"]), name
        required = {field["name"] for field in found[name]["fields"] if field["default"] == "required"}
        assert required == {field for field, info in reward.model_fields.items() if info.is_required()}


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rewards"]) == 0
    shown = capsys.readouterr().out
    assert all(any(line.split()[:1] == [name] for line in shown.splitlines()) for name in REWARDS)
    assert "timeout_seconds" in shown
    assert cli.main(["rewards", "soft_overlong"]) == 0
    shown = capsys.readouterr().out
    assert "{name: soft_overlong, parameters: {max_completion_len: 10, soft_punish_cache: 2}}" in shown
    assert "score" in shown and "-0.5: 9 tokens" in shown and "max_completion_len  required" in shown


@pytest.mark.parametrize(
    ("name", "said"),
    [("mth", "no built-in reward 'mth'; did you mean 'math'?"), ("accuracy_reward", "here it is math (TRL)")],
)
def test_one_that_there_is_not(name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rewards", name]) == 2
    assert said in capsys.readouterr().err
