"""What stands together in a batch: it changes no completion, prompts are computed once, rows leave and enter."""

import random

import pytest
import torch
from torch.testing import assert_close

from stages.losses import products
from stages.rollouts.requests import SampleRequest, SamplingConfig
from stages.rollouts.room import Room, room_for
from stages.training import linear
from tests.rollouts.sampling import flat, requests, sampler

LONG = {"max_position_embeddings": 600, "hidden_size": 32}
"""Widths that the vectors divide, as those of real models."""


def mixed_requests(longest):
    """Prompts of 1 to 300 tokens with 1 to 3 completions, of 1 token to the longest."""
    draws = random.Random(0)
    prompts = [[draws.randrange(29) for _ in range(length)] for length in (1, 2, 17, 60, 250, 300, 33)]
    limits = [(longest,), (3, 20), (1, 6, 9), (30, 2), (12,), (3, 25, 8), (5,)]
    return [
        SampleRequest(prompt, tuple(range(10 * number, 10 * number + len(most))), limits=most)
        for number, (prompt, most) in enumerate(zip(prompts, limits, strict=True))
    ]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# 200 tokens of its own are more than the kernel gets at once
@pytest.mark.parametrize(
    ("name", "count", "longest"),
    [("qwen3", 1, 30), ("qwen3", 2, 200), ("llama", 2, 30), ("gemma3", 2, 30), ("mistral", 2, 30)],
)
def test_a_completion_is_the_same_bits_in_any_batch(tiny_model, threads, name, count, longest):
    """Float32: tokens and log-probabilities, together, in small batches, in another order, and alone."""
    threads(count)
    settings = SamplingConfig(max_completion_length=longest, top_p=0.95, min_p=0.001)
    model, asked = tiny_model(name, **LONG), mixed_requests(longest)
    with sampler(model, eos_token_ids=()) as ours:
        together = ours.sample(asked, settings)
        backwards = ours.sample(asked[::-1], settings)[::-1]
        for index in (1, 3, 5):
            request, place = asked[index], len(together[index]) - 1
            alone = SampleRequest(request.prompt_ids, request.seeds[place:], limits=request.limits[place:])
            assert ours.sample([alone], settings) == [together[index][place:]]
    with sampler(model, eos_token_ids=(), max_batch_tokens=1200) as ours:
        assert ours.sample(asked, settings) == backwards == together
    assert len({tuple(one.token_ids[:3]) for one in flat(together)}) > 6


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_where_bits_may_differ_rounding_is_all_that_does(tiny_model, name):
    model, settings = tiny_model(name, torch.float64), SamplingConfig(max_completion_length=25)
    with sampler(model) as ours:
        together = ours.sample(requests(3), settings)
    with sampler(model, max_batch_tokens=140) as ours:
        small = ours.sample(requests(3), settings)
    for one, two in zip(flat(together), flat(small), strict=True):
        assert one.token_ids == two.token_ids
        assert_close(one.logprobs, two.logprobs, atol=1e-10, rtol=0)


def test_again_gives_the_same_bits(tiny_model):
    model, settings = tiny_model(), SamplingConfig(top_p=0.9, top_k=20, min_p=0.01, max_completion_length=15)
    torch.use_deterministic_algorithms(True)
    try:
        with sampler(model) as ours:
            first, second = (ours.sample(requests(4), settings) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == second


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_packed_weights_change_no_bit(tiny_model, monkeypatch, name):
    """A copy of each weight that oneDNN multiplies by, made anew in every call, for the weights may be others then."""
    calls = []
    monkeypatch.setattr(linear, "packed", lambda *given: calls.append(given) or products.packed(*given))
    model = tiny_model(name, **LONG)
    linear.install(model)
    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
    settings = SamplingConfig(max_completion_length=20)
    with sampler(model, eos_token_ids=()) as ours:
        for scale in (1.0, 1.1):
            with torch.no_grad():
                model.lm_head.weight.mul_(scale)
            plain = [ours.sample([request], settings) for request in requests(2, limits=(15, 15))]
            assert not calls
            together = ours.sample(requests(2, limits=(20, 20)), settings)
            assert len(calls) == len(layers) and layers[0].forward.packed_OI is None
            calls.clear()
            for one, two in zip(flat(flat(plain)), flat(together), strict=True):
                assert one.token_ids == two.token_ids[:15] and one.logprobs == two.logprobs[:15]


def test_no_more_is_packed_than_there_is_room_for(tiny_model, onednn):
    model = tiny_model("qwen3")
    linear.install(model)
    forwards = [layer.forward for layer in model.modules() if type(layer) is torch.nn.Linear]
    room = sum(forward.layer.weight.nbytes for forward in forwards[:3])
    with linear.packed_weights(model, rows=32, most_bytes=room):
        assert [forward.packed_OI is not None for forward in forwards] == [True] * 3 + [False] * (len(forwards) - 3)
    assert all(forward.packed_OI is None for forward in forwards)


def watched(model):
    """Shapes of the input ids of every pass, after the probe that a model's first call begins with."""
    with sampler(model) as ours:
        ours.sample(requests(1), SamplingConfig(max_completion_length=1))
    shapes = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_a_group_computes_its_prompt_once(tiny_model):
    model = tiny_model()
    shapes = watched(model)
    with sampler(model, eos_token_ids=()) as ours:
        ours.sample(requests(4), SamplingConfig(max_completion_length=3))
    # five prompts but for their last tokens, padded to 16, then twenty rows token by token
    assert shapes == [(5, 16), (20, 1), (20, 1), (20, 1)]


def test_finished_rows_leave_the_batch_at_once(tiny_model):
    model = tiny_model()
    shapes = watched(model)
    with sampler(model) as ours:
        sampled = ours.sample(requests(8), SamplingConfig(max_completion_length=20))
    lengths = [len(completion.token_ids) for group in sampled for completion in group]
    # rows are padded to four
    alive = [sum(length > t for length in lengths) for t in range(max(lengths))]
    assert [rows for rows, tokens in shapes if tokens == 1] == [-(-count // 4) * 4 for count in alive]


def test_waiting_rows_enter_as_soon_as_others_leave(tiny_model):
    """Four rows of 16 tokens and a prompt of 16 take 80 tokens; nine completions of known lengths."""
    model = tiny_model()
    shapes = watched(model)
    limits = (1, 2, 3, 4, 6, 7, 8, 2, 5)
    with sampler(model, eos_token_ids=(), max_batch_tokens=80) as ours:
        [group] = ours.sample(requests(9, [[7, 8, 9]], limits), SamplingConfig(max_completion_length=16))
    assert [len(one.token_ids) for one in group] == list(limits)
    # the first four end after steps 1, 2, 3 and 4; in their places 6 ends after 7, 7 after 9, 8 after 11, 2 after 6,
    # and in that one's place 5 after 11
    steps = [rows for rows, tokens in shapes if tokens == 1]
    assert len(steps) == 11 and max(steps) == 4
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 16)]


def test_a_prompt_is_kept_for_its_rows_that_wait(tiny_model):
    model = tiny_model()
    shapes = watched(model)
    # room for one row at a time: three completions of two prompts
    with sampler(model, eos_token_ids=(), max_batch_tokens=1) as ours:
        ours.sample(requests(3, [[7, 8, 9], [1, 2]]), SamplingConfig(max_completion_length=2))
    assert [rows for rows, tokens in shapes if tokens == 1] == [4] * 12
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 16)] * 2


