"""Weights that change amid completions of a server: which of them made which token, and what is made of a server that
fails then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import StageError
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_settings import OverlappedEngineConfig
from stages.rollouts.requests import Completion, SampleRequest, SamplingConfig
from stages.rollouts.vllm_client import ServerEngine
from stages.rollouts.vllm_given_servers import GivenServers
from stages.rollouts.weight_files import WeightFiles
from stages.training.whole_weights import whole_weights
from tests.data.characters import IDS, ids
from tests.rollouts.fake_vllm import Model, Respond, serving
from tests.rollouts.model_server import ModelServer
from tests.rollouts.test_vllm_own_servers import Start, expected, sampled, weights
from tests.rollouts.test_vllm_own_servers import start as start
from tests.stages.small_models import EOS, save_model
from tests.vllm.models import over_kept_cache, teacher_forced
from tests.waiting import LIMIT_SECONDS

SETTINGS = SamplingConfig(max_completion_length=6)
GENERATE = "/inference/v1/generate"
REQUEST = SampleRequest(ids("abcda"), (1, 2), "r0")
IN_FLIGHT = {"engine": "vllm_server", "max_staleness": 1, "in_flight_updates": True}


@pytest.fixture
def models(tmp_path: Path) -> dict[int, Any]:
    """Those that a run sends as its first and second weights."""
    return {number: save_model(tmp_path / str(number), number) for number in (1, 2)}


@pytest.fixture
def given(tmp_path: Path) -> Iterator[Callable[..., ServerEngine]]:
    """given(*what servers do) -> an engine that asks them"""
    with ExitStack() as stack:

        def build(*responds: Respond) -> ServerEngine:
            urls = tuple(stack.enter_context(serving(respond)) for respond in responds)
            config = OverlappedEngineConfig(urls=urls, weights_folder=str(tmp_path), **IN_FLIGHT)
            model = ServedModel(tmp_path, tmp_path, "float32", len(IDS), (EOS,), seed=1)
            servers = GivenServers(config, model, WeightFiles(tmp_path / "weights"), "run", print)
            return ServerEngine(servers, model, config)

        yield build


class Gate:
    """Questions of a server wait before the third token of their first completion until there are second weights."""

    def __init__(self, server: ModelServer) -> None:
        self.reached, self._named = threading.Event(), threading.Event()
        name = server._name
        server.before_token = self._wait

        def named(version: str) -> Any:
            answer = name(version)
            if version.endswith("2"):
                self._named.set()
            return answer

        server._name = named  # type: ignore[method-assign]

    def _wait(self, number: int, index: int, token: int) -> None:
        if (index, token) == (0, 2):
            self.reached.set()
            assert self._named.wait(LIMIT_SECONDS)


def amid(engine: ServerEngine, gate: Gate, models: dict[int, Any]) -> list[Completion]:
    """The request's completions, of which the first one has two tokens when the second weights come."""
    engine.load(whole_weights(models[1]))
    with ThreadPoolExecutor(1) as pool:
        asked: Future[Any] = pool.submit(engine.sample, [REQUEST], SETTINGS)
        assert gate.reached.wait(LIMIT_SECONDS)
        engine.load(whole_weights(models[2]))
        (group,) = asked.result(60)
    return group


def by_transformers(models: dict[int, Any], one: Completion, *, prompt_by: int | None = None) -> Any:
    found = over_kept_cache(models, REQUEST.prompt_ids, one.token_ids, one.weight_versions, prompt_by=prompt_by)
    return pytest.approx(found, abs=1e-5)


def test_a_completion_goes_on_and_a_later_one_shares_nothing_with_it(
    given: Callable[..., ServerEngine], models: dict[int, Any], tmp_path: Path
) -> None:
    """The second completion begins with the second weights, over the prompt as the first ones left it; of one that is
    asked afterwards they make all."""
    server = ModelServer(tmp_path / "1")
    engine = given(server)
    one, other = amid(engine, Gate(server), models)
    assert len(one.token_ids) > 3
    assert one.weight_versions == [1, 1, *[2] * (len(one.token_ids) - 2)]
    assert other.weight_versions == [2] * len(other.token_ids)
    assert one.logprobs == by_transformers(models, one)
    assert one.logprobs[:2] == pytest.approx(teacher_forced(models[1], REQUEST.prompt_ids, one.token_ids[:2]), abs=1e-5)
    assert other.logprobs == by_transformers(models, other, prompt_by=1)
    ((later, _),) = engine.sample([REQUEST], SETTINGS)
    alone = teacher_forced(models[2], REQUEST.prompt_ids, later.token_ids)
    assert later.weight_versions == [2] * len(later.token_ids)
    assert later.logprobs == pytest.approx(alone, abs=1e-5)
    over_old = over_kept_cache(models, REQUEST.prompt_ids, later.token_ids, later.weight_versions, prompt_by=1)
    assert over_old != pytest.approx(alone, abs=1e-2)  # or nothing would be seen of a prompt of old weights


