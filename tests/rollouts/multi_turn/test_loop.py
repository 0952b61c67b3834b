"""Rollouts of several turns, against transcripts by hand: « and » stand around the tokens that the model wrote."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from artifacts.errors import StageError
from stages.rollouts.multi_turn.loop import MultiTurn
from stages.rollouts.requests import Completion, SamplingConfig
from stages.seeds import derive
from tests.data.chat_templates import CHATML, MISTRAL_3, QWEN_2_5, marked_text
from tests.rollouts.multi_turn import user_code
from tests.rollouts.multi_turn.clocks import stand_still
from tests.rollouts.multi_turn.scripted import END, HERE, Script, multi_turn, prompt, spelled, text_of, tokenizer

QWEN, PLAIN = tokenizer(QWEN_2_5), tokenizer(CHATML)
QUESTION = [{"role": "user", "content": "1+2?"}]


def call(name: str, **arguments: Any) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def results(*contents: str) -> str:
    """As the template writes them, from after the end of the turn to the next one's start."""
    told = "".join(f"\n<tool_response>\n{content}\n</tool_response>" for content in contents)
    return f"\n<|im_start|>user{told}<|im_end|>\n<|im_start|>assistant\n"


def hint(text: str) -> str:
    return f"\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def run(
    made: MultiTurn, tok: Any, script: dict[int, list[str]], room: int = 1000, **columns: Any
) -> tuple[list[Completion], Script]:
    """Completions of one prompt, one a seed."""
    engine = Script(tok, script)
    row = prompt(made, tok, QUESTION, **columns)
    (group,) = made(engine, [row], [tuple(script)], SamplingConfig(max_completion_length=room))
    return group, engine


def transcript(tok: Any, completion: Completion) -> str:
    assert completion.loss_mask is not None
    assert len(completion.token_ids) == len(completion.logprobs) == len(completion.loss_mask)
    return marked_text(tok.convert_ids_to_tokens(completion.token_ids), completion.loss_mask)


TOOLS = multi_turn(QWEN, tools=[f"{HERE}:add", f"{HERE}:shout", f"{HERE}:divide"])


def test_a_transcript_with_calls() -> None:
    """Two calls at once, one of them async; then an answer. Log-probabilities are the sampler's, 0 for the results."""
    first, last = call("add", a=1, b=2) + "\n" + call("shout", text="hi") + END, "It is 3." + END
    (completion,), engine = run(TOOLS, QWEN, {7: [first, last]})
    assert transcript(QWEN, completion) == f"«{first}»{results('3', 'HI')}«{last}»"
    own = [-(number + 1) / 8 for number in range(len(spelled(QWEN, first)))]
    assert completion.logprobs[: len(own)] == own and not any(
        value for value, spoken in zip(completion.logprobs, completion.loss_mask or (), strict=True) if not spoken
    )
    assert completion.finished and completion.episode is not None
    assert completion.episode.messages == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}},
                {"type": "function", "function": {"name": "shout", "arguments": {"text": "hi"}}},
            ],
        },
        {"role": "tool", "name": "add", "content": "3", "tool_call_id": "call00000"},
        {"role": "tool", "name": "shout", "content": "HI", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "It is 3."},
    ]
    assert completion.episode.record() == {
        "turns": 2,
        "ending": "answered",
        "tool_calls": 2,
        "tool_failures": 0,
        "environment_reward": None,
        "environment_rewards": [],
        "environment_error": None,
    }
    assert text_of(QWEN, engine.requests[1][0].prompt_ids).endswith(first + results("3", "HI"))