def test_room_by_hand():
    # rows of 16 tokens after padding, prompts of 7 tokens kept as 16: 8 rows of 2 prompts take 8 x 16 + 2 x 16
    assert room_for(completions=8, per_prompt=4, prompt=8, completion=9, most_tokens=160) == Room(8, 16, 2, 16)
    # one token less: rows stand in fours, so 4 rows, which may be of two prompts
    assert room_for(completions=8, per_prompt=4, prompt=8, completion=9, most_tokens=159) == Room(4, 16, 2, 16)
    # a prompt of one token has no keys but those of the rows
    assert room_for(completions=3, per_prompt=1, prompt=1, completion=17, most_tokens=10**6) == Room(3, 32, 3, 0)
    # one completion always has room
    assert room_for(completions=3, per_prompt=3, prompt=40, completion=1, most_tokens=1) == Room(1, 16, 1, 48)


def test_the_budget_bounds_the_rows(tiny_model):
    model, progress = tiny_model(), []
    shapes = watched(model)
    # 3 completions of 4 tokens a prompt: 4 rows of 16 tokens and 2 prompts of 16 take 96
    with sampler(model, eos_token_ids=(), max_batch_tokens=100) as ours:
        ours.sample(
            requests(3), SamplingConfig(max_completion_length=4), lambda done, total: progress.append((done, total))
        )
    assert max(rows for rows, tokens in shapes if tokens == 1) == 4
    assert all(total == 15 for _, total in progress) and progress[-1] == (15, 15)
    assert progress == sorted(set(progress))


def test_a_request_beyond_the_budget_is_split_and_one_completion_always_runs(tiny_model):
    model, settings = tiny_model(dtype=torch.float64), SamplingConfig(max_completion_length=4)
    with sampler(model) as ours:
        whole = ours.sample(requests(5), settings)
    for budget in (1, 100):
        with sampler(model, max_batch_tokens=budget) as ours:
            parts = ours.sample(requests(5), settings)
        assert [[one.token_ids for one in group] for group in parts] == [
            [one.token_ids for one in group] for group in whole
        ]


@pytest.mark.parametrize("budget", [65_536, 100, 1])
def test_a_model_whose_attention_stays_its_own_gives_the_same(tiny_model, budget):
    from stages.rollouts.sampler import EmbeddedSampler

    settings = SamplingConfig(max_completion_length=25, temperature=0.9)
    with sampler(tiny_model("qwen3", torch.float64)) as ours:
        shared = ours.sample(requests(4), settings)
    model = tiny_model("qwen3", torch.float64)
    model._supports_attention_backend = False
    plain = EmbeddedSampler(model, eos_token_ids=(5, 12), pad_token_id=0, max_batch_tokens=budget)
    for one, two in zip(flat(shared), flat(plain.sample(requests(4), settings)), strict=True):
        assert one.token_ids == two.token_ids and one.finished == two.finished
        assert_close(one.logprobs, two.logprobs, atol=1e-10, rtol=0)
    assert plain.unshared == "attention cannot be replaced"


def test_a_window_that_the_attention_is_not_told_of_is_found(tiny_model):
    from stages.rollouts.sampling_probe import why_not_shared

    assert why_not_shared(tiny_model("mistral")) is None
    model = tiny_model("llama")
    model.config.sliding_window = 50
    assert "not told of its sliding window of 50" in why_not_shared(model)
