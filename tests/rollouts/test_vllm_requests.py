"""What vLLM is asked for and which of its answers are believed; nothing of vLLM's is needed for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import StageError
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.requests import SampleRequest, SamplingConfig
from stages.rollouts.vllm_requests import (
    Answer,
    Asked,
    Reading,
    bundles,
    filled,
    parameters,
    require_bytes,
    stop_tokens,
    wanted,
)
from stages.rollouts.vllm_server import _arguments
from tests.data.characters import build_tokenizer
from tests.rollouts.forms import every_byte, pieces

MODEL = ServedModel(Path("m"), Path("m"), "float32", vocabulary=10, end_token_ids=(2,), seed=1)
ASKED = Asked(0, 0, [4, 5], 7, 3, "row r3")
WRONG: list[tuple[Any, str]] = [
    (Answer(None, [-1.0], "stop"), "something else than token ids"),
    (Answer([3, "2"], [-1.0, -1.0], "stop"), "something else than token ids"),
    (Answer([3, 2], None, "stop"), "something else than token ids"),
    (Answer([3, 2], [-1.0, None], "stop"), "something else than token ids"),
    (Answer([3, 2], [-1.0], "stop"), "2 tokens and 1 log-probabilities"),
    (Answer([], [], "stop"), "no token"),
    (Answer([3, 10], [-1.0, -1.0], "length"), "token 10; the model knows 10: it serves another model"),
    (Answer([-1, 2], [-1.0, -1.0], "stop"), "token -1; the model knows 10"),
    (Answer([3, 2], [-1.0, float("nan")], "stop"), "log-probabilities that are no numbers below 0"),
    (Answer([3, 2], [-1.0, 0.5], "stop"), "log-probabilities that are no numbers below 0"),
    (Answer([3, 4], [-1.0, -1.0], "length"), "2 tokens, as if that were its limit, which is 3"),
    (Answer([3, 4], [-1.0, -1.0], "stop"), "an end after token 4, which ends nothing"),
    (Answer([3, 4, 4, 2], [-1.0] * 4, "stop"), "4 tokens, more than its limit of 3"),
    (Answer([3, 4], [-1.0, -1.0], "abort"), "finish_reason 'abort'"),
]


@pytest.mark.parametrize(("answer", "message"), WRONG)
def test_not_believed(answer: Answer, message: str) -> None:
    settings = SamplingConfig(max_completion_length=3)
    reading = Reading(MODEL, settings, stop_tokens(MODEL, settings), "vLLM")
    with pytest.raises(StageError, match=f"vLLM answered row r3 with {message}"):
        reading.completion(ASKED, answer)


def test_believed() -> None:
    settings = SamplingConfig(max_completion_length=3, stop_token_ids=(6,))
    reading = Reading(MODEL, settings, stop_tokens(MODEL, settings), "vLLM")
    ended = reading.completion(ASKED, Answer([3, 6], [-1.0, -0.25], "stop"))
    assert (ended.token_ids, ended.logprobs, ended.finished, ended.model_logprobs) == (
        [3, 6],
        [-1.0, -0.25],
        True,
        [-1.0, -0.25],
    )
    assert not reading.completion(ASKED, Answer([3, 3, 3], [-1.0] * 3, "length")).finished
    cut = Reading(MODEL, SamplingConfig(top_k=2), [2], "vLLM")
    assert cut.completion(ASKED, Answer([2], [-1.0], "stop")).model_logprobs == []


def test_completions_of_a_prompt_are_asked_for_together_where_they_have_one_limit() -> None:
    requests = [
        SampleRequest([4], (2**62 + 5, 99, 98), "a"),
        SampleRequest([5], (1, 2, 3, 4), "b", limits=(3, 0, 3, 2)),
        SampleRequest([6], (), "c"),
    ]
    asked = wanted(requests, 3)
    # vLLM counts on from the seed of the first one, so all seeds follow from that
    assert [(one.name, one.place, one.seed, one.limit) for one in asked] == [
        ("row a", 0, 5, 3),
        ("row a", 1, 6, 3),
        ("row a", 2, 7, 3),
        ("row b", 0, 1, 3),
        ("row b", 2, 3, 3),
        ("row b", 3, 4, 2),
    ]
    assert [[one.place for one in together] for together in bundles(asked)] == [[0, 1, 2], [0], [2], [3]]
    made = [Reading(MODEL, SamplingConfig(), [2], "vLLM").completion(one, Answer([2], [-1.0], "stop")) for one in asked]
    assert [[len(one.token_ids) for one in group] for group in filled(requests, asked, made)] == [
        [1, 1, 1],
        [1, 0, 1, 1],
        [],
    ]
    with pytest.raises(StageError, match="row d has no tokens"):
        wanted([SampleRequest([], (1,), "d")], 3)


def test_a_form_is_asked_for_with_all_ends() -> None:
    """vLLM would allow the tokenizer's own alone; and it does not say how likely tokens are among all."""
    settings = SamplingConfig.model_validate({"max_completion_length": 3, "structured": {"choices": ["a", 'say "b"']}})
    ends = replace(MODEL, end_token_ids=(2, 4))
    asked = parameters(ASKED, settings, stop_tokens(ends, settings))
    grammar = 'start: whole_form (<[2]> | <[4]>)?\nwhole_form: "a" | "say \\"b\\""\n%llguidance {"no_forcing": true}\n'
    assert asked["structured_outputs"] == {"grammar": grammar}
    assert {name: value for name, value in asked.items() if name != "structured_outputs"} == parameters(
        ASKED, SamplingConfig(max_completion_length=3), [2, 4]
    )
    made = Reading(ends, settings, [2, 4], "vLLM").completion(ASKED, Answer([3, 4], [-1.0, -1.0], "stop"))
    assert len(made.free_logprobs) == 2 and all(value != value for value in made.free_logprobs)
    assert made.model_logprobs == []


@pytest.mark.parametrize("build", [every_byte, pieces])
def test_a_form_takes_tokens_of_bytes(build: Any, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    require_bytes(tmp_path)
    build_tokenizer().save_pretrained(tmp_path / "characters")
    with pytest.raises(StageError, match="whose tokenizer works on bytes; this one's decoder is Fuse; leave rollouts"):
        require_bytes(tmp_path / "characters")


def test_a_form_needs_to_know_the_bytes_of_tokens(tmp_path: Path) -> None:
    """A folder of SentencePiece alone."""
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(
        StageError, match=r"in tokenizer.json what bytes its tokens are; .* has none; save the tokenizer"
    ):
        require_bytes(tmp_path)


def test_a_server_is_told_what_to_read_forms_with(tmp_path: Path) -> None:
    settings = EngineConfig(engine="vllm_server")
    plain, held = (
        _arguments(one, settings, "m", tmp_path / "socket", "") for one in (MODEL, replace(MODEL, structured=True))
    )
    place = held.index("--structured-outputs-config")
    assert held[place + 1] == '{"backend": "guidance"}'
    assert held[:place] + held[place + 2 :] == plain


def test_what_is_asked_for() -> None:
    settings = SamplingConfig(
        temperature=0.5, top_k=3, stop_token_ids=(6,), stop_strings=("x",), max_completion_length=3
    )
    assert parameters(ASKED, settings, stop_tokens(MODEL, settings)) == {
        "temperature": 0.5,
        "top_p": 1.0,
        "top_k": 3,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": 7,
        "max_tokens": 3,
        "stop": ["x"],
        "stop_token_ids": [2, 6],
        "ignore_eos": True,
        "logprobs": 0,
    }