def test_what_the_model_wrote_is_not_tokenized_again() -> None:
    """<tool_call> spelled by its letters is another sequence of tokens than the tokenizer's own, and stays it."""
    letters = [token for letter in "<tool_call>" for token in spelled(QWEN, letter)]
    rest = spelled(QWEN, call("add", a=1, b=2)[len("<tool_call>") :] + END)
    assert spelled(QWEN, "<tool_call>") != letters

    class Letters(Script):
        def _turn(self, seed: int, limit: int) -> Completion:
            ids = letters + rest if seed == 7 else spelled(QWEN, "3" + END)
            return Completion(ids, [-1.0] * len(ids), True)

    engine = Letters(QWEN, {7: ["", ""]})
    row = prompt(TOOLS, QWEN, QUESTION)
    ((completion,),) = TOOLS(engine, [row], [(7,)], SamplingConfig(max_completion_length=500))
    assert completion.token_ids[: len(letters) + len(rest)] == letters + rest
    assert list(engine.requests[1][0].prompt_ids) == [*row.prompt_ids, *letters, *rest, *spelled(QWEN, results("3"))]


FAILURES = [
    (call("divide", a=1, b=0), "ZeroDivisionError: division by zero"),
    (call("ad", a=1), "no tool 'ad'; did you mean 'add'?; there are add, divide, shout"),
    (call("add", a=1), "arguments: 'b' is a required property"),
    ("<tool_call>[}</tool_call>", "not JSON: Expecting value: line 1 column 2 (char 1)"),
]


@pytest.mark.parametrize(("said", "reason"), FAILURES)
def test_failures_are_results_that_the_model_sees(said: str, reason: str) -> None:
    (completion,), _ = run(TOOLS, QWEN, {7: [said + END, "sorry" + END]})
    told = json.dumps({"error": reason})
    assert transcript(QWEN, completion) == f"«{said}{END}»{results(told)}«sorry{END}»"
    assert completion.episode is not None
    assert (completion.episode.tool_calls, completion.episode.tool_failures) == (1, 1)


def test_a_tool_that_takes_too_long_is_a_failure() -> None:
    made = multi_turn(QWEN, tools=[f"{HERE}:wait"], tool_timeout_seconds=0.05)
    (completion,), _ = run(made, QWEN, {7: [call("wait") + END, "oh" + END]})
    told = '{"error": "OvertimeError: took longer than its limit of 0.05 seconds"}'
    assert completion.episode is not None and completion.episode.messages[1]["content"] == told
    assert completion.episode.tool_failures == 1
    user_code.FOREVER.set()
    user_code.FOREVER.clear()


def test_turns_with_calls_are_limited() -> None:
    made = multi_turn(QWEN, tools=[f"{HERE}:add"], max_tool_calling_iterations=1)
    again = call("add", a=1, b=2) + END
    (completion,), _ = run(made, QWEN, {7: [again, again]})
    assert transcript(QWEN, completion) == f"«{again}»{results('3')}«{again}»"
    assert completion.finished and completion.episode is not None
    assert (completion.episode.ending, completion.episode.tool_calls) == ("turn limit", 1)


def test_results_without_room_for_an_answer_end_it_as_too_long() -> None:
    """One token fewer than turn, results and a first token of the answer; with it, that token is written."""
    first = call("add", a=1, b=2) + END
    needed = len(spelled(QWEN, first + results("3")))
    (short,), _ = run(TOOLS, QWEN, {7: [first, "3" + END]}, room=needed)
    assert transcript(QWEN, short) == f"«{first}»" and not short.finished
    (enough,), engine = run(TOOLS, QWEN, {7: [first, "3" + END]}, room=needed + 1)
    assert transcript(QWEN, enough) == f"«{first}»{results('3')}«3»" and not enough.finished
    assert engine.requests[1][0].limits == (1,)
    assert [one.episode.ending for one in (short, enough) if one.episode] == ["length", "length"]


def test_a_call_that_is_cut_off_is_not_made() -> None:
    (completion,), engine = run(TOOLS, QWEN, {7: [call("add", a=1, b=2) + END]}, room=12)
    assert len(completion.token_ids) == 12 and not completion.finished and len(engine.requests) == 1
    assert completion.episode is not None and completion.episode.tool_calls == 0


