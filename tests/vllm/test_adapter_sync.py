"""LoRA sent alone: vLLM applies it to the base as transformers and peft do, and after every sync to the newest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from artifacts.errors import StageError
from stages.context import local_context
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.requests import SamplingConfig
from stages.training.adapter_weights import adapter_weights, served_adapter
from stages.training.model import Scorer
from stages.training.out_of_memory import TokenBudget
from stages.training.sync_proof import SyncProof
from tests.vllm.models import save_model, served
from tests.vllm.test_engine import PLAIN, REQUESTS, difference, load, moved
from tests.vllm.test_stage import processes_of, saved, trained


def adapted(folder: Path, **settings: Any) -> Any:
    torch.manual_seed(3)
    given = {"r": 4, "target_modules": "all-linear", **settings}
    return get_peft_model(load(folder, "1"), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **given)).eval()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """(engine for adapters of rank 4 on all linear layers, folder of the base)"""
    from dataclasses import replace

    from stages.rollouts.vllm_engine import VllmEngine

    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "1", 1, tied=request.param)
    model = replace(served(folder / "1"), adapter=served_adapter(adapted(folder)))
    engine = VllmEngine(model, EngineConfig(engine="vllm", kv_cache_gib=0.05, lora_sync="adapter"))
    yield engine, folder
    engine.close()


def test_after_every_sync(opened: Any) -> None:
    engine, folder = opened
    model = adapted(folder)
    for _ in range(3):
        moved(model)
        engine.load(adapter_weights(model))
        assert difference(engine, model) < 1e-4
        assert difference(engine, model, SamplingConfig(max_completion_length=12, temperature=0.6)) < 1e-4
    moved(model)
    assert difference(engine, model) > 0.1  # the newest is not there yet, and the adapter does something


def test_the_proof_covers_it(opened: Any, tmp_path: Path) -> None:
    """Also behind filters, where log-probabilities come from a pass over prompts."""
    engine, folder = opened
    model = adapted(folder)
    context = local_context("sft", {}, folder=tmp_path)
    proof = SyncProof(engine, TokenBudget(context, 4096), tolerance=1e-3, dtypes=("float32", "float32"))
    for settings in (PLAIN, SamplingConfig(max_completion_length=12, top_p=0.8)):
        engine.load(adapter_weights(model))
        proof(Scorer(model), REQUESTS, engine.sample(REQUESTS, settings), settings)
        moved(model)
        with pytest.raises(StageError, match="the sync did not reach the engine"):
            proof(Scorer(model), REQUESTS, engine.sample(REQUESTS, settings), settings)
    assert proof.passed == 2


def test_one_that_does_not_fit_is_refused(opened: Any) -> None:
    engine, folder = opened
    larger = adapted(folder, r=16)
    engine._model.adapter.settings["r"] = 16
    try:
        with pytest.raises(StageError, match=r"vLLM does not apply this adapter: .*rank.*set rollouts.lora_sync"):
            engine.load(adapter_weights(larger))
    finally:
        engine._model.adapter.settings["r"] = 4


@pytest.mark.parametrize(("tied", "engine"), [(True, "vllm"), (False, "vllm_server")])
def test_a_stage_trains_what_it_does_with_merged_weights(
    tied: bool, engine: str, in_process: Callable[..., Any], tmp_path: Path
) -> None:
    """In process, and by a server that the stage starts, of which nothing stays."""
    merged, made_merged = in_process(tied, 4)
    settings = {"engine": engine, "lora_sync": "adapter"}
    alone, made_alone = trained("rl", saved(tmp_path / "inputs", tied=tied), tmp_path / "run", settings, lora_r=4)
    assert [row["token_ids"] for row in made_alone] == [row["token_ids"] for row in made_merged]
    assert [row["loss"] for row in alone] == pytest.approx([row["loss"] for row in merged], abs=1e-5)
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in alone)
    assert not processes_of(tmp_path)
