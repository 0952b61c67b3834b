"""Completions that are held to a form, against masks found by trying all texts and distributions added up by hand."""

from __future__ import annotations

import math
import re
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from artifacts.errors import StageError
from stages.rollouts.mixture import MixtureSampler
from stages.rollouts.requests import SampleRequest, SamplingConfig
from stages.rollouts.sampler import EmbeddedSampler
from stages.rollouts.structured import Structured
from tests.rollouts.forms import (
    EOS,
    STOP,
    TOKENS,
    allowed,
    every_byte,
    few_tokens,
    fits,
    is_balanced,
    pieces,
    whole_texts,
)

FINITE = "(ab|a|bca){1,2}d?|dd"
LONGEST = 7
PROMPT = [2, 5, 6]
UNFORCED = '%llguidance {"no_forcing": true}'
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["ab", "é", 12, True]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["kind", "count"],
    "additionalProperties": False,
}


def sampler(model: Any, tokenizer: Any, **keywords: Any) -> EmbeddedSampler:
    ends = {"eos_token_ids": (EOS, STOP), "pad_token_id": EOS}
    return EmbeddedSampler(model, **{**ends, "tokenizer": tokenizer, **keywords})


def asked(prompt: list[int], count: int, first: int = 0) -> SampleRequest:
    return SampleRequest(prompt, tuple(range(first, first + count)), "r")


def settings(longest: int = LONGEST + 1, **fields: Any) -> SamplingConfig:
    form = {"structured": {"regex": FINITE}}
    return SamplingConfig.model_validate({"max_completion_length": longest, **form, **fields})


def text_of(tokens: list[int]) -> str:
    return "".join(TOKENS[token] for token in tokens if token not in (EOS, STOP))


@torch.no_grad()
def following(model: Any, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([[*PROMPT, *tokens]]), use_cache=False).logits[0, -1].double()


def by_hand(model: Any, tokens: list[int], temperature: float) -> tuple[list[float], list[float], list[float]]:
    """Log-probabilities (masked, free, the model's own) of a completion's tokens; one pass for each."""
    texts = whole_texts(FINITE, LONGEST)
    found: tuple[list[float], list[float], list[float]] = ([], [], [])
    for place, token in enumerate(tokens):
        logits_V = following(model, tokens[:place])
        mask_V = torch.tensor(allowed(texts, text_of(tokens[:place])))
        kept_V = logits_V.masked_fill(~mask_V, -math.inf)
        for values, of_V in zip(found, (kept_V / temperature, logits_V / temperature, logits_V), strict=True):
            values.append(float(of_V.log_softmax(0)[token]))
    return found


def every_completion(model: Any, temperature: float) -> dict[tuple[int, ...], float]:
    """Probability of each completion there is, added up token by token."""
    texts, found = whole_texts(FINITE, LONGEST), {}
    open_: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while open_:
        tokens, probability = open_.pop()
        logits_V = following(model, list(tokens)) / temperature
        mask_V = torch.tensor(allowed(texts, text_of(list(tokens))))
        for token, share in enumerate(logits_V.masked_fill(~mask_V, -math.inf).softmax(0).tolist()):
            if share:
                (found.__setitem__ if token in (EOS, STOP) else lambda *one: open_.append(one))(
                    (*tokens, token), probability * share
                )
    return found


