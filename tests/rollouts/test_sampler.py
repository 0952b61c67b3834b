"""The embedded sampler against transformers' generate, teacher forcing, and the exact distribution."""

import pytest
import torch
from torch.testing import assert_close

from artifacts.errors import StageError
from stages.rollouts.requests import SampleRequest, SamplingConfig
from stages.rollouts.sampler import EmbeddedSampler

# prompts of unequal and of equal length, in an order that is not the sampler's
PROMPTS = [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13, 14], [6], [20, 21, 22], [28, 2, 17, 9, 9, 1]]
END = (5, 12)


def sampler(model, **keywords):
    return EmbeddedSampler(model, **{"eos_token_ids": END, "pad_token_id": 0, **keywords})


def requests(completions=1, prompts=PROMPTS):
    return [
        SampleRequest(prompt, tuple(1000 * number + index for index in range(completions)))
        for number, prompt in enumerate(prompts)
    ]


def teacher_forced(model, prompt, tokens, temperature=1.0):
    """Log-probability of each token, in one pass over prompt and completion without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("prompts", [PROMPTS, [prompt[:3] for prompt in PROMPTS if len(prompt) >= 3]])
def test_greedy_tokens_are_those_of_generate_on_each_prompt_alone(tiny_model, name, prompts):
    model = tiny_model(name)
    settings = SamplingConfig(temperature=0, max_completion_length=20)
    for prompt, [completion] in zip(prompts, sampler(model).sample(requests(1, prompts), settings), strict=True):
        alone = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=list(END),
        )[0, len(prompt) :].tolist()
        assert completion.token_ids == alone
        assert completion.finished == (alone[-1] in END)
        forced = teacher_forced(model, prompt, alone)
        assert_close(torch.tensor(completion.logprobs), forced, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_logprobs_are_those_of_teacher_forcing(tiny_model, name):
    model = tiny_model(name)
    sampled = sampler(model).sample(requests(4), SamplingConfig(temperature=1.5, max_completion_length=25))
    lengths = set()
    for prompt, group in zip(PROMPTS, sampled, strict=True):
        for completion in group:
            forced = teacher_forced(model, prompt, completion.token_ids, temperature=1.5)
            assert_close(torch.tensor(completion.logprobs), forced, atol=1e-4, rtol=0)
            ends = [token in END for token in completion.token_ids]
            assert not any(ends[:-1]) and completion.finished == ends[-1]
            assert completion.finished or len(ends) == 25
            lengths.add(len(ends))
    # rows left at different times, so the batch did shrink
    assert len(lengths) > 5


def test_a_completion_depends_on_its_prompt_and_seed_only(tiny_model):
    model, settings = tiny_model(dtype=torch.float64), SamplingConfig(max_completion_length=25)
    together = sampler(model).sample(requests(4), settings)
    small = sampler(model, max_batch_tokens=70).sample(requests(4), settings)
    backwards = sampler(model).sample(requests(4)[::-1], settings)[::-1]
    for request, *groups in zip(requests(4), together, small, backwards, strict=True):
        for place, seed in enumerate(request.seeds):
            [[alone]] = sampler(model).sample([SampleRequest(request.prompt_ids, (seed,))], settings)
            for group in groups:
                assert group[place].token_ids == alone.token_ids
                assert_close(group[place].logprobs, alone.logprobs, atol=1e-12, rtol=0)


def test_again_gives_the_same_bits(tiny_model):
    model, settings = tiny_model(), SamplingConfig(top_p=0.9, top_k=20, min_p=0.01, max_completion_length=15)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (sampler(model).sample(requests(4), settings) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == second


def test_frequencies_follow_the_exact_distribution(tiny_model):
    # after this prompt the model's next-token distribution is known exactly; 20,000 completions of one token
    model, prompt, draws = tiny_model(), [3, 4, 5], 20_000
    for keywords in ({"temperature": 0.8}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.2}):
        settings = SamplingConfig(max_completion_length=1, **keywords)
        request = SampleRequest(prompt, tuple(range(draws)))
        [group] = sampler(model, max_batch_tokens=10**9).sample([request], settings)
        counts = torch.bincount(torch.tensor([one.token_ids[0] for one in group]), minlength=29).double()
        expected = draws * distribution(model, prompt, settings)
        assert counts[expected == 0].sum() == 0
        common = expected >= 5
        statistic = ((counts - expected).square() / expected)[common].sum().item()
        freedom = int(common.sum()) - 1
        # mean + 4 deviations of chi-square; the seeds are fixed, so this holds or not, without luck
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5, keywords


def distribution(model, prompt, settings):
    """The distribution written out token by token, in plain Python."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double() / settings.temperature
    probabilities = logits.softmax(-1).tolist()
    order = sorted(range(29), key=lambda token: -probabilities[token])
    kept, mass = [], 0.0
    for rank, token in enumerate(order):
        if settings.top_k and rank >= settings.top_k:
            break
        if mass >= settings.top_p or probabilities[token] < settings.min_p * probabilities[order[0]]:
            break
        kept.append(token)
        mass += probabilities[token]
    result = torch.zeros(29, dtype=torch.float64)
    for token in kept:
        result[token] = probabilities[token] / mass
    return result


