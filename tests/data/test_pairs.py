"""Pairs: hand-written token lists, and exact sharing of the prompt."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import DataError
from stages.data import RowLedger, tokenize_pairs
from tests.data.characters import answers, build_tokenizer, dataset, ids, turns

TOKENIZER = build_tokenizer()


def pairs(data, tokenizer=TOKENIZER, max_length=None):
    ledger = RowLedger()
    found = tokenize_pairs(data, tokenizer, max_length=max_length, ledger=ledger)
    ledger.check(len(data))
    return found, ledger


def test_standard_pair():
    (one,), _ = pairs(dataset("preference", [{"prompt": "ab", "chosen": "c", "rejected": "cd", "margin": 2}]))
    # the shared c belongs to the completions: the prompt alone ends before it
    assert (one.prompt_ids, one.chosen_ids, one.rejected_ids) == (ids("ab"), ids("c$"), ids("cd$"))
    assert one.margin == 2.0


def test_conversational_pair():
    rows = [{"prompt": turns("=h", "ab"), "chosen": answers("c"), "rejected": answers("d", "e", "f")}]
    (one,), _ = pairs(dataset("preference", rows, True))
    assert one.prompt_ids == ids("=h<ab>")
    assert (one.chosen_ids, one.rejected_ids, one.margin) == (ids("c$"), ids("d$<e>f$"), None)


def test_gold_completion_of_a_triple():
    rows = [{"prompt": "ab", "chosen": "c", "rejected": "d", "reference": "cdef"}]
    (one,), ledger = pairs(dataset("triple_preference", rows), max_length=5)
    assert (one.chosen_ids, one.rejected_ids, one.gold_ids) == (ids("c$"), ids("d$"), ids("cde"))
    assert ledger.truncated_tokens == 2  # f and the end
    talk = [{"prompt": turns("a"), "chosen": answers("c"), "rejected": answers("d"), "reference": answers("e")}]
    (one,), _ = pairs(dataset("triple_preference", talk, True))
    assert (one.prompt_ids, one.gold_ids) == (ids("<a>"), ids("e$"))
    (pair,), _ = pairs(dataset("preference", rows))
    assert pair.gold_ids is None


def test_every_way_of_losing_a_row():
    rows = [
        {"prompt": "ab", "chosen": "c", "rejected": "c"},  # equal
        {"prompt": "abc", "chosen": "d", "rejected": "e"},  # the prompt fills max_length
        {"prompt": "a", "chosen": "bcd", "rejected": "bce"},  # differ after the cut only: bc and bc
        {"prompt": "", "chosen": "b", "rejected": "c"},  # nothing before the completions
        {"prompt": "a", "chosen": "bcd", "rejected": "c"},  # abcd$ loses d and $
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    found, ledger = pairs(dataset("preference", rows), max_length=3)
    assert [(one.row_id, one.chosen_ids, one.rejected_ids) for one in found] == [
        ("r4", ids("bc"), ids("c$")),
        ("r5", ids("b$"), ids("c$")),
    ]
    assert ledger.to_json()["states"] == {
        "filtered: chosen equals rejected": 1,
        "filtered: prompt too long": 1,
        "filtered: chosen equals rejected after truncation": 1,
        "filtered: empty prompt": 1,
        "truncated": 1,
        "used": 1,
    }
    assert ledger.truncated_tokens == 2


def test_wrong_type_and_nothing_left():
    with pytest.raises(DataError, match="of type prompt; this stage takes preference"):
        pairs(dataset("prompt", [{"prompt": "a"}]))
    with pytest.raises(DataError, match="1 filtered: chosen equals rejected"):
        pairs(dataset("preference", [{"prompt": "a", "chosen": "b", "rejected": "b"}]))


WORDS = st.text("abcdefgh ", min_size=1, max_size=8)


@settings(max_examples=60)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=5), st.booleans())
def test_prompt_and_completion_are_exactly_the_whole(texts, conversational):
    rows = [{"prompt": "ab", "chosen": "c", "rejected": "d"}]
    rows += [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in texts]
    if conversational:
        rows = [
            {
                "prompt": turns(row["prompt"]),
                "chosen": answers(row["chosen"]),
                "rejected": answers(row["rejected"]),
            }
            for row in rows
        ]
    found, _ = pairs(dataset("preference", rows, conversational))
    for one in found:
        row = rows[int(one.row_id[1:])]
        for completion_ids, column in ((one.chosen_ids, "chosen"), (one.rejected_ids, "rejected")):
            if conversational:
                whole = TOKENIZER.apply_chat_template(row["prompt"] + row[column], return_dict=False)
            else:
                whole = TOKENIZER(row["prompt"] + row[column])["input_ids"] + ids("$")
            assert one.prompt_ids + completion_ids == whole
