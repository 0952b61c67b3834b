"""What of a model vLLM can split over training processes, and how many of these there must be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from artifacts import open_store
from artifacts.errors import RequestError, StageError
from flows.plan import plan
from flows.recipe import Recipe
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.engine_split import config_problems
from stages.rollouts.vllm_engine import VllmEngine
from tests.flows.test_memory import folder, recipe_of, stage

QWEN3_8B = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12288, "vocab_size": 151936}
"""151,936 is 64 x 2,374."""


@pytest.mark.parametrize(
    ("processes", "changes", "said"),
    [
        (1, {}, []),
        (8, {}, []),
        (16, {}, []),  # each key-value head on two processes
        (3, {"num_key_value_heads": 3}, [r"has 32 attention heads, of which 3 processes", r"a vocabulary of 151936"]),
        (4, {"num_key_value_heads": 6}, [r"has 6 key-value heads"]),
        (8, {"intermediate_size": 12284}, [r"a feed-forward part of 12284 features"]),
        (16, {"vocab_size": 65}, []),  # filled up to 128
        (3, {"num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 190}, []),  # to 192
        (2, {"num_key_value_heads": None}, []),
        (3, {"num_attention_heads": None}, []),  # of a kind that vLLM refuses itself
        (2, {"intermediate_size": 3, "moe_intermediate_size": 4}, []),  # experts alone
    ],
)
def test_models(processes: int, changes: dict[str, Any], said: list[str]) -> None:
    problems = config_problems(processes, {**QWEN3_8B, **changes})
    assert len(problems) == len(said), problems
    for problem, message in zip(problems, said, strict=True):
        assert re.search(message, problem)


def recipe(tmp_path: Path, together: int, processes: int) -> Recipe:
    rollouts = {"engine": "vllm", "tensor_parallel_size": together}
    trained = stage("rl", "./base", rollouts=rollouts, rewards=["exact_match"], train_batch_size=8)
    return recipe_of(tmp_path, {"s": {**trained, "launch": {"processes": processes}}})


def test_a_recipe_is_refused_before_anything_runs(tmp_path: Path) -> None:
    """By the number of its processes when it is read, by the sizes of its model when it is planned."""
    folder(tmp_path / "base")
    place = r"stages\.s\.with\.rollouts\.tensor_parallel_size: "
    with pytest.raises(RequestError, match=place + r".* 4 with engine vllm: .* launch\.processes 6 is no multiple"):
        recipe(tmp_path, 4, 6)
    store = open_store(str(tmp_path / "store"))
    assert plan(recipe(tmp_path, 4, 8), store).decisions["s"].state == "run"
    with pytest.raises(RequestError, match=place + r".*the model has 32 attention heads, of which 3 processes cannot"):
        plan(recipe(tmp_path, 3, 6), store)


def test_an_engine_is_refused_before_it_starts(tmp_path: Path) -> None:
    """Where no recipe came before it."""
    model = ServedModel(folder(tmp_path / "base"), tmp_path / "base", "float32", 151936, (), 0)
    for together, processes, said in ((2, 3, "no multiple"), (3, 6, "has 32 attention heads")):
        with pytest.raises(StageError, match=said):
            VllmEngine(model, EngineConfig(engine="vllm", tensor_parallel_size=together), processes)
