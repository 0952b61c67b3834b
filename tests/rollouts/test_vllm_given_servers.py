"""Servers that somebody else runs: what each must be, how weights reach it, and what is made of one that changes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import StageError
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.vllm_client import ServerEngine
from stages.rollouts.vllm_given_servers import GivenServers
from stages.rollouts.weight_files import WeightFiles
from tests.rollouts.fake_vllm import Model, Respond, serving
from tests.rollouts.test_vllm_own_servers import REQUESTS, expected, model, sampled, weights
from tests.waiting import LIMIT_SECONDS

KEY = "k3y-that-nobody-reads"
Open = Callable[..., tuple[ServerEngine, list[str]]]


@pytest.fixture
def given(tmp_path: Path):
    """given(*what servers do, **settings) -> (engine, what was said of them)"""
    with ExitStack() as stack:

        def build(*responds: Respond, run: str = "run", **settings: Any) -> tuple[ServerEngine, list[str]]:
            said: list[str] = []
            urls = tuple(stack.enter_context(serving(respond)) for respond in responds)
            config = EngineConfig(
                engine="vllm_server",
                urls=urls,
                weights_folder=str(tmp_path),
                **{"start_timeout_seconds": LIMIT_SECONDS, **settings},
            )
            servers = GivenServers(config, model(tmp_path), WeightFiles(tmp_path / "weights"), run, said.append)
            return ServerEngine(servers, model(tmp_path), config), said

        yield build


def test_they_get_weights_by_the_folder_and_share_the_prompts(given: Open, tmp_path: Path) -> None:
    one, two = Model("their name"), Model("another name")
    engine, _ = given(one, two)
    for value in (1.0, 2.0):
        engine.load(weights(value))
        assert sampled(engine) == expected(value, tmp_path)
    assert one.answered + two.answered == 2 * sum(len(request.seeds) for request in REQUESTS)
    assert min(one.answered, two.answered) > 0
    assert not list((tmp_path / "weights").iterdir())


def test_one_that_a_killed_run_left_paused_goes_on_and_that_is_said(given: Open) -> None:
    left, well = Model("theirs"), Model("theirs")
    left.paused = True
    _, said = given(left, well)
    assert not left.paused and len(said) == 1
    assert re.search(r"server at http://\S+ was paused, as a run that is killed leaves it; it goes on", said[0])


def test_the_key_is_sent_and_told_to_nobody(
    given: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_key: list[str | None] = []
    original = BaseHTTPRequestHandler.parse_request

    def parse(self: BaseHTTPRequestHandler) -> bool:
        found = original(self)
        with_key.append(self.headers.get("authorization"))
        return found

    monkeypatch.setattr(BaseHTTPRequestHandler, "parse_request", parse)
    monkeypatch.setenv("THEIR_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    failing = Model("m")
    engine, said = given(
        lambda path, body: 401 if path == "/v1/completions" else failing(path, body), api_key_variable="THEIR_KEY"
    )
    engine.load(weights(1.0))
    with pytest.raises(StageError, match="would not complete a prompt: status 401") as told:
        sampled(engine)
    assert set(with_key) == {f"Bearer {KEY}"}
    assert KEY not in f"{told.value!r} {said} {caplog.text} {engine._servers.addresses!r}"
    monkeypatch.delenv("THEIR_KEY")
    with pytest.raises(StageError, match="names THEIR_KEY, which is not set"):
        given(Model("m"), api_key_variable="THEIR_KEY")


def test_what_one_answered_that_was_started_again_meanwhile_is_asked_of_another(given: Open, tmp_path: Path) -> None:
    """It came back with its first weights, and nothing broke off: only the version tells."""
    sound, other = Model("m"), Model("m")

    def restarted(path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/completions" and not other.answered:
            other.weights, other.version = "initial", "default"
        return other(path, body)

    engine, _ = given(sound, restarted)
    engine.load(weights(1.0))
    assert sampled(engine) == expected(1.0, tmp_path)
    answered = other.answered
    assert answered > 0
    assert sampled(engine) == expected(1.0, tmp_path)
    assert other.answered == answered  # it is asked no more
    engine.load(weights(2.0))
    assert sampled(engine) == expected(2.0, tmp_path)
    assert other.answered > answered


def test_one_that_another_run_has_given_weights_is_noticed(given: Open) -> None:
    shared = Model("m")
    engine, _ = given(shared)
    engine.load(weights(1.0))
    shared.version = "another-000000001"
    with pytest.raises(StageError, match=r"(?s)no vLLM server is left.*it has other weights than this run sent"):
        sampled(engine)


def test_one_that_breaks_off_is_asked_again_while_it_has_its_weights_and_left_out_when_it_is_gone(
    given: Open, tmp_path: Path
) -> None:
    one, two = Model("m"), Model("m")
    broken: list[str] = []

    def unsteady(path: str, body: dict[str, Any]) -> Any:
        if "gone" in broken or (path == "/v1/completions" and not broken):
            broken.append(path)
            return None
        return one(path, body)

    engine, said = given(unsteady, two)
    engine.load(weights(1.0))
    assert sampled(engine) == expected(1.0, tmp_path) and one.answered > 0
    broken.append("gone")
    assert sampled(engine) == expected(1.0, tmp_path)
    engine.load(weights(2.0))
    assert "broke off where it was to take new weights" in said[0] and "gets no prompts until" in said[0]
    assert sampled(engine) == expected(2.0, tmp_path)
    broken.remove("gone")  # it is back, with the weights before
    before = one.answered
    assert sampled(engine) == expected(2.0, tmp_path) and one.answered == before
    engine.load(weights(1.0))
    assert sampled(engine) == expected(1.0, tmp_path) and one.answered > before


def answering(**paths: Any) -> Respond:
    """A server that is all right but for these paths."""
    sound = Model("m")
    return lambda path, body: paths.get(path.rpartition("/")[2].partition("?")[0]) or sound(path, body)


REFUSED: list[tuple[Respond, str]] = [
    (Model("m", dtype="torch.bfloat16"), r"has dtype bfloat16; start it with --dtype float32"),
    (Model("m", logprobs_mode="raw_logprobs"), r"start it with --logprobs-mode processed_logprobs"),
    (answering(models={"data": [{"id": "a"}, {"id": "b"}]}), r"serves a, b; a server for rollouts serves one"),
    (answering(server_info=404), r"would not tell its settings \(VLLM_SERVER_DEV_MODE=1 lets it\): status 404"),
    (answering(server_info={"vllm_config": "text"}), r"gave settings of another form"),
    (answering(health=503), r"status 503.*it did not answer within rollouts.start_timeout_seconds"),
    (answering(collective_rpc=500), r"would not take new weights: status 500"),
    (answering(update_weight_version=404), r"would not keep the version of its weights: status 404"),
    (answering(completions={"model": "theirs"}), r"an answer of model 'theirs' in the place of 'm'"),
]


@pytest.mark.parametrize(("respond", "message"), REFUSED)
def test_refused(respond: Respond, message: str, given: Open) -> None:
    """Beside one that is all right: nobody would know which one answered."""
    with pytest.raises(
        StageError, match=re.compile(f"the vLLM server at http://127.0.0.1:\\d+ .*{message}", re.DOTALL)
    ):
        engine, _ = given(Model("m"), respond, start_timeout_seconds=0.2)
        engine.load(weights(1.0))
        sampled(engine)


def test_a_model_of_another_form_is_refused_before_it_is_sent_weights(given: Open, tmp_path: Path) -> None:
    """Where the folder that the server names is here, too."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"hidden_size": 32, "model_type": "llama"}')
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "model_type": "llama"}')
    with pytest.raises(StageError, match="serves another model: its hidden_size is 32, here it is 64; start it with"):
        given(Model("m", model=str(theirs)))
    given(Model("m", model="somebody/theirs"))
    (tmp_path / "config.json").write_text('{"hidden_size": 32, "model_type": "llama", "rope_theta": 7}')
    given(Model("m", model=str(theirs)))


def test_forms_are_read_by_what_reads_them_here(tmp_path: Path) -> None:
    """Other readers take grammars too, and make something else of them."""
    theirs = Model("theirs")
    held = replace(model(tmp_path), structured=True)
    with serving(theirs) as url:
        config = EngineConfig(engine="vllm_server", urls=(url,), weights_folder=str(tmp_path / "weights"))

        def opened() -> GivenServers:
            return GivenServers(config, held, WeightFiles(tmp_path / "weights"), "run", lambda text: None)

        with pytest.raises(StageError, match=r"reads forms \(structured\) with auto; start it with --structured-out"):
            opened()
        theirs.form_reader = "guidance"
        opened()


def test_without_any_weights_sent_nothing_is_asked(given: Open) -> None:
    engine, _ = given(Model("m"))
    with pytest.raises(StageError, match="it has other weights than this run sent"):
        sampled(engine)