def test_completions_go_on_by_themselves_and_first_turns_share_the_prompt() -> None:
    """Seeds of later turns are derived; who has come to the same tokens is asked for at once."""
    calling = call("add", a=1, b=2) + END
    group, engine = run(TOOLS, QWEN, {7: ["3" + END], 8: [calling, "3" + END], 9: [calling, calling, "4" + END]})
    assert [[request.seeds for request in round] for round in engine.requests] == [
        [(7, 8, 9)],
        [(derive(8, "turn", 1), derive(9, "turn", 1))],
        [(derive(9, "turn", 2),)],
    ]
    assert [one.episode.turns for one in group if one.episode] == [1, 2, 3]
    assert [transcript(QWEN, one).count("«") for one in group] == [1, 2, 3]


def test_ids_of_calls_are_kept() -> None:
    """Mistral's template pairs calls and results by them."""
    tok = tokenizer(MISTRAL_3, eos_token="</s>")
    made = multi_turn(tok, tools=[f"{HERE}:add"])
    first = '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}, "id": "abcdefghi"}]</s>'
    (completion,), _ = run(made, tok, {7: [first, " 3</s>"]})
    told = '[TOOL_RESULTS] {"content": 3, "call_id": "abcdefghi"}[/TOOL_RESULTS]'
    assert transcript(tok, completion) == f"«{first}»{told}« 3</s>»"


def test_plain_prompts_are_refused() -> None:
    row = prompt(TOOLS, QWEN, QUESTION)
    row.row["prompt"] = "text"
    with pytest.raises(StageError, match="row r0: its prompt is plain text"):
        TOOLS(Script(QWEN, {}), [row], [(7,)], SamplingConfig())


def test_a_row_with_tools_of_its_own() -> None:
    assert TOOLS.tools is not None
    schemas = TOOLS.tools.tools.schemas
    assert TOOLS.tools.checked({"row_id": "r0"})["tools"] == schemas
    assert TOOLS.tools.checked({"row_id": "r0", "tools": schemas[:1]})["tools"] == schemas[:1]
    with pytest.raises(StageError, match=r"row r0: its column tools names fly, .* \(add, shout, divide\)"):
        TOOLS.tools.checked({"row_id": "r0", "tools": [{"name": "fly"}]})


# --- environments


ECHO = multi_turn(PLAIN, environment={"name": f"{HERE}:Echo", "parameters": {"end": "stop"}})
ASKED = "<|im_start|>user\n1+2? yes<|im_end|>\n<|im_start|>assistant\n"


def test_an_episode() -> None:
    """What reset shows joins the question; three turns, rewarded 1, 2 and 2; the last observation is not told."""
    user_code.CLOSED.clear()
    (completion,), engine = run(ECHO, PLAIN, {7: ["ab" + END, "abcd" + END, "stop" + END]}, word="yes")
    assert transcript(PLAIN, completion) == f"«ab{END}»{hint('ab')}«abcd{END}»{hint('abcd')}«stop{END}»"
    assert text_of(PLAIN, engine.requests[0][0].prompt_ids) == ASKED
    episode = completion.episode
    assert episode is not None and episode.opening is not None
    assert episode.opening.messages == [{"role": "user", "content": "1+2? yes"}]
    assert (episode.ending, episode.turns, episode.environment_rewards) == ("done", 3, (1.0, 2.0, 2.0))
    assert episode.environment_reward == 5.0 and completion.finished
    assert user_code.CLOSED == ["yes"]


def test_turns_of_an_episode_are_limited() -> None:
    made = multi_turn(PLAIN, environment={"name": f"{HERE}:Echo", "max_turns": 2})
    (completion,), _ = run(made, PLAIN, {7: ["a" + END, "bc" + END]}, word="")
    assert completion.episode is not None
    assert (completion.episode.ending, completion.episode.environment_reward) == ("turn limit", 1.5)


def test_an_async_environment_that_gives_no_reward() -> None:
    made = multi_turn(PLAIN, environment=f"{HERE}:Silent")
    (completion,), _ = run(made, PLAIN, {7: ["a" + END, "stop" + END]})
    episode = completion.episode
    assert episode is not None and episode.opening is None and episode.environment_reward is None
    assert episode.environment_rewards == (None, None) and episode.ending == "done"


def test_instances_are_apart() -> None:
    group, _ = run(ECHO, PLAIN, {7: ["stop" + END], 8: ["a" + END, "stop" + END]}, word="w")
    assert [one.episode.environment_reward for one in group if one.episode] == [2.0, 2.5]


