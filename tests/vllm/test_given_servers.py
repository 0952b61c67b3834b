"""Servers of vLLM that somebody else runs, over TCP: given weights whole, merged and as adapters, each sync held to
transformers; what they refuse, answer too shortly or have of others is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from artifacts.errors import StageError
from stages.context import local_context
from stages.rollouts.engine import ServedModel
from stages.rollouts.requests import SampleRequest, SamplingConfig
from stages.rollouts.vllm_adapter import write_adapter_folder
from stages.rollouts.vllm_client import ServerEngine
from stages.rollouts.vllm_connection import Connection
from stages.training.adapter_weights import adapter_weights, served_adapter
from stages.training.model import Scorer
from stages.training.out_of_memory import TokenBudget
from stages.training.sync_proof import SyncProof
from stages.training.whole_weights import whole_weights
from tests.data.characters import IDS
from tests.vllm.given import asked
from tests.vllm.models import save_model, served, teacher_forced
from tests.vllm.test_adapter_sync import adapted
from tests.vllm.test_engine import PLAIN, REQUESTS, difference, load, moved
from tests.vllm.test_stage import saved, trained


def with_adapter(folder: Path) -> ServedModel:
    return replace(served(folder / "1"), adapter=served_adapter(adapted(folder)))


def proof(engine: ServerEngine, tmp_path: Path) -> SyncProof:
    context = local_context("sft", {}, folder=tmp_path)
    return SyncProof(engine, TokenBudget(context, 4096), tolerance=1e-3, dtypes=("float32", "float32"))


def test_adapters_alone_after_every_sync(server: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = server
    asked(url, served(folder / "1"), tmp_path).load(whole_weights(load(folder, "1")))  # the base of the adapters
    engine, model = asked(url, with_adapter(folder), tmp_path), adapted(folder)
    for _ in range(3):
        moved(model)
        engine.load(adapter_weights(model))
        assert difference(engine, model) < 1e-4
    assert not list(tmp_path.rglob("*.safetensors"))  # it does not read them again
    moved(model)
    assert difference(engine, model) > 0.1  # the newest is not there yet, and the adapter does something


def test_an_adapter_read_again_in_its_place_fails_the_proof_and_ours_passes(
    server: tuple[str, Path], tmp_path: Path
) -> None:
    """The trap of stale adapters: vLLM goes on from what it computed of prompts with the one before."""
    url, folder = server
    asked(url, served(folder / "1"), tmp_path).load(whole_weights(load(folder, "1")))
    model = with_adapter(folder)
    assert model.adapter is not None
    engine, policy = asked(url, model, tmp_path), adapted(folder)
    draws = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, len(IDS), (4, 40), generator=draws).tolist()  # longer than a page of the cache
    requests = [SampleRequest(prompt, tuple(range(4)), f"r{number}") for number, prompt in enumerate(prompts)]

    def prove() -> None:
        proof(engine, tmp_path)(Scorer(policy), requests, engine.sample(requests, PLAIN), PLAIN)

    engine.load(adapter_weights(policy))
    connection, place = Connection(engine._servers.addresses[0], 60.0), tmp_path / "plain"
    place.mkdir()
    for _ in range(2):
        moved(policy)
        write_adapter_folder(place, model.adapter, adapter_weights(policy))
        told = {"lora_name": connection.address.adapter, "lora_path": str(place), "load_inplace": True}
        connection._tell("/v1/load_lora_adapter", told, "take an adapter")
        sampled = engine.sample(requests, PLAIN)
    with pytest.raises(StageError, match=r"log-probability .*the sync did not reach the engine"):
        proof(engine, tmp_path)(Scorer(policy), requests, sampled, PLAIN)
    engine.load(adapter_weights(policy))
    prove()


def test_all_weights_after_every_sync_and_merged_adapters(server: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = server
    engine = asked(url, served(folder / "1"), tmp_path)
    for name in ("2", "1", "2"):
        model = load(folder, name)
        engine.load(whole_weights(model))
        assert difference(engine, model) < 1e-4
        assert difference(engine, model, SamplingConfig(max_completion_length=12, temperature=0.6)) < 1e-4
    model = adapted(folder)
    for _ in range(3):
        moved(model)
        assert difference(engine, model) > 0.1
        engine.load(whole_weights(model.get_base_model()))
        assert difference(engine, model) < 1e-4


def test_a_server_that_a_killed_run_left_paused_goes_on(server: tuple[str, Path], tmp_path: Path) -> None:
    """Paused as weights in flight pause it: it takes requests then, and answers none."""
    url, folder = server
    httpx.post(f"{url}/pause?mode=keep&clear_cache=false").raise_for_status()
    assert httpx.get(f"{url}/is_paused").json() == {"is_paused": True}
    engine, policy = asked(url, served(folder / "1"), tmp_path), load(folder, "1")
    engine.load(whole_weights(policy))
    assert difference(engine, policy) < 1e-4


def test_a_plain_reload_of_tied_weights_fails_the_proof(server: tuple[str, Path], tmp_path: Path) -> None:
    """Of the files of a checkpoint, which has no head where that is the embedding."""
    url, folder = server
    engine, policy = asked(url, served(folder / "1"), tmp_path), Scorer(load(folder, "2"))
    engine.load(whole_weights(load(folder, "1")))
    Connection(engine._servers.addresses[0], 60.0).take_weights(folder / "2")
    sampled = engine.sample(REQUESTS, PLAIN)
    if folder.name == "tied":
        with pytest.raises(StageError, match="may have kept the old head"):
            proof(engine, tmp_path)(policy, REQUESTS, sampled, PLAIN)
    else:
        proof(engine, tmp_path)(policy, REQUESTS, sampled, PLAIN)
    engine.load(whole_weights(policy.transformers_model))
    proof(engine, tmp_path)(policy, REQUESTS, engine.sample(REQUESTS, PLAIN), PLAIN)


def test_rows_that_fill_the_context_are_read(server: tuple[str, Path], tmp_path: Path) -> None:
    """All 64 tokens of it: nothing could be written behind them. By hand against transformers."""
    url, folder = server
    engine, model = asked(url, served(folder / "1"), tmp_path), load(folder, "2")
    engine.load(whole_weights(model))
    tokens = torch.randint(3, len(IDS), (64,), generator=torch.Generator().manual_seed(2)).tolist()
    pairs = [(tokens[:50], tokens[50:]), (tokens[:63], tokens[63:])]
    expected = [teacher_forced(model, *pair) for pair in pairs]
    assert [len(row) for row in expected] == [14, 1]
    for found, row in zip(engine.plain_logprobs(pairs), expected, strict=True):
        assert found == pytest.approx(row, abs=1e-4)
    with torch.no_grad():
        logs_TV = model(torch.tensor([tokens])).logits[0, 49:-1].log_softmax(-1)
    (whole, last) = engine.top_logprobs(pairs, 3)
    likely = logs_TV.topk(3)
    assert [[token for token, _ in place] for place in whole] == likely.indices.tolist()
    assert [[value for _, value in place] for place in whole] == [
        pytest.approx(row, abs=1e-4) for row in likely.values.tolist()
    ]
    assert [token for token, _ in last[0]] == [token for token, _ in whole[-1]]
    assert [value for _, value in last[0]] == pytest.approx([value for _, value in whole[-1]], abs=1e-4)


def test_an_answer_shorter_than_asked_for_is_an_error(server: tuple[str, Path], tmp_path: Path) -> None:
    """vLLM stops where its context ends, and says `length`."""
    url, folder = server
    engine = asked(url, served(folder / "1"), tmp_path)
    engine.load(whole_weights(load(folder, "1")))
    full = SampleRequest([5] * 60, tuple(range(8)), "r7")  # some of these do not end by themselves
    with pytest.raises(StageError, match="answered row r7 with 4 tokens, as if that were its limit, which is 12"):
        engine.sample([full], PLAIN)


def test_a_server_of_another_model_is_an_error(server: tuple[str, Path], tmp_path: Path) -> None:
    """Of another form, before weights are sent that it would break over; of another base, by the proof of the adapter
    on it."""
    url, folder = server
    save_model(tmp_path / "wide", 1, intermediate_size=128)
    with pytest.raises(StageError, match=f"{url} serves another model: its intermediate_size is 96, here"):
        asked(url, served(tmp_path / "wide"), tmp_path)
    whole, model = asked(url, served(folder / "1"), tmp_path), adapted(folder)
    whole.load(whole_weights(load(folder, "2")))
    on_it = asked(url, with_adapter(folder), tmp_path)
    on_it.load(adapter_weights(model))
    with pytest.raises(StageError, match="the sync did not reach the engine"):
        proof(on_it, tmp_path)(Scorer(model), REQUESTS, on_it.sample(REQUESTS, PLAIN), PLAIN)


@pytest.mark.parametrize("lora_r", [None, 4])
def test_a_stage_trains(lora_r: int | None, server: tuple[str, Path], tmp_path: Path) -> None:
    """Three steps, every sync proved by the trainer."""
    url, folder = server
    inputs = saved(tmp_path / "inputs", tied=folder.name == "tied")
    engine: dict[str, Any] = {"engine": "vllm_server", "urls": [url], "weights_folder": str(tmp_path)}
    metrics, made = trained("rl", inputs, tmp_path / "run", engine, lora_r=lora_r)
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in metrics)
    assert [row["weight_version"] for row in made[::16]] == [0, 1, 2]
