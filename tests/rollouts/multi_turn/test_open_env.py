"""Environments behind a server that speaks OpenEnv's protocol."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from artifacts.errors import StageError
from stages.rollouts.multi_turn.open_env import OpenEnvServer
from stages.rollouts.requests import Completion, SamplingConfig
from stages.seeds import derive
from tests.data.chat_templates import CHATML
from tests.rollouts.multi_turn.open_env_server import Guessing, served
from tests.rollouts.multi_turn.scripted import END, Script, multi_turn, prompt, tokenizer

TOKENIZER = tokenizer(CHATML)
QUESTION = [{"role": "user", "content": "guess: "}]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[Guessing]]]:
    with served() as found:
        yield found


def played(url: str, script: dict[int, list[str]], changes: dict[str, Any] | None = None, **settings: Any) -> Any:
    parameters = {"environment": "guessing", "observation_field": "hint", **(changes or {})}
    made = multi_turn(TOKENIZER, environment={"name": "openenv", "url": url, "parameters": parameters, **settings})
    row = prompt(made, TOKENIZER, QUESTION, number=5)
    (group,) = made(Script(TOKENIZER, script), [row], [tuple(script)], SamplingConfig(max_completion_length=500))
    return group


def contents(completion: Completion) -> list[str]:
    assert completion.episode is not None
    return [message["content"] for message in completion.episode.messages]


@pytest.mark.parametrize("transport", ["websocket", "http"])
def test_episodes_have_sessions_of_their_own(server: tuple[str, list[Guessing]], transport: str) -> None:
    """A column of the row is given to the reset; what is no number is told so, and costs no step."""
    url, sessions = server
    del sessions[:]
    script = {7: ["3" + END, "5" + END], 8: ["9" + END, "five" + END, " 5 " + END]}
    first, second = played(url, script, {"transport": transport, "reset_columns": ["number"]})
    assert contents(first) == ["3", "higher", "5"]
    assert contents(second) == ["9", "lower", "five", "error: guess must be of type integer", " 5 "]
    assert first.episode.opening.messages[-1]["content"] == "guess: begin"
    assert (first.episode.environment_rewards, second.episode.environment_rewards) == ((0.0, 1.0), (0.0, None, 1.0))
    assert [session.steps for session in sessions] == [2, 2]
    assert {session.given["number"] for session in sessions} == {5}


def test_completions_of_a_row_have_its_seed(server: tuple[str, list[Guessing]]) -> None:
    url, sessions = server
    del sessions[:]
    number = derive(0, "openenv", "r0") % 2**31 % 10
    found = played(url, {7: [f"{number}{END}"], 8: [f"{number}{END}"]})
    assert [one.episode.environment_reward for one in found] == [1.0, 1.0]
    assert len({session.given["seed"] for session in sessions}) == 1 and len(sessions) == 2


def test_whole_actions_and_observations_are_json(server: tuple[str, list[Guessing]]) -> None:
    """Without fields named: an action has one beside OpenEnv's own; an observation two, so it is shown whole."""
    found = OpenEnvServer.of(server[0], {"environment": "guessing"}, 10.0)
    assert (found.action_field, found.observation_field) == ("guess", None)
    assert found.action("12") == {"guess": 12}
    assert found.shown({"hint": "x", "step_count": 1}) == '{"hint": "x", "step_count": 1}'
    whole = OpenEnvServer("u", found.parameters, None, None, "object", None)
    assert whole.action('{"guess": 3}') == {"guess": 3}
    with pytest.raises(ValueError, match="an action is a JSON object"):
        whole.action("3")


@pytest.mark.parametrize("transport", ["websocket", "http"])
def test_an_error_of_the_server_breaks_the_episode(server: tuple[str, list[Guessing]], transport: str) -> None:
    with pytest.raises(
        StageError, match=r"environment openenv, row r0, completion 0, turn 1: step: BrokenSession.*on fire"
    ):
        played(server[0], {7: ["666" + END]}, {"transport": transport})


def test_a_full_server_is_said() -> None:
    with served(most=1) as (url, _), pytest.raises(StageError, match="CAPACITY_REACHED: no more sessions"):
        played(url, {7: ["1" + END], 8: ["1" + END]})


def test_another_environment_is_refused(server: tuple[str, list[Guessing]]) -> None:
    with pytest.raises(StageError, match="has environment 'guessing', the recipe asks for 'chess'"):
        played(server[0], {7: []}, {"environment": "chess"})
    with pytest.raises(StageError, match=r"observation_field is 'smell', but an observation .* has hint, step_count"):
        played(server[0], {7: []}, {"observation_field": "smell"})


def test_no_server_is_said() -> None:
    with pytest.raises(StageError, match=r"no OpenEnv server answers GET /metadata at http://127.0.0.1:9"):
        played("http://127.0.0.1:9", {7: []})