BROKEN = [
    ("raise", r"step: KeyError: 'lost' \(user_code\.py:89\); correct it"),
    ("hang", r"step: OvertimeError: took longer than its limit of 0.05 seconds"),
    ("nonsense", r"step returned 'nonsense'; give \(observation: text"),
]


@pytest.mark.parametrize(("said", "reason"), BROKEN)
def test_a_broken_environment_ends_the_stage_and_names_the_episode(
    said: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_still(monkeypatch, 3)  # two beginnings, and the step of the episode that is well
    made = multi_turn(PLAIN, environment={"name": f"{HERE}:Broken", "timeout_seconds": 0.05})
    with pytest.raises(StageError, match=rf"{HERE}:Broken, row r0, completion 1, turn 1: {reason}"):
        run(made, PLAIN, {7: ["stop" + END], 8: [said + END]}, word="w")


@pytest.mark.parametrize(("said", "reason"), BROKEN)
def test_or_only_the_episode(said: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_still(monkeypatch, 4)  # two beginnings and two steps
    environment = {"name": f"{HERE}:Broken", "timeout_seconds": 0.05, "on_error": "unscored"}
    made = multi_turn(PLAIN, environment=environment)
    group, _ = run(made, PLAIN, {7: ["stop" + END], 8: ["a" + END, said + END]}, word="w")
    good, bad = (one.episode for one in group)
    assert good is not None and good.environment_reward == 2.0
    assert bad is not None and bad.ending == "broken" and bad.environment_reward is None
    assert bad.environment_rewards == (0.5,)
    assert bad.error is not None and bad.error.startswith("row r0, completion 1, turn 2: step")


def test_when_all_episodes_break_the_stage_ends() -> None:
    made = multi_turn(PLAIN, environment={"name": f"{HERE}:Broken", "on_error": "unscored"})
    with pytest.raises(StageError, match="broke in all of 2 episodes; row r0, completion 0, turn 1: step: KeyError"):
        run(made, PLAIN, {7: ["raise" + END], 8: ["raise" + END]}, word="w")


def test_completions_of_a_prompt_must_begin_alike() -> None:
    made = multi_turn(PLAIN, environment=f"{HERE}:Different")
    with pytest.raises(StageError, match=r"reset shows the completions of row r0 2 different beginnings"):
        run(made, PLAIN, {7: ["a"], 8: ["a"]})


def test_tools_and_environment_together() -> None:
    """Calls go to the tools, other turns to the environment."""
    made = multi_turn(QWEN, tools=[f"{HERE}:add"], environment=f"{HERE}:Echo")
    calling = call("add", a=1, b=2) + END
    (completion,), _ = run(made, QWEN, {7: [calling, "3" + END, "stop" + END]}, word="")
    assert transcript(QWEN, completion) == f"«{calling}»{results('3')}«3{END}»{hint('3')}«stop{END}»"
    assert completion.episode is not None
    assert (completion.episode.tool_calls, completion.episode.environment_rewards) == (1, (0.5, 2.0))


def test_weight_versions_go_with_the_tokens() -> None:
    """An engine that says which weights made each token: answers have those of the turn before them."""

    class Versioned(Script):
        def _turn(self, seed: int, limit: int) -> Completion:
            turn = super()._turn(seed, limit)
            version = 3 if seed == 7 else 4
            return Completion(turn.token_ids, turn.logprobs, True, weight_versions=[version] * len(turn.token_ids))

    row = prompt(ECHO, PLAIN, QUESTION, word="")
    engine = Versioned(PLAIN, {7: ["a" + END, "stop" + END]})
    ((completion,),) = ECHO(engine, [row], [(7,)], SamplingConfig(max_completion_length=500))
    changes = [place for place, (one, other) in enumerate(pairwise(completion.weight_versions)) if one != other]
    assert changes == [len(spelled(PLAIN, "a" + END + hint("a"))) - 1]
    assert len(completion.weight_versions) == len(completion.token_ids)