def test_what_fails_amid_the_change_is_asked_again_and_has_the_tokens_of_that(
    given: Callable[..., ServerEngine], models: dict[int, Any], tmp_path: Path
) -> None:
    """The connection breaks when the server has all tokens: none of them counts."""
    server, questions = ModelServer(tmp_path / "1"), []

    def breaking(path: str, body: dict[str, Any]) -> Any:
        answer = server(path, body)
        if path == GENERATE:
            questions.append(answer["choices"])
        return None if path == GENERATE and len(questions) == 1 else answer

    engine = given(breaking)
    group = amid(engine, Gate(server), models)
    assert [len(choice["weight_versions"]) for choice in questions[0]] == [2, 1]
    assert len(questions) == 2
    for one, choice in zip(group, questions[1], strict=True):
        assert one.token_ids == choice["token_ids"]
        assert one.weight_versions == [2] * len(one.token_ids)
        assert one.logprobs == pytest.approx(teacher_forced(models[2], REQUEST.prompt_ids, one.token_ids), abs=1e-5)
    assert engine.figures()["server_1/tokens"] == sum(len(one.token_ids) for one in group)


def test_an_answer_that_comes_while_another_server_is_still_taking_weights_is_believed(
    given: Callable[..., ServerEngine], models: dict[int, Any], tmp_path: Path
) -> None:
    server, idle, answered, loads = ModelServer(tmp_path / "1"), Model("m"), threading.Event(), []

    def telling(path: str, body: dict[str, Any]) -> Any:
        answer = server(path, body)
        if path == GENERATE:
            assert not answered.is_set(), "it is asked once"
            answered.set()
        return answer

    def slow(path: str, body: dict[str, Any]) -> Any:
        if path == "/collective_rpc":
            loads.append(path)
            assert len(loads) == 1 or answered.wait(LIMIT_SECONDS)
        return idle(path, body)

    one, _ = amid(given(telling, slow), Gate(server), models)
    assert one.weight_versions[:3] == [1, 1, 2]
    assert not idle.answered


def test_one_that_is_killed_comes_back_with_the_weights_of_the_moment_and_their_name(
    start: Start,
    tmp_path: Path,
) -> None:
    _, engine, said = start("killed by 7 once", max_staleness=1, in_flight_updates=True)
    for number in (1, 2):
        engine.load(weights(float(number)))
        found = engine.sample([REQUEST], SETTINGS)
        assert {version for one in found[0] for version in one.weight_versions} == {number}
        assert sampled(engine) == expected(float(number), tmp_path)
    assert len(said) == 1 and "it was killed" in said[0]


# --- what goes wrong


def answering(asked: list[str], **paths: Any) -> Respond:
    """A server that is all right but for these paths, and notes those of weights."""
    sound = Model("m")

    def respond(path: str, body: dict[str, Any]) -> Any:
        name = path.rpartition("/")[2].partition("?")[0]
        if name in ("pause", "resume", "collective_rpc", "update_weight_version", "reset_prefix_cache"):
            asked.append(body.get("new_version", name))
        answer = sound(path, body)
        found = paths.get(name, answer)
        return found(answer) if callable(found) else found

    return respond


def test_weights_are_named_while_nothing_is_made(given: Callable[..., ServerEngine]) -> None:
    """What is computed stays, so that nothing is asked to be forgotten."""
    asked: list[str] = []
    engine = given(answering(asked))
    engine.load(weights(1.0))
    assert asked == ["pause", "neither", "collective_rpc", "run-000000001", "resume"]


def test_of_weights_that_came_in_part_nothing_is_believed(given: Callable[..., ServerEngine]) -> None:
    """The server goes on, for its questions shall end."""
    asked: list[str] = []
    engine = given(answering(asked, collective_rpc=500))
    with pytest.raises(StageError, match="would not take new weights: status 500"):
        engine.load(weights(1.0))
    assert asked == ["pause", "neither", "collective_rpc", "resume"]


def spanned(*bounds: tuple[str, int, int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Other spans in the place of a server's: names, first tokens, and last ones counted from the end."""

    def respond(answer: dict[str, Any]) -> dict[str, Any]:
        for one in answer["choices"]:
            most = len(one["token_ids"])
            one["weight_versions"] = [
                {"version": name, "start": start, "end": most + end} for name, start, end in bounds
            ]
        return answer

    return respond


def silent(answer: dict[str, Any]) -> dict[str, Any]:
    for one in answer["choices"]:
        one["weight_versions"] = None
    return answer


SENT = "run-000000001"
REFUSED: list[tuple[Any, str]] = [
    (403, r"would not complete a prompt: status 403"),
    (
        spanned(("neither", 0, 0)),
        r"was asked 5 times, and each time .* made tokens by weights 'neither', which are not",
    ),
    (spanned(("default", 0, 0)), r"was asked 5 times, and each time .* made tokens by weights 'default'"),
    (spanned((SENT, 0, 1)), r"do not say by which weights their tokens were made"),
    (spanned((SENT, 1, 0)), r"do not say by which weights their tokens were made"),
    (spanned(), r"do not say by which weights their tokens were made"),
    (silent, r"do not say by which weights their tokens were made"),
]


@pytest.mark.parametrize(("generate", "message"), REFUSED)
def test_refused(generate: Any, message: str, given: Callable[..., ServerEngine]) -> None:
    engine = given(answering([], generate=generate))
    engine.load(weights(1.0))
    with pytest.raises(StageError, match=message):
        engine.sample([REQUEST], SETTINGS)
