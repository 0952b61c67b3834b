"""Tiny random models and groups for the loop's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from stages.seeds import derive, generator
from stages.training.batch import Branch, Group
from stages.training.model import Scorer
from stages.training.probes import settle_layout

VOCABULARY = 61
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Settings of a tiny model's configuration."""


def tiny_model(model_type: str = "llama", *, bounded: bool = True, **changes: object) -> torch.nn.Module:
    """Two layers, hidden size 32, weights from a fixed seed. Not `bounded`: rows of any length, for a configuration
    that has no such setting."""
    settings: dict[str, object] = {"vocab_size": VOCABULARY, **SIZES, "tie_word_embeddings": True}
    if not bounded:
        del settings["max_position_embeddings"]
    torch.manual_seed(derive(0, "tiny", model_type))
    config = AutoConfig.for_model(model_type, **(settings | changes))
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    implementation = "eager" if capped else None  # the default leaves soft-capping out
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():  # the library's initialization is so small that every distribution is uniform
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8)
    return model.eval()


def packing_scorer(model: torch.nn.Module) -> Scorer:
    """The model with packed rows, as the stages use it."""
    scorer = Scorer(model)
    assert settle_layout(scorer) is None
    return scorer


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A tiny Llama saved as a model folder, without a tokenizer."""
    folder = tmp_path / "tiny-model"
    tiny_model().save_pretrained(folder)
    return folder


def random_groups(
    count: int, branches: int, *, seed: int = 0, prefix: tuple[int, int] = (1, 9), vocabulary: int = VOCABULARY
) -> list[Group]:
    """Groups of unequal lengths."""
    draws = generator(seed, "groups", count, branches)
    groups = []
    for number in range(count):
        prompt = draws.integers(3, vocabulary, draws.integers(*prefix)).tolist()
        tails = [draws.integers(3, vocabulary, draws.integers(1, 7)).tolist() for _ in range(branches)]
        groups.append(Group(f"row{number}", prompt, tuple(Branch(tail) for tail in tails)))
    return groups


@pytest.fixture(scope="session")
def _group_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Once a session: DeepSpeed keeps hold of the first group it sees."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def process_group(_group_of_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of this process alone, which sharding needs."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
