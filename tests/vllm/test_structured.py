"""Forms in vLLM against the embedded sampler: greedy completions are the same, draws of the same distribution."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from artifacts.errors import DataError
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.requests import SampleRequest, SamplingConfig
from stages.rollouts.sampler import EmbeddedSampler
from stages.training.whole_weights import whole_weights
from tests.rollouts.forms import EOS, STOP, every_byte
from tests.stages.small_models import save_dataset
from tests.vllm.test_stage import trained

FORMS: list[dict[str, Any]] = [
    {"regex": "[a-c]{2,5}(12|é)?"},
    {"choices": ["ab", "abc", "true"]},
    {"grammar": 'start: "a" start "b" | "c"'},
    {"json_schema": {"type": "object", "properties": {"n": {"enum": [12, True]}}, "required": ["n"]}},
]
REQUESTS = [SampleRequest(prompt, tuple(range(6)), f"r{prompt[0]}") for prompt in ([5, 6], [70, 80, 90], [33])]


def save_model(folder: Path) -> Any:
    tokenizer = every_byte()
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + 3,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=[EOS, STOP],
            pad_token_id=None,
            initializer_range=0.2,
        )
    ).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """(engine, model)"""
    from stages.rollouts.vllm_engine import VllmEngine

    folder = tmp_path_factory.mktemp("model")
    model = save_model(folder)
    vocabulary = model.config.vocab_size
    served = ServedModel(folder, folder, "float32", vocabulary, (EOS, STOP), seed=7, structured=True)
    engine = VllmEngine(served, EngineConfig(engine="vllm", kv_cache_gib=0.05))
    engine.load(whole_weights(model))
    yield engine, model
    engine.close()


def settings(form: dict[str, Any], **fields: Any) -> SamplingConfig:
    return SamplingConfig.model_validate({"max_completion_length": 16, "structured": form, **fields})


def embedded(model: Any) -> EmbeddedSampler:
    return EmbeddedSampler(model, eos_token_ids=(EOS, STOP), pad_token_id=EOS, tokenizer=every_byte())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
def test_greedy_completions_are_the_embedded_samplers(opened: tuple[Any, Any], form: dict[str, Any]) -> None:
    engine, model = opened
    one_each = [SampleRequest(one.prompt_ids, (0,), one.row_id) for one in REQUESTS]
    theirs, ours = (one.sample(one_each, settings(form, temperature=0.0)) for one in (engine, embedded(model)))
    for [their], [our] in zip(theirs, ours, strict=True):
        assert (their.token_ids, their.finished) == (our.token_ids, our.finished)
        assert their.logprobs == pytest.approx(our.logprobs, abs=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
def test_what_it_draws_is_of_the_embedded_samplers_distribution(opened: tuple[Any, Any], form: dict[str, Any]) -> None:
    """Masks step by step, by the embedded sampler's own; the order of mask, temperature and filters shows here too."""
    from stages.rollouts.draw import _filter
    from stages.rollouts.form_masks import FormMasks
    from stages.rollouts.rows import Row

    engine, model = opened
    drawn = settings(form, temperature=0.7, top_k=4)
    assert drawn.structured is not None
    ends = set()
    for request, group in zip(REQUESTS, engine.sample(REQUESTS, drawn), strict=True):
        for one in group:
            masks = FormMasks(drawn.structured, every_byte(), (EOS, STOP), model.config.vocab_size)
            masks.enter(1)
            with torch.no_grad():
                tokens = torch.tensor([[*request.prompt_ids, *one.token_ids]])
                logits = model(tokens).logits[0, len(request.prompt_ids) - 1 : -1]
            expected = []
            for logits_V, token in zip(logits, one.token_ids, strict=True):
                allowed_BV = masks.allowed_BV([Row(0, 0, request.prompt_ids, 0, 16)])
                kept_BV = logits_V[None].masked_fill(~allowed_BV, -torch.inf) / drawn.temperature
                weights_BV = (kept_BV - kept_BV.max()).exp()
                _filter(weights_BV, drawn)
                expected.append(float((weights_BV[0, token] / weights_BV.sum()).log()))
                masks.take([token])
            assert one.logprobs == pytest.approx(expected, abs=1e-4)
            assert all(value != value for value in one.free_logprobs)
            ends |= {one.token_ids[-1]} if one.finished else set()
    assert len(ends) == 2 or "choices" in form, ends


def test_a_run_in_process_and_by_a_server(tmp_path: Path) -> None:
    """Every sync is proved behind the form; the server is the stage's own, and is told what to read forms with."""
    save_model(tmp_path / "policy")
    rows = save_dataset(tmp_path / "rows", "prompt_completion", [{"prompt": "12", "completion": ""}] * 4)
    inputs = {"model": tmp_path / "policy", "dataset": rows}
    made = {}
    for engine in ("vllm", "vllm_server"):
        form = {"structured": FORMS[0]}
        metrics, made[engine] = trained("rl", inputs, tmp_path / engine, {"engine": engine}, max_steps=2, **form)
        assert all(math.isfinite(row["loss"]) for row in metrics)
    assert [row["token_ids"] for row in made["vllm"]] == [row["token_ids"] for row in made["vllm_server"]]
    for row in made["vllm"]:
        assert len(row["token_ids"]) == 6 or re.fullmatch(FORMS[0]["regex"], row["completion"]), row
        assert all(map(math.isnan, row["free_logprobs"]))
    recorded = {"model": tmp_path / "policy", "rollouts": tmp_path / "vllm" / "job" / "out" / "rollouts"}
    with pytest.raises(DataError, match=r"held to a form \(structured\) by vLLM, which does not say how likely"):
        trained("rl", recorded, tmp_path / "again", {"engine": "embedded"}, max_steps=1, rewards=[])
