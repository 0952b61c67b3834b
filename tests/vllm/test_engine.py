"""vLLM in process against transformers: the same log-probabilities after every sync, whatever is trained and tied."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from artifacts.errors import StageError
from stages.context import local_context
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.requests import SampleRequest, SamplingConfig
from stages.training.model import Scorer
from stages.training.out_of_memory import TokenBudget
from stages.training.sync_proof import SyncProof
from stages.training.whole_weights import whole_weights
from tests.data.characters import IDS, ids
from tests.vllm.models import EOS, save_model, served, teacher_forced, worst

PROMPTS = [ids("abc"), ids("da"), ids("hgfedcb")]
REQUESTS = [SampleRequest(prompt, tuple(range(8)), f"r{index}") for index, prompt in enumerate(PROMPTS)]
PLAIN = SamplingConfig(max_completion_length=12)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """(engine, folder of the model that it was opened for, with another one beside it)"""
    from stages.rollouts.vllm_engine import VllmEngine

    folder = tmp_path_factory.mktemp("models")
    for seed in (1, 2):
        save_model(folder / str(seed), seed, tied=request.param)
    engine = VllmEngine(served(folder / "1"), EngineConfig(engine="vllm", kv_cache_gib=0.05))
    yield engine, folder
    engine.close()


def load(folder: Path, name: str) -> Any:
    return LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()


def difference(engine: Any, model: Any, settings: SamplingConfig = PLAIN) -> float:
    """Of the log-probabilities that the engine samples with."""
    sampled = engine.sample(REQUESTS, settings)
    pairs = [(prompt, one) for prompt, group in zip(PROMPTS, sampled, strict=True) for one in group]
    expected = [teacher_forced(model, prompt, one.token_ids, settings.temperature) for prompt, one in pairs]
    return worst([one.logprobs for _, one in pairs], expected)


def test_after_every_sync_of_all_weights(opened: Any) -> None:
    engine, folder = opened
    for name in ("1", "2", "1"):
        model = load(folder, name)
        engine.load(whole_weights(model))
        assert difference(engine, model) < 1e-4
        assert difference(engine, model, SamplingConfig(max_completion_length=12, temperature=0.6)) < 1e-4


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_after_every_sync_of_merged_adapters_that_stay_as_they_are(opened: Any, kind: str) -> None:
    engine, folder = opened
    torch.manual_seed(3)
    settings = LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, use_dora=kind == "dora"
    )
    adapted = get_peft_model(load(folder, "1"), settings).eval()
    base = adapted.get_base_model()
    for _ in range(3):
        moved(adapted)
        assert difference(engine, adapted) > 0.1  # the engine does not have them yet
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        engine.load(whole_weights(base))
        assert difference(engine, adapted) < 1e-4
        assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


@torch.no_grad()
def moved(adapted: Any) -> None:
    """What is trained in it becomes something else."""
    for name, tensor in adapted.named_parameters():
        if "lora_" in name:
            tensor.add_(torch.randn_like(tensor), alpha=0.2)


def prove(engine: Any, scorer: Scorer, tmp_path: Path, settings: SamplingConfig = PLAIN) -> None:
    """Fresh rollouts against the scorer's weights, as the stages do."""
    context = local_context("sft", {}, folder=tmp_path)
    proof = SyncProof(engine, TokenBudget(context, 4096), tolerance=1e-3, dtypes=("float32", "float32"))
    proof(scorer, REQUESTS, engine.sample(REQUESTS, settings), settings)
    assert proof.passed == 1


def test_a_plain_reload_of_tied_weights_fails_the_proof_and_ours_passes(opened: Any, tmp_path: Path) -> None:
    engine, folder = opened
    scorer = Scorer(load(folder, "2"))
    tied = scorer.transformers_model.config.tie_word_embeddings
    engine.load(whole_weights(load(folder, "1")))
    engine._llm.llm_engine.vllm_config.load_config.load_format = "auto"  # from files
    engine._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder / "2")})
    engine._llm.reset_prefix_cache()
    if tied:  # the checkpoint has no head, so the packed one stays as it was
        with pytest.raises(StageError, match=r"completion of row r\d, log-probability .*may have kept the old head"):
            prove(engine, scorer, tmp_path)
    else:
        prove(engine, scorer, tmp_path)
    engine.load(whole_weights(scorer.transformers_model))
    prove(engine, scorer, tmp_path)