@pytest.fixture
def model(tiny_model: Any) -> Any:
    return tiny_model(vocab_size=len(TOKENS), initializer_range=0.3)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_what_is_drawn_has_the_probabilities_of_all_that_can_be(model: Any, temperature: float) -> None:
    expected = every_completion(model, temperature)
    assert sum(expected.values()) == pytest.approx(1)
    assert len(expected) > 100
    count = 3000
    [group] = sampler(model, few_tokens()).sample([asked(PROMPT, count)], settings(temperature=temperature))
    found = Counter(tuple(one.token_ids) for one in group)
    assert set(found) <= set(expected)
    assert {tokens[-1] for tokens in found} == {EOS, STOP}
    common = {tokens: share * count for tokens, share in expected.items() if share * count >= 5}
    rest = count - sum(common.values())
    drawn = {tokens: found[tokens] for tokens in common}
    terms = [((drawn[tokens] - one) ** 2, one) for tokens, one in common.items()]
    terms.append(((count - sum(drawn.values()) - rest) ** 2, rest))
    freedom = len(terms) - 1
    statistic = sum(square / one for square, one in terms)
    # Wilson and Hilferty: the cube root of chi-square over its degrees of freedom is normal, nearly
    spread = 2 / (9 * freedom)
    assert ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 4


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities(model: Any, temperature: float) -> None:
    """Of what was drawn from, of the same without the form, and of the model."""
    [group] = sampler(model, few_tokens()).sample([asked(PROMPT, 20)], settings(temperature=temperature))
    for one in group:
        masked, free, plain = by_hand(model, one.token_ids, temperature)
        assert one.logprobs == pytest.approx(masked, abs=1e-5)
        assert one.free_logprobs == pytest.approx(free, abs=1e-5)
        assert one.model_logprobs == pytest.approx(plain, abs=1e-5)
        assert one.finished
        assert text_of(one.token_ids) in whole_texts(FINITE, LONGEST)


def test_the_likeliest_token_is_the_likeliest_of_the_allowed(model: Any) -> None:
    [[one]] = sampler(model, few_tokens()).sample([asked(PROMPT, 1)], settings(temperature=0.0))
    texts = whole_texts(FINITE, LONGEST)
    for place, token in enumerate(one.token_ids):
        mask_V = torch.tensor(allowed(texts, text_of(one.token_ids[:place])))
        assert int(following(model, one.token_ids[:place]).masked_fill(~mask_V, -math.inf).argmax()) == token
    masked, free, _ = by_hand(model, one.token_ids, 1.0)
    assert one.logprobs == pytest.approx(masked, abs=1e-5)
    assert one.free_logprobs == pytest.approx(free, abs=1e-5)


def test_filters_choose_among_the_allowed(model: Any) -> None:
    [group] = sampler(model, few_tokens()).sample([asked(PROMPT, 15)], settings(top_k=2, temperature=0.8))
    texts = whole_texts(FINITE, LONGEST)
    for one in group:
        assert one.free_logprobs == pytest.approx(by_hand(model, one.token_ids, 0.8)[1], abs=1e-5)
        for place, (token, logprob) in enumerate(zip(one.token_ids, one.logprobs, strict=True)):
            mask_V = torch.tensor(allowed(texts, text_of(one.token_ids[:place])))
            kept_V = following(model, one.token_ids[:place]).masked_fill(~mask_V, -math.inf) / 0.8
            kept_V[kept_V < kept_V.topk(2).values[-1]] = -math.inf
            assert logprob == pytest.approx(float(kept_V.log_softmax(0)[token]), abs=1e-5)


def test_a_form_that_allows_all_changes_nothing(model: Any) -> None:
    """Down to the bits of the log-probabilities."""
    plain = SamplingConfig(max_completion_length=15, temperature=0.9, top_p=0.95)
    every = SamplingConfig(**{**plain.model_dump(), "structured": {"regex": "(?s).*"}})
    requests = [asked(PROMPT, 20), asked([3], 20, 7)]
    engine = sampler(model, few_tokens())
    for free, held in zip(*(engine.sample(requests, one) for one in (plain, every)), strict=True):
        for one, other in zip(free, held, strict=True):
            assert (one.token_ids, one.logprobs, one.finished) == (other.token_ids, other.logprobs, other.finished)
            assert one.model_logprobs == other.model_logprobs
            assert one.free_logprobs == []


def test_a_completion_stays_the_same_bits_whatever_else_is_in_the_batch(model: Any) -> None:
    requests = [asked(PROMPT, 5), asked([3], 2, 100), asked([4, 4], 3, 200)]
    together = sampler(model, few_tokens()).sample(requests, settings())
    apart = [
        [sampler(model, few_tokens()).sample([SampleRequest(one.prompt_ids, (seed,))], settings())[0][0]
         for seed in one.seeds]
        for one in requests
    ]  # fmt: skip
    assert together == apart
    # two at a time: others enter as some leave
    assert sampler(model, few_tokens(), max_batch_tokens=2 * (3 + LONGEST)).sample(requests, settings()) == together