def test_a_group_computes_its_prompt_once(tiny_model):
    model, shapes = tiny_model(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    sampler(model, eos_token_ids=()).sample(requests(4), SamplingConfig(max_completion_length=3))
    # five prompts padded to eight tokens, then twenty rows token by token; the last token is not fed
    assert shapes == [(5, 8), (20, 1), (20, 1)]


def test_finished_rows_leave_the_batch(tiny_model):
    model, rows = tiny_model(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    sampled = sampler(model).sample(requests(8), SamplingConfig(max_completion_length=20))
    lengths = [len(completion.token_ids) for group in sampled for completion in group]
    for t, count in enumerate(rows[1:], start=1):
        alive = sum(length > t for length in lengths)
        assert alive <= count and count - alive < max(1, count / 8)


def test_the_budget_bounds_the_rows(tiny_model):
    model, seen = tiny_model(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    progress = []
    sampler(model, max_batch_tokens=60).sample(
        requests(3), SamplingConfig(max_completion_length=4), lambda done, total: progress.append((done, total))
    )
    # 60 // (8 + 4) = 5 rows, and a prompt of 8 has 3; 60 // (6 + 4) = 6 rows: prompts of 6 and 3; 60 // (3 + 4) = 8
    assert [shape for shape in seen if shape[1] > 1] == [(1, 8), (2, 6), (2, 3)]
    assert progress == [(3, 15), (9, 15), (15, 15)]


def test_a_request_beyond_the_budget_is_split_and_one_completion_always_runs(tiny_model):
    model, settings = tiny_model(dtype=torch.float64), SamplingConfig(max_completion_length=4)
    whole = sampler(model).sample(requests(5), settings)
    for budget in (1, 30):
        parts = sampler(model, max_batch_tokens=budget).sample(requests(5), settings)
        assert [[one.token_ids for one in group] for group in parts] == [
            [one.token_ids for one in group] for group in whole
        ]


def test_the_model_is_left_as_it_was(tiny_model):
    model = tiny_model().train()
    sampler(model).sample(requests(1), SamplingConfig(max_completion_length=2))
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()


def test_a_prompt_beyond_the_context_is_refused_by_name(tiny_model):
    long = SampleRequest([1] * 60, (1,), row_id="abc-7")
    with pytest.raises(StageError, match=r"prompt 1 \(row abc-7\) has 60 tokens; .* the 64 .* more than 59 tokens"):
        sampler(tiny_model()).sample([*requests()[:1], long], SamplingConfig(max_completion_length=5))
    with pytest.raises(StageError, match=r"lower max_completion_length$"):
        sampler(tiny_model()).sample(requests(), SamplingConfig(max_completion_length=64))
    assert sampler(tiny_model()).sample([long], SamplingConfig(max_completion_length=4))


def test_an_empty_prompt_is_refused(tiny_model):
    with pytest.raises(StageError, match="prompt 0 has no tokens"):
        sampler(tiny_model()).sample([SampleRequest([], (1,))], SamplingConfig())


def test_weights_that_are_not_numbers_are_named(tiny_model):
    model = tiny_model()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(StageError, match=r"logits for prompt \d are not numbers"):
        sampler(model).sample(requests(2), SamplingConfig(max_completion_length=4))


def test_nothing_asked_gives_nothing(tiny_model):
    assert sampler(tiny_model()).sample([], SamplingConfig()) == []
    assert sampler(tiny_model()).sample([SampleRequest([1], ())], SamplingConfig(max_completion_length=2)) == [[]]