def test_the_proof_looks_behind_filters(opened: Any, tmp_path: Path) -> None:
    """Log-probabilities of a cut distribution do not compare, so the engine is asked for the plain ones."""
    engine, folder = opened
    cut = SamplingConfig(max_completion_length=12, top_p=0.8, temperature=1.3)
    engine.load(whole_weights(load(folder, "2")))
    prove(engine, Scorer(load(folder, "2")), tmp_path, cut)
    with pytest.raises(StageError, match="the sync did not reach the engine"):
        prove(engine, Scorer(load(folder, "1")), tmp_path, cut)


def test_filters_leave_the_same_distribution_as_the_embedded_sampler(opened: Any) -> None:
    """Log-probabilities of what vLLM drew, against the probabilities that our own filters leave."""
    from stages.rollouts.draw import _filter, penalized

    engine, folder = opened
    model = load(folder, "2")
    engine.load(whole_weights(model))
    for fields in ({"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"repetition_penalty": 1.7}, {"temperature": 0.0}):
        settings = SamplingConfig(max_completion_length=12, **{"temperature": 0.8, **fields})
        found, expected = [], []
        for prompt, group in zip(PROMPTS, engine.sample(REQUESTS, settings), strict=True):
            for one in group:
                seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)
                seen[0, prompt] = True
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *one.token_ids]])).logits[0, len(prompt) - 1 : -1]
                values = []
                for logits_V, token in zip(logits, one.token_ids, strict=True):
                    changed = penalized(logits_V[None], seen, settings.repetition_penalty)
                    changed = changed / (settings.temperature or 1.0)
                    weights = (changed - changed.max()).exp()
                    if settings.temperature:
                        _filter(weights, settings)
                    values.append(float((weights[0, token] / weights.sum()).log()))
                    seen[0, token] = True
                found.append(one.logprobs)
                expected.append(values)
        assert worst(found, expected) < 1e-4, fields


def test_more_prompts_than_one_pass_takes(opened: Any) -> None:
    """vLLM on a CPU cannot read a prompt in parts where its completion has a seed."""
    engine, folder = opened
    model = load(folder, "2")
    engine.load(whole_weights(model))
    draws = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, len(IDS), (160, 50), generator=draws).tolist()  # 8,000 tokens
    found = engine.sample([SampleRequest(prompt, (0,)) for prompt in prompts], SamplingConfig(max_completion_length=4))
    expected = [teacher_forced(model, prompt, one.token_ids) for prompt, (one,) in zip(prompts, found, strict=True)]
    assert worst([one.logprobs for (one,) in found], expected) < 1e-4


def test_ends(opened: Any) -> None:
    engine, folder = opened
    engine.load(whole_weights(load(folder, "2")))
    stop = ids("a")[0]
    settings = SamplingConfig(max_completion_length=12, stop_token_ids=(stop,), stop_strings=("bb",))
    limits = (3, 0, 12, 12, 12, 12, 12, 12)
    for group in engine.sample([SampleRequest(prompt, tuple(range(8)), None, limits) for prompt in PROMPTS], settings):
        assert group[1].token_ids == []
        assert len(group[0].token_ids) <= 3
        for one, limit in zip(group, limits, strict=True):
            *before, last = one.token_ids or [stop]
            assert stop not in before and EOS not in before
            ended = last in (stop, EOS) or one.token_ids[-2:] == ids("bb")
            assert one.finished == (ended and limit > 0) and (ended or len(one.token_ids) == limit)


def test_equal_seeds_are_equal_completions_and_others_are_not(opened: Any) -> None:
    engine, folder = opened
    engine.load(whole_weights(load(folder, "2")))
    first = [[one.token_ids for one in group] for group in engine.sample(REQUESTS, PLAIN)]
    alone = engine.sample([REQUESTS[1]], PLAIN)
    assert [one.token_ids for one in alone[0]] == first[1]
    assert len({tuple(tokens) for tokens in first[2]}) > 4
