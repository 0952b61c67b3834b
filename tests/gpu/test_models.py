"""Every kind of attention on the GPU gives the losses and gradients that separate rows have on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from stages.rollouts.requests import SamplingConfig
from stages.training.model import token_logprobs
from tests.gpu.generated import generated_on_the_gpu
from tests.rollouts.conftest import MODELS as SAMPLED
from tests.rollouts.conftest import SIZES
from tests.rollouts.sampling import PROMPTS, requests, sampler
from tests.training.conftest import packing_scorer, tiny_model
from tests.training.test_packed_rows import (
    MODELS,
    assert_close_to,
    gradients,
    groups_sharing_much,
    separate_rows,
    weighted_loss,
)


@pytest.mark.parametrize("model_type", MODELS)
def test_loss_and_gradients_equal_separate_rows_on_the_cpu(model_type: str) -> None:
    model: Any = tiny_model(model_type, **MODELS[model_type])
    groups = groups_sharing_much()
    expected_loss, expected = separate_rows(model, groups)
    scorer = packing_scorer(model).to("cuda")
    batch = scorer.layout(groups)
    loss = weighted_loss(scorer(batch, token_logprobs(batch)).logprobs_N)
    loss.backward()
    assert float(loss) == pytest.approx(expected_loss, rel=2e-6)
    assert_close_to(expected, gradients(model), 2e-5)


@pytest.mark.parametrize("name", SAMPLED)
def test_greedy_tokens_are_those_of_generate(name: str) -> None:
    kind, config, extra = SAMPLED[name]
    torch.manual_seed(1)
    model = kind(config(**{**SIZES, **extra})).eval().cuda()
    settings = SamplingConfig(temperature=0, max_completion_length=20)
    with sampler(model) as ours:
        for prompt, [completion] in zip(PROMPTS, ours.sample(requests(1), settings), strict=True):
            tokens, forced = generated_on_the_gpu(model, prompt)
            assert completion.token_ids == tokens
            assert_close(torch.tensor(completion.logprobs), forced, atol=1e-4, rtol=0)
