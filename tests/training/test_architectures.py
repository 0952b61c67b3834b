"""Log-probabilities of unusual architectures through a Scorer, against transformers' own logits."""

from __future__ import annotations

import pytest

from artifacts.errors import StageError
from stages.training.model import Scorer
from stages.training.probes import obstacle
from stages.training.trunk import UNBOUNDED
from tests.training.architectures import (
    GATED_NORMS,
    LLAMA4,
    MPT,
    UNBOUNDED_ROWS,
    assert_logprobs_are_its_own,
    assert_samples_are_its_own,
)
from tests.training.conftest import tiny_model

RECURRENT = 3e-5
"""Sums over chunks of a recurrence are in another order where rows are padded."""


@pytest.mark.parametrize("model_type", GATED_NORMS)
def test_norms_with_a_gate_are_left_alone(model_type: str) -> None:
    tolerance = RECURRENT if model_type == "mamba2" else 1e-5
    reason = assert_logprobs_are_its_own(tiny_model(model_type, **GATED_NORMS[model_type]), tolerance=tolerance)
    assert reason is not None


def test_a_model_that_is_its_own_base() -> None:
    """Llama 4's class for text names another base than it has; rows are longer than a chunk of its attention."""
    model = tiny_model("llama4_text", **LLAMA4)
    assert model.base_model is model
    assert assert_logprobs_are_its_own(model) == "layers of type chunked_attention in Llama4ForCausalLM"
    assert_samples_are_its_own(model)


def test_a_model_with_an_indexer_is_not_packed() -> None:
    """Whatever types its layers have: one is `full_attention` too, as long as it picks all tokens."""
    model = tiny_model()
    assert obstacle(model) is None
    model.config.index_topk = 2048
    assert obstacle(model) == "attention to the tokens that an indexer picks"


@pytest.mark.parametrize("model_type", UNBOUNDED_ROWS)
def test_models_without_a_longest_row(model_type: str) -> None:
    model = tiny_model(model_type, bounded=False, **UNBOUNDED_ROWS[model_type])
    assert not hasattr(model.config, "max_position_embeddings")
    assert Scorer(model).context_length == UNBOUNDED
    assert_logprobs_are_its_own(model, tolerance=RECURRENT)
    assert_samples_are_its_own(model, tolerance=RECURRENT)


def test_a_longest_row_of_another_name() -> None:
    model = tiny_model("mpt", bounded=False, **MPT)
    assert Scorer(model).context_length == 64
    assert_logprobs_are_its_own(model)
    assert_samples_are_its_own(model)


def test_a_model_without_a_cache_is_not_sampled_from() -> None:
    """It would take every token for the first."""
    with pytest.raises(StageError, match="RwkvForCausalLM takes no cache of the tokens before"):
        assert_samples_are_its_own(tiny_model("rwkv", attention_hidden_size=32))
