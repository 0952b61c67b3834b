"""The embedded sampler against transformers' generate, teacher forcing, and the exact distribution."""

import pytest
import torch
from torch.testing import assert_close

from artifacts.errors import StageError
from stages.rollouts.requests import SampleRequest, SamplingConfig
from tests.rollouts.sampling import END, PROMPTS, requests, sampler, teacher_forced

FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt2"]


def generated(model, prompt, **settings):
    tokens = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=list(END),
        **settings,
    )
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prompts", [PROMPTS, [prompt[:3] for prompt in PROMPTS if len(prompt) >= 3]])
def test_greedy_tokens_are_those_of_generate_on_each_prompt_alone(tiny_model, name, prompts):
    model = tiny_model(name)
    settings = SamplingConfig(temperature=0, max_completion_length=20)
    with sampler(model) as ours:
        for prompt, [completion] in zip(prompts, ours.sample(requests(1, prompts), settings), strict=True):
            alone = generated(model, prompt)
            assert completion.token_ids == alone
            assert completion.finished == (alone[-1] in END)
            forced = teacher_forced(model, prompt, alone)
            assert_close(torch.tensor(completion.logprobs), forced, atol=1e-4, rtol=0)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_is_that_of_generate(tiny_model, penalty):
    model = tiny_model()
    settings = SamplingConfig(temperature=0, max_completion_length=20, repetition_penalty=penalty)
    with sampler(model) as ours:
        changed = 0
        for prompt, [completion] in zip(PROMPTS, ours.sample(requests(1), settings), strict=True):
            assert completion.token_ids == generated(model, prompt, repetition_penalty=penalty)
            changed += completion.token_ids != generated(model, prompt)
    assert changed > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_are_those_of_teacher_forcing(tiny_model, name):
    model = tiny_model(name)
    settings = SamplingConfig(temperature=1.5, top_k=20, max_completion_length=25)
    lengths = set()
    with sampler(model) as ours:
        for prompt, group in zip(PROMPTS, ours.sample(requests(4), settings), strict=True):
            for completion in group:
                forced = teacher_forced(model, prompt, completion.token_ids, temperature=1.5, top_k=20)
                assert_close(torch.tensor(completion.logprobs), forced, atol=1e-4, rtol=0)
                own = teacher_forced(model, prompt, completion.token_ids)
                assert_close(torch.tensor(completion.model_logprobs), own, atol=1e-4, rtol=0)
                ends = [token in END for token in completion.token_ids]
                assert not any(ends[:-1]) and completion.finished == ends[-1]
                assert completion.finished or len(ends) == 25
                lengths.add(len(ends))
    # rows left at different times, so the batch did shrink
    assert len(lengths) > 4


# one of each option, and all together; a prompt with the likeliest next token in it, so that the penalty matters
OPTIONS = [
    {},
    {"temperature": 0.8},
    {"top_k": 6},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"temperature": 1.2, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("keywords", OPTIONS)
def test_frequencies_follow_the_exact_distribution(tiny_model, keywords):
    # after this prompt the model's next-token distribution is known exactly; 20,000 completions of one token
    model, prompt, draws = tiny_model(), [3, 4, 5], 20_000
    settings = SamplingConfig(max_completion_length=1, **keywords)
    with sampler(model, max_batch_tokens=10**9) as ours:
        [group] = ours.sample([SampleRequest(prompt, tuple(range(draws)))], settings)
    counts = torch.bincount(torch.tensor([one.token_ids[0] for one in group]), minlength=29).double()
    expected = draws * distribution(model, prompt, settings)
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    statistic = ((counts - expected).square() / expected)[common].sum().item()
    freedom = int(common.sum()) - 1
    # mean + 4 deviations of chi-square; the seeds are fixed, so this holds or not, without luck
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    of_tokens = distribution(model, prompt, settings).log()
    assert all(abs(one.logprobs[0] - of_tokens[one.token_ids[0]]) < 1e-4 for one in group[:200])


def distribution(model, prompt, settings):
    """The distribution written out token by token, in plain Python."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double().tolist()
    penalty = settings.repetition_penalty
    for token in set(prompt):
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    probabilities = (torch.tensor(logits, dtype=torch.float64) / settings.temperature).softmax(-1).tolist()
    order = sorted(range(29), key=lambda token: -probabilities[token])
    if settings.top_k:
        order = order[: settings.top_k]
    total = sum(probabilities[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= settings.top_p * total or probabilities[token] < settings.min_p * probabilities[order[0]]:
            break
        kept.append(token)
        mass += probabilities[token]
    result = torch.zeros(29, dtype=torch.float64)
    for token in kept:
        result[token] = probabilities[token] / mass
    return result


def test_the_model_is_left_as_it_was(tiny_model):
    model = tiny_model().train()
    before = model.config._attn_implementation
    with sampler(model) as ours:
        ours.sample(requests(1), SamplingConfig(max_completion_length=2))
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == before
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()


def test_a_prompt_beyond_the_context_is_refused_by_name(tiny_model):
    long = SampleRequest([1] * 60, (1,), row_id="abc-7")
    with sampler(tiny_model()) as ours:
        with pytest.raises(StageError, match=r"prompt 1 \(row abc-7\) has 60 tokens; .* the 64 .* more than 59 tokens"):
            ours.sample([*requests()[:1], long], SamplingConfig(max_completion_length=5))
        full = SampleRequest([1] * 64, (1,), row_id="abc-8")
        with pytest.raises(StageError, match=r"prompt 0 \(row abc-8\) has 64 tokens; .* the 64 "):
            ours.sample([full], SamplingConfig(max_completion_length=1))
        with pytest.raises(StageError, match=r"lower max_completion_length$"):
            ours.sample(requests(), SamplingConfig(max_completion_length=64))
        [[fits]] = ours.sample([long], SamplingConfig(max_completion_length=4))
        assert fits.token_ids


def test_an_empty_prompt_is_refused(tiny_model):
    with sampler(tiny_model()) as ours, pytest.raises(StageError, match=r"prompt 0 \(row r\) has no tokens"):
        ours.sample([SampleRequest([], (1,), row_id="r")], SamplingConfig())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_weights_that_are_not_numbers_are_named(tiny_model, name):
    model = tiny_model(name, tie_word_embeddings=False)
    model.lm_head.weight.data[3] = float("nan")
    with sampler(model) as ours, pytest.raises(StageError, match=r"logits for prompt \d .*are not numbers"):
        ours.sample(requests(2), SamplingConfig(max_completion_length=4))


def test_nothing_asked_gives_nothing(tiny_model):
    with sampler(tiny_model()) as ours:
        assert ours.sample([], SamplingConfig()) == []
        assert ours.sample([SampleRequest([1], ())], SamplingConfig(max_completion_length=2)) == [[]]
