"""Judged completions: hand-written token lists, and who is compared with whom."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import DataError
from stages.data import RowLedger
from stages.data.unpaired import TokenizedCompletion, mismatched, tokenize_unpaired
from tests.data.characters import answers, build_tokenizer, dataset, ids, turns

TOKENIZER = build_tokenizer()


def tokenized(data, max_length=None):
    ledger = RowLedger()
    found = tokenize_unpaired(data, TOKENIZER, max_length=max_length, ledger=ledger)
    ledger.check(len(data))
    return found, ledger


def test_standard_and_conversational():
    (one,), _ = tokenized(dataset("unpaired_preference", [{"prompt": "ab", "completion": "c", "label": True}]))
    assert (one.prompt_ids, one.completion_ids, one.label) == (ids("ab"), ids("c$"), True)
    rows = [{"prompt": turns("=h", "ab"), "completion": answers("c"), "label": False}]
    (one,), _ = tokenized(dataset("unpaired_preference", rows, True))
    assert (one.prompt_ids, one.completion_ids, one.label) == (ids("=h<ab>"), ids("c$"), False)


def test_pairs_are_one_of_each():
    found, ledger = tokenized(dataset("preference", [{"prompt": "ab", "chosen": "c", "rejected": "d"}]))
    assert [(one.row_id, one.completion_ids, one.label) for one in found] == [
        ("r0/chosen", ids("c$"), True),
        ("r0/rejected", ids("d$"), False),
    ]
    assert ledger.to_json()["states"] == {"used": 1}


def test_every_way_of_losing_a_row():
    rows = [
        {"prompt": "", "completion": "b", "label": True},  # nothing before the completion
        {"prompt": "abc", "completion": "d", "label": True},  # the prompt fills max_length
        {"prompt": "a", "completion": "bcd", "label": False},  # loses d and the end
    ]
    (one,), ledger = tokenized(dataset("unpaired_preference", rows), max_length=3)
    assert (one.row_id, one.completion_ids) == ("r2", ids("bc"))
    states = ledger.to_json()["states"]
    assert states == {"filtered: empty prompt": 1, "filtered: prompt too long": 1, "truncated": 1}
    assert ledger.truncated_tokens == 2
    with pytest.raises(DataError, match="takes unpaired_preference or preference or triple_preference"):
        tokenized(dataset("prompt", [{"prompt": "a"}]))


def completions(prompts: list[int]) -> list[TokenizedCompletion]:
    return [TokenizedCompletion(f"row{i}", [prompt], [100 + i, 7, 8], True) for i, prompt in enumerate(prompts)]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_others_answer_other_prompts_whatever_the_order(prompts, random):
    rows = completions(prompts)
    others = mismatched(rows, max_length=10)
    if len(set(prompts)) == 1:
        assert others is None
        return
    assert others is not None
    for row, other in zip(rows, others, strict=True):
        assert prompts[other[0] - 100] != row.prompt_ids[0]
    shuffled = random.sample(rows, len(rows))
    assert sorted(zip([row.row_id for row in rows], others, strict=True)) == sorted(
        zip([row.row_id for row in shuffled], mismatched(shuffled, max_length=10), strict=True)
    )


def test_an_other_completion_is_cut_to_fit():
    assert mismatched(completions([1, 2]), max_length=3) == [[101, 7], [100, 7]]
