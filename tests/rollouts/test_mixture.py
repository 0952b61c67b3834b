"""Sampling from the geometric mixture of two models, against the mixture written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close

from artifacts.errors import StageError
from stages.rollouts.mixture import MixtureSampler
from stages.rollouts.requests import Completion, SampleRequest, SamplingConfig
from tests.rollouts.sampling import END, PROMPTS, flat, requests, sampler

Build = Callable[..., Any]
ENDINGS: dict[str, Any] = {"eos_token_ids": END, "pad_token_id": 0}
COEFFICIENT = 0.3


def other_than(model: Any) -> Any:
    """The same model with other weights."""
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.mul_(1 - 0.3 * (number % 3))
    return model


def mixture(model: Any, other: Any, coefficient: float = COEFFICIENT, **keywords: Any) -> MixtureSampler:
    return MixtureSampler(model, lambda: nullcontext(other), coefficient, **(ENDINGS | keywords))


@torch.no_grad()
def mixed(models: Sequence[Any], prompt: Sequence[int], tokens: Sequence[int], coefficient: float) -> Tensor:
    """[T, V] log-probabilities of what may stand in the place of each token, in one pass of each model."""
    sequence = torch.tensor([[*prompt, *tokens]])
    own, other = (model(sequence, use_cache=False).logits[0, len(prompt) - 1 : -1].double() for model in models)
    return ((1 - coefficient) * own.log_softmax(-1) + coefficient * other.log_softmax(-1)).log_softmax(-1)


def check(models: Sequence[Any], prompts: Sequence[list[int]], groups: Sequence[Sequence[Completion]]) -> None:
    """At temperature 1 without filters: all log-probabilities are the mixture's."""
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            logprobs_TV = mixed(models, prompt, completion.token_ids, COEFFICIENT)
            forced_T = logprobs_TV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert_close(torch.tensor(completion.logprobs, dtype=torch.float64), forced_T, atol=1e-4, rtol=0)
            assert completion.model_logprobs == completion.logprobs


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_logprobs_are_the_mixtures(tiny_model: Build, name: str) -> None:
    models = tiny_model(name), other_than(tiny_model(name))
    ours = mixture(*models)
    groups = ours.sample(requests(3), SamplingConfig(max_completion_length=20))
    assert ours.unshared is None
    check(models, PROMPTS, groups)
    assert len({len(completion.token_ids) for completion in flat(groups)}) > 3  # rows left at different times


def test_two_architectures(tiny_model: Build) -> None:
    """Of one vocabulary."""
    models = tiny_model("llama"), tiny_model("gpt2")
    check(models, PROMPTS, mixture(*models).sample(requests(2), SamplingConfig(max_completion_length=12)))


@pytest.mark.parametrize("padded", [(0,), (1,), (0, 1)])
def test_models_whose_rows_do_not_share(
    tiny_model: Build, padded: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in batches with copies of the prompts, the other not, or both; in little memory."""
    from stages.rollouts import sampler as module

    models = tiny_model("llama"), other_than(tiny_model("llama"))
    apart = [models[place] for place in padded]
    monkeypatch.setattr(module, "why_not_shared", lambda model: "so" if any(model is one for one in apart) else None)
    ours = mixture(*models, max_batch_tokens=200)
    groups = ours.sample(requests(3), SamplingConfig(max_completion_length=12))
    assert ours.unshared == "so"
    check(models, PROMPTS, groups)


@pytest.mark.parametrize("keywords", [{}, {"temperature": 0.7, "top_p": 0.8}])
def test_frequencies_follow_the_exact_distribution(tiny_model: Build, keywords: dict[str, Any]) -> None:
    """20,000 completions of one token; the seeds are fixed."""
    models, prompt, draws = (tiny_model(), other_than(tiny_model())), [3, 4, 5], 20_000
    settings = SamplingConfig(max_completion_length=1, **keywords)
    ours = mixture(*models, max_batch_tokens=10**9)
    [group] = ours.sample([SampleRequest(prompt, tuple(range(draws)))], settings)
    counts = torch.bincount(torch.tensor([one.token_ids[0] for one in group]), minlength=29).double()
    expected = draws * restricted(mixed(models, prompt, [0], COEFFICIENT)[0], **keywords)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    statistic = float(((counts - expected).square() / expected)[common].sum())
    freedom = int(common.sum()) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    alone = draws * restricted(mixed(models, prompt, [0], 0.0)[0], **keywords)
    known = (alone >= 5) & common
    assert float(((counts - alone).square() / alone)[known].sum()) > 10 * freedom  # and not one model's


def restricted(logprobs_V: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Token by token, in plain Python."""
    probabilities = (logprobs_V / temperature).softmax(-1).tolist()
    kept, mass = {}, 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        if mass >= top_p:
            break
        kept[token], mass = probabilities[token], mass + probabilities[token]
    return torch.tensor([kept.get(token, 0.0) / mass for token in range(len(probabilities))], dtype=torch.float64)


def test_a_completion_is_the_same_bits_whatever_the_batch(tiny_model: Build) -> None:
    ours = mixture(tiny_model(), other_than(tiny_model()))
    settings = SamplingConfig(max_completion_length=10)
    together = ours.sample(requests(4), settings)
    alone = [ours.sample([request], settings)[0] for request in requests(4)]
    assert together == alone


@pytest.mark.parametrize(("coefficient", "place"), [(0.0, 0), (1.0, 1)])
def test_at_its_ends_it_is_one_of_the_models(tiny_model: Build, coefficient: float, place: int) -> None:
    models, settings = (tiny_model(), other_than(tiny_model())), SamplingConfig(max_completion_length=10)
    found = mixture(*models, coefficient).sample(requests(2), settings)
    with sampler(models[place]) as plain:
        expected = plain.sample(requests(2), settings)
    assert [one.token_ids for one in flat(found)] == [one.token_ids for one in flat(expected)]


def test_a_model_with_its_own_adapters_off(tiny_model: Build) -> None:
    """Both are one object; only while the other one computes are the adapters off."""
    wrapped: Any = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    wrapped.eval()
    base = tiny_model()
    inside: list[bool] = []

    @contextmanager
    def other() -> Iterator[Any]:
        with wrapped.disable_adapter():
            inside.append(True)
            yield wrapped.get_base_model()

    ours = MixtureSampler(wrapped.get_base_model(), other, COEFFICIENT, **ENDINGS)
    groups = ours.sample(requests(2), SamplingConfig(max_completion_length=8))
    check((wrapped, base), PROMPTS, groups)
    assert len(inside) > 8


def test_other_vocabularies_are_refused(tiny_model: Build) -> None:
    ours = mixture(tiny_model(), tiny_model(vocab_size=31))
    with pytest.raises(StageError, match="the policy has 29 tokens, the reference 31"):
        ours.sample(requests(1), SamplingConfig(max_completion_length=2))


def test_a_prompt_beyond_the_others_context_is_refused(tiny_model: Build) -> None:
    ours = mixture(tiny_model(), tiny_model(max_position_embeddings=8))
    with pytest.raises(StageError, match="more than the 8 the model takes"):
        ours.sample(requests(1), SamplingConfig(max_completion_length=4))