def test_a_completion_is_cut_at_its_limit(model: Any) -> None:
    texts = whole_texts(FINITE, LONGEST)
    request = SampleRequest(PROMPT, tuple(range(40)), "r", tuple([1, 2] * 20))
    [group] = sampler(model, few_tokens()).sample([request], settings(longest=2))
    for one, limit in zip(group, request.limits or (), strict=True):
        assert one.finished == (one.token_ids[-1] in (EOS, STOP))
        assert len(one.token_ids) == limit or one.finished
        assert any(text.startswith(text_of(one.token_ids)) for text in texts)
    assert {one.finished for one in group} == {True, False}


FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"regex": r"-?[0-9]{1,3}(\.[0-9]+)?"}, lambda text: re.fullmatch(r"-?[0-9]{1,3}(\.[0-9]+)?", text)),
    ({"regex": "[a-c/]+\n?é|ab{2,4}"}, lambda text: re.fullmatch("[a-c/]+\n?é|ab{2,4}", text)),
    ({"regex": r"yes\/no|(?i)NO"}, lambda text: re.fullmatch("yes/no|[nN][oO]", text)),
    ({"choices": ["ab", "abc", 'say "é"\n', "\\"]}, lambda text: text in ("ab", "abc", 'say "é"\n', "\\")),
    ({"grammar": 'start: "a" start "b" | "c" // not a start "'}, is_balanced),
    ({"json_schema": SCHEMA}, fits(SCHEMA)),
]


@pytest.mark.parametrize("build", [every_byte, pieces])
@pytest.mark.parametrize(("form", "is_one"), FORMS)
def test_what_is_finished_is_of_the_form(tiny_model: Any, build: Any, form: dict[str, Any], is_one: Any) -> None:
    """With more tokens in the model than the tokenizer has."""
    tokenizer = build()
    model = tiny_model(vocab_size=len(tokenizer) + 5, max_position_embeddings=80, initializer_range=0.1)
    longest = settings(longest=60, structured=form, temperature=0.7)
    [group] = sampler(model, tokenizer).sample([asked([5, 6], 20)], longest)
    finished = [one for one in group if one.finished]
    # the first token of a text loses its space where it is read alone
    texts = [tokenizer.decode([6, *one.token_ids], skip_special_tokens=True) for one in finished]
    start = len(tokenizer.decode([6]))
    assert len(finished) > 7
    assert all(is_one(text[start:]) for text in texts), texts


def test_a_mixture_of_two_models_is_held_to_it_too(model: Any, tiny_model: Any) -> None:
    torch.manual_seed(5)
    other = tiny_model(vocab_size=len(TOKENS), initializer_range=0.5)
    ends = {"eos_token_ids": (EOS, STOP), "pad_token_id": EOS, "tokenizer": few_tokens()}
    [group] = MixtureSampler(model, lambda: nullcontext(other), 0.5, **ends).sample([asked(PROMPT, 20)], settings())
    assert {text_of(one.token_ids) for one in group} <= whole_texts(FINITE, LONGEST)


def test_a_form_that_the_tokens_cannot_write(model: Any) -> None:
    with pytest.raises(StageError, match="completion of prompt 0 cannot go on: no token of the tokenizer continues"):
        sampler(model, few_tokens()).sample([asked(PROMPT, 1)], settings(structured={"regex": "ax"}))


def test_the_sampler_needs_the_tokenizer(model: Any) -> None:
    with pytest.raises(StageError, match="structured needs the tokenizer"):
        sampler(model, None).sample([asked(PROMPT, 1)], settings())


def test_a_grammar_with_ends_for_vllm() -> None:
    """The word start in texts, comments and expressions is no rule."""
    grammar = 'start: "start" | start "a" | /start/ // start\n'
    ours = Structured(grammar=grammar).lark_with_ends([3, 4])
    renamed = 'whole_form: "start" | whole_form "a" | /start/ // start\n'
    assert ours == f"start: whole_form (<[3]> | <[4]>)?\n{renamed}\n{UNFORCED}\n"


def test_a_schema_keeps_the_order_of_its_properties() -> None:
    found = Structured.model_validate({"json_schema": {"properties": {"b": {}, "a": {}}, "type": "object"}})
    assert found.json_schema == '{"properties": {"b": {}, "a": {}}, "type": "object"}'
    assert Structured.model_validate(found.model_dump(mode="json")) == found
