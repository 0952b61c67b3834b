"""Steps as hand-written token lists, and every way of losing one."""

import pytest

from artifacts.errors import DataError
from stages.data import RowLedger
from stages.data.steps import tokenize_steps
from tests.data.characters import build_tokenizer, dataset, ids


def tokenized(rows, *, separator="h", max_length=None, last=False, start_token=False):
    data, ledger = dataset("stepwise_supervision", rows), RowLedger()
    tokenizer = build_tokenizer(start_token=start_token)
    found = tokenize_steps(
        data, tokenizer, step_separator=separator, max_length=max_length, last_step_only=last, ledger=ledger
    )
    ledger.check(len(data))
    return found, ledger


ROW = {"prompt": "ab", "completions": ["cd", "e"], "labels": [True, False]}


def test_every_step_ends_with_the_separator():
    (one,), ledger = tokenized([ROW])
    assert (one.token_ids, one.ends, one.labels) == (ids("abcdheh"), [4, 6], [True, False])
    assert ledger.to_json()["states"] == {"used": 1}


def test_longer_separators_start_tokens_and_last_steps():
    (one,), _ = tokenized([ROW], separator="gh")
    assert (one.token_ids, one.ends) == (ids("abcdghegh"), [5, 8])
    (one,), _ = tokenized([ROW], start_token=True)
    assert (one.token_ids, one.ends) == (ids("^abcdheh"), [5, 7])
    (one,), _ = tokenized([ROW], last=True)
    assert (one.token_ids, one.ends, one.labels) == (ids("abcdheh"), [6], [False])


def test_a_last_step_that_is_cut_off_leaves_nothing_to_learn():
    with pytest.raises(DataError, match="none of the 1 rows is left after tokenization"):
        tokenized([ROW], max_length=6, last=True)


def test_every_way_of_losing_steps():
    rows = [ROW, {**ROW, "prompt": ""}, {**ROW, "completions": ["cdef", "g"]}]
    (one,), ledger = tokenized(rows, max_length=6)
    # abcdh is 5 tokens long, the second step would end as the 7th; abcdefh is too long at its first step
    assert (one.row_id, one.token_ids, one.ends, one.labels) == ("r0", ids("abcdh"), [4], [True])
    states = ledger.to_json()["states"]
    assert states == {"truncated": 1, "filtered: empty prompt": 1, "filtered: prompt too long": 1}
    assert ledger.truncated_tokens == 2


def test_a_separator_without_tokens():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = None
    with pytest.raises(DataError, match="step_separator '' has no tokens"):
        tokenized([ROW], separator="")
