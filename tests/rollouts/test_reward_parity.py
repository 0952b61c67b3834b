"""Rewards that TRL has too, on any text and any tokens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as some
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from stages.rollouts.formats import ThinkFormat
from stages.rollouts.lengths import RepetitionPenalty, SoftOverlong

PIECES = some.sampled_from(["<think>", "</think>", "a", "\n", " ", "<think", "é", "\r\n", "<THINK>"])
TOKENS = some.lists(some.lists(some.integers(0, 3), max_size=30), max_size=5)


@settings(max_examples=200)
@given(some.lists(some.lists(PIECES, max_size=8).map("".join), max_size=5))
def test_think_format(texts):
    theirs = think_format_reward([[{"role": "assistant", "content": text}] for text in texts])
    assert ThinkFormat().score(completions=texts) == theirs


@settings(max_examples=100)
@given(TOKENS, some.integers(1, 5), some.floats(-3, 0))
def test_repetition_penalty(ids, size, penalty):
    theirs = get_repetition_penalty_reward(size, penalty)(completion_ids=ids)
    assert RepetitionPenalty(ngram_size=size, max_penalty=penalty).score(completion_ids=ids) == theirs


@settings(max_examples=100)
@given(TOKENS, some.integers(1, 30), some.integers(0, 30))
def test_soft_overlong(ids, longest, cache):
    cache = min(cache, longest)
    theirs = get_soft_overlong_punishment(longest, cache)(completion_ids=ids)
    assert SoftOverlong(max_completion_len=longest, soft_punish_cache=cache).score(completion_ids=ids) == theirs
