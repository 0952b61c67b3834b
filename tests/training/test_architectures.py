"""Log-probabilities of unusual architectures through a Scorer, against transformers' own logits."""

from __future__ import annotations

import pytest

from tests.training.architectures import GATED_NORMS, LLAMA4, assert_logprobs_are_its_own, assert_samples_are_its_own
from tests.training.conftest import tiny_model


@pytest.mark.parametrize("model_type", GATED_NORMS)
def test_norms_with_a_gate_are_left_alone(model_type: str) -> None:
    # sums over chunks of the recurrence are reordered where rows are padded
    tolerance = 3e-5 if model_type == "mamba2" else 1e-5
    reason = assert_logprobs_are_its_own(tiny_model(model_type, **GATED_NORMS[model_type]), tolerance=tolerance)
    assert reason is not None


def test_a_model_that_is_its_own_base() -> None:
    """Llama 4's class for text names another base than it has; rows are longer than a chunk of its attention."""
    model = tiny_model("llama4_text", **LLAMA4)
    assert model.base_model is model
    assert assert_logprobs_are_its_own(model) == "layers of type chunked_attention in Llama4ForCausalLM"
    assert_samples_are_its_own(model)
