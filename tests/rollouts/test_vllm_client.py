"""The client of a vLLM server against one that answers wrongly, breaks off or is another; and what it sends."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from artifacts.errors import StageError
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.requests import SampleRequest, SamplingConfig
from stages.rollouts.vllm_client import ServerEngine
from stages.rollouts.vllm_connection import Address, Connection, ServerFailure
from stages.rollouts.weight_files import WeightFiles
from tests.rollouts.fake_vllm import serving

MODEL = ServedModel(Path("m"), Path("m"), "float32", vocabulary=10, end_token_ids=(2,), seed=1)
SETTINGS = SamplingConfig(max_completion_length=3)
REQUESTS = [SampleRequest([4, 5], (7, 70), "a"), SampleRequest([6], (8,), "b")]


class Server:
    """Answers as vLLM does, but where `wrong` has something for a path; remembers what it was asked."""

    def __init__(self, **wrong: Any) -> None:
        self.wrong, self.asked = wrong, []

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        self.asked.append((path, body))
        name = path.rpartition("/")[2]
        if name in self.wrong:
            found = self.wrong[name]
            return found(body) if callable(found) else found
        if name == "models":
            return {"data": [{"id": "ours"}]}
        return {"success": True} if name == "reset_prefix_cache" else answer(body)


def answer(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """As many completions as were asked for: of prompts that begin with 4 tokens 3 and end, else three tokens 9."""
    ends = body.get("prompt", [0])[0] == 4
    tokens, reason = ([3, 2], "stop") if ends else ([9, 9, 9], "length")
    drawn = [{f"token_id:{token}": -0.7 for token in body.get("logprob_token_ids", [])}]
    values = {
        "token_ids": tokens,
        "finish_reason": reason,
        "logprobs": {"token_logprobs": [-0.5] * len(tokens), "top_logprobs": drawn},
    }
    places = (
        [None if index == 0 else {str(token): {"logprob": -0.1 * index}} for index, token in enumerate(body["prompt"])]
        if "prompt" in body
        else []
    )
    choices = [{"index": index, "prompt_logprobs": places, **values, **changes} for index in range(body.get("n", 1))]
    return {"model": "ours", "choices": choices[::-1]}


class One:
    """A server that is neither started nor mended."""

    def __init__(self, url: str, weights: Path) -> None:
        self.addresses = [Address("ours", url, hint="it is well otherwise")]
        self.files = WeightFiles(weights)

    def load(self, weights: Any) -> None:
        self.files.write(weights)
        Connection(self.addresses[0], 20.0).take_weights(self.files.folder)
        self.files.remove()

    def absent(self) -> dict[int, str]:
        return {}

    def broke_off(self, server: int, error: ServerFailure) -> str:
        return f"{error}; it is well otherwise"

    def doubt(self, server: int) -> None:
        return None

    def restarts(self) -> list[int]:
        return [0]


def engine(url: str, tmp_path: Path, seconds: float = 20.0) -> ServerEngine:
    settings = EngineConfig(engine="vllm_server", request_timeout_seconds=seconds)
    return ServerEngine(One(url, tmp_path / "weights"), MODEL, settings)


def test_completions_come_back_in_order(tmp_path: Path) -> None:
    server, seen = Server(), []
    with serving(server) as url:
        made = engine(url, tmp_path).sample(REQUESTS, SETTINGS, lambda done, total: seen.append((done, total)))
    assert [[(one.token_ids, one.finished) for one in group] for group in made] == [
        [([3, 2], True), ([3, 2], True)],
        [([9, 9, 9], False)],
    ]
    bodies = sorted((body["prompt"], body["n"], body["seed"]) for path, body in server.asked if "completions" in path)
    assert bodies == [([4, 5], 2, 7), ([6], 1, 8)]
    assert seen in ([(1, 3), (3, 3)], [(2, 3), (3, 3)])


def test_plain_logprobs_are_those_of_a_prompt(tmp_path: Path) -> None:
    with serving(Server()) as url:
        found = engine(url, tmp_path).plain_logprobs([([4, 5], [6, 7]), ([1], [8])])
    assert found == [pytest.approx([-0.2, -0.7]), pytest.approx([-0.7])]  # the last one is of what was drawn


def test_weights_lie_in_files_while_the_server_reads_them(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    read: dict[str, Any] = {}

    def take(body: dict[str, Any]) -> dict[str, Any]:
        for path in Path(body["kwargs"]["weights_path"]).glob("*.safetensors"):
            read.update(load_file(path))
        return {"results": [None]}

    server = Server(collective_rpc=take)
    with serving(server) as url:
        engine(url, tmp_path).load([("embed.weight", weight), ("lm_head.weight", weight)])
    assert read.keys() == {"embed.weight", "lm_head.weight"} and torch.equal(read["lm_head.weight"], weight)
    assert [path for path, _ in server.asked] == ["/v1/models", "/collective_rpc", "/reset_prefix_cache"]
    assert not list(tmp_path.rglob("*.safetensors"))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"models": {"data": [{"id": "theirs"}]}}, "serves theirs, not ours"),
    ({"models": b"<html>hello</html>"}, r"gave no JSON: '<html>hello</html>'.*it is well otherwise"),
    ({"completions": 500}, r"would not complete a prompt: status 500.*it is well otherwise"),
    ({"completions": [1]}, "gave JSON of another form"),
    ({"completions": {"model": "ours"}}, "gave no list of completions"),
    ({"completions": lambda body: answer({**body, "n": 1}, index=5)}, r"gave 1 completions where \d were asked for"),
    ({"completions": lambda body: {**answer(body), "model": "theirs"}}, "gave an answer of model 'theirs'"),
    ({"completions": lambda body: answer(body, token_ids=None)}, r"answered row \w with something else than token ids"),
    ({"completions": lambda body: answer(body, finish_reason="length")}, r"row a with 2 tokens, as if that were its"),
    ({"completions": None}, r"broke off where it was to complete a prompt .*it is well otherwise"),
    ({"collective_rpc": 400}, r"would not take new weights: status 400"),
    ({"reset_prefix_cache": {"success": False}}, "could not forget its prefix cache"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_answers(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with serving(Server(**wrong)) as url, pytest.raises(StageError, match=re.compile(message, re.DOTALL)):
        asked = engine(url, tmp_path)
        asked.load([("w", torch.zeros(1))])
        asked.sample(REQUESTS, SETTINGS)


def test_a_server_that_takes_no_adapters_is_said_how_it_would(tmp_path: Path) -> None:
    message = (
        r"would not take a LoRA adapter \(--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 let it\): status 404"
    )
    with serving(Server(load_lora_adapter=404)) as url, pytest.raises(StageError, match=message):
        Connection(Address("ours", url, adapter="policy"), 20.0).take_weights(tmp_path)


def test_an_answer_that_does_not_come(tmp_path: Path) -> None:
    def late(body: dict[str, Any]) -> dict[str, Any]:
        time.sleep(3)
        return answer(body)

    with serving(Server(completions=late)) as url:
        with pytest.raises(StageError, match=r"did not complete a prompt within 0.3 s \(rollouts.request_timeout"):
            engine(url, tmp_path, seconds=0.3).sample(REQUESTS, SETTINGS)
