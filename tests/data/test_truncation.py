"""Rows of more tokens than fit, in every mode: what is left by hand, and a ledger whose rows and tokens both add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import DataError
from stages.data import Dataset, RowLedger, tokenize_pairs, tokenize_prompts, tokenize_sequences
from stages.data.steps import tokenize_steps
from stages.data.unpaired import tokenize_unpaired
from stages.sft import STAGE, Config
from tests.data.characters import build_tokenizer, dataset, ids
from tests.stages.small_models import run_stage, save_dataset, save_model

TOKENIZER = build_tokenizer()
MODES = ("keep_start", "keep_end", "drop")

TEXTS = [
    {"prompt": "ab", "completion": "cd"},  # 5 tokens, 3 of them trained
    {"prompt": "abcd", "completion": "e"},  # 6 and 2
    {"prompt": "a", "completion": "b"},  # 3 and 2
]
PAIRS = [
    {"prompt": "abcd", "chosen": "e", "rejected": "fg"},  # 4 + 2 + 3
    {"prompt": "a", "chosen": "bcdefg", "rejected": "b"},  # 1 + 7 + 2
    {"prompt": "a", "chosen": "b", "rejected": "c"},  # 1 + 2 + 2
]


def sequences(mode: Any, max_length: int = 4) -> tuple[list[Any], dict[str, Any]]:
    ledger = RowLedger()
    data = dataset("prompt_completion", TEXTS)
    found = tokenize_sequences(data, TOKENIZER, max_length=max_length, ledger=ledger, truncation_mode=mode)
    ledger.check(len(TEXTS))
    signs = ["".join("x" if own else "." for own in one.loss_mask) for one in found]
    return list(zip((one.token_ids for one in found), signs, strict=True)), ledger.to_json()


def test_the_start_of_a_row() -> None:
    found, ledger = sequences("keep_start")
    assert found == [(ids("abcd"), "..xx"), (ids("ab$"), ".xx")]
    assert ledger["states"] == {"masked": 1, "truncated": 1, "used": 1}
    # abcd of abcd$, ab$; the $ cut off; abcde$ without a trained token
    assert ledger["tokens"] == {"rows": 3, "input": 14, "states": {"used": 7, "truncated": 1, "masked": 6}}
    assert ledger["truncated_tokens"] == 1


def test_the_end_of_a_row() -> None:
    found, ledger = sequences("keep_end")
    assert found == [(ids("bcd$"), ".xxx"), (ids("cde$"), "..xx"), (ids("ab$"), ".xx")]
    assert ledger["states"] == {"truncated": 2, "used": 1}
    assert ledger["tokens"] == {"rows": 3, "input": 14, "states": {"used": 11, "truncated": 3}}
    found, ledger = sequences("keep_end", 2)
    # d of cd$, the e, the b: with nothing before it, a first token is not trained
    assert found == [(ids("d$"), ".x"), (ids("e$"), ".x"), (ids("b$"), ".x")]


def test_dropped_rows_keep_their_tokens_in_the_ledger() -> None:
    found, ledger = sequences("drop")
    assert found == [(ids("ab$"), ".xx")]
    assert ledger["states"] == {"filtered: longer than max_length": 2, "used": 1}
    assert ledger["tokens"] == {"rows": 3, "input": 14, "states": {"used": 3, "filtered: longer than max_length": 11}}
    assert ledger["examples"]["filtered: longer than max_length"][0] == {
        "row": "r0",
        "detail": "5 tokens, max_length is 4",
    }


def test_an_error_names_the_row_and_what_to_do() -> None:
    with pytest.raises(DataError, match=r"row r0: 5 tokens, and at most 4 fit; raise max_length .* truncation_mode to"):
        sequences("error")
    assert len(sequences("error", 6)[0]) == 3


def pairs(mode: Any, max_length: int = 5) -> tuple[list[Any], dict[str, Any]]:
    ledger = RowLedger()
    found = tokenize_pairs(
        dataset("preference", PAIRS), TOKENIZER, max_length=max_length, ledger=ledger, truncation_mode=mode
    )
    ledger.check(len(PAIRS))
    return [(one.prompt_ids, one.chosen_ids, one.rejected_ids) for one in found], ledger.to_json()


def test_both_completions_of_a_pair_answer_the_same_prompt() -> None:
    last = (ids("a"), ids("b$"), ids("c$"))
    found, ledger = pairs("keep_start")
    assert found == [(ids("abcd"), ids("e"), ids("f")), (ids("a"), ids("bcde"), ids("b$")), last]
    # e$ and fg$ lose 3, bcdefg$ 3
    assert ledger["tokens"] == {"rows": 3, "input": 24, "states": {"used": 18, "truncated": 6}}
    found, ledger = pairs("keep_end")
    # fg$ leaves room for cd; bcdefg$ for nothing
    assert found == [(ids("cd"), ids("e$"), ids("fg$")), last]
    assert ledger["states"] == {"filtered: completion too long": 1, "truncated": 1, "used": 1}
    assert ledger["tokens"]["states"] == {"used": 12, "truncated": 2, "filtered: completion too long": 10}
    found, ledger = pairs("drop")
    assert found == [last]
    assert ledger["tokens"]["states"] == {"used": 5, "filtered: longer than max_length": 19}
    with pytest.raises(DataError, match="row r0: 7 tokens, and at most 5 fit"):
        pairs("error")


def test_judged_completions() -> None:
    rows = [{**row, "label": True} for row in TEXTS]
    ledger = RowLedger()
    found = tokenize_unpaired(
        dataset("unpaired_preference", rows), TOKENIZER, max_length=3, ledger=ledger, truncation_mode="keep_end"
    )
    assert [(one.prompt_ids, one.completion_ids) for one in found] == [(ids("d"), ids("e$")), (ids("a"), ids("b$"))]
    assert ledger.to_json()["tokens"] == {
        "rows": 3,
        "input": 14,
        "states": {"filtered: completion too long": 5, "truncated": 3, "used": 6},
    }


def test_settings_that_would_not_be_used() -> None:
    assert STAGE.check is not None
    for strategy in ("bfd_split", "wrapped"):
        config = Config.model_validate({"packing": True, "packing_strategy": strategy, "truncation_mode": "drop"})
        assert STAGE.check(config, frozenset())[0].startswith("truncation_mode is given, but packing_strategy")
    assert STAGE.check(Config(packing=True, truncation_mode="drop"), frozenset()) == []


WORDS = st.text("abcdefgh", min_size=1, max_size=7)


@settings(max_examples=150)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=6), st.sampled_from(MODES), st.integers(2, 9))
def test_rows_and_tokens_add_up_whatever_the_rows(texts: list[Any], mode: Any, max_length: int) -> None:
    """The input's tokens counted without a limit; those of `used` are those that are left."""
    kept: list[dict[str, Any]] = [{"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b", "label": True}]
    rows = kept + [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "completion": chosen, "label": False}
        for prompt, chosen, rejected in texts
    ]
    lengths = [(len(row["prompt"]), len(row["chosen"]) + 1, len(row["rejected"]) + 1) for row in rows]

    def check(ledger: RowLedger, total: int, left: int) -> None:
        ledger.check(len(rows))
        told = ledger.to_json()["tokens"]
        assert (told["rows"], told["input"], sum(told["states"].values())) == (len(rows), total, total)
        assert told["states"]["used"] == left
        assert told["states"].get("truncated", 0) == ledger.truncated_tokens

    settings_ = {"max_length": max(max_length, 3), "truncation_mode": mode}
    ledger = RowLedger()
    data: Dataset = dataset("prompt_completion", rows)
    found = tokenize_sequences(data, TOKENIZER, ledger=ledger, **settings_)
    check(ledger, sum(one + two for one, two, _ in lengths), sum(len(one.token_ids) for one in found))
    ledger = RowLedger()
    judged = tokenize_unpaired(dataset("unpaired_preference", rows), TOKENIZER, ledger=ledger, **settings_)
    left = sum(len(one.prompt_ids) + len(one.completion_ids) for one in judged)
    check(ledger, sum(one + two for one, two, _ in lengths), left)
    ledger = RowLedger()
    found_pairs = tokenize_pairs(dataset("preference", rows), TOKENIZER, ledger=ledger, **settings_)
    left = sum(len(one.prompt_ids) + len(one.chosen_ids) + len(one.rejected_ids) for one in found_pairs)
    check(ledger, sum(map(sum, lengths)), left)
    ledger = RowLedger()
    prompts = tokenize_prompts(data, TOKENIZER, max_length=3, ledger=ledger)
    check(ledger, sum(one for one, _, _ in lengths), sum(len(one.prompt_ids) for one in prompts))


def test_steps_are_counted() -> None:
    rows = [
        {"prompt": "ab", "completions": ["c", "de"], "labels": [True, False]},  # ab ch deh
        {"prompt": "abcdef", "completions": ["g"], "labels": [True]},
    ]
    ledger = RowLedger()
    tokenize_steps(
        dataset("stepwise_supervision", rows),
        TOKENIZER,
        step_separator="h",
        max_length=5,
        last_step_only=False,
        ledger=ledger,
    )
    assert ledger.to_json()["tokens"] == {
        "rows": 2,
        "input": 15,
        "states": {"used": 4, "truncated": 3, "filtered: prompt too long": 8},
    }


@pytest.mark.parametrize(
    ("stage", "fields", "said"),
    [
        # 65 of the prompt, and the model takes 64
        (
            "sft",
            {"max_length": 512},
            r"\(1 masked\); the model's context of 64 tokens is the limit \(max_length is 512\): take a model with a",
        ),
        ("sft", {"max_length": 63}, r"\(1 masked\); raise max_length, or look at the rows"),
        ("reference_logprobs", {"max_length": 64}, r"the model's context of 64 tokens is the limit"),
        (
            "sample",
            {"max_completion_length": 60},
            r"prompt too long\); the model's context of 64 tokens is the limit, and leaves 4 to a prompt: lower "
            "max_completion_length, or look at the rows",
        ),
        ("sample", {"max_completion_length": 20, "max_length": 43}, r"prompt too long\); raise max_length, or"),
    ],
)
def test_the_limit_that_binds_is_named(tmp_path: Path, stage: str, fields: dict[str, Any], said: str) -> None:
    save_model(tmp_path / "model", seed=1)
    data = save_dataset(tmp_path / "rows", "prompt_completion", [{"prompt": "a" * 65, "completion": "b"}])
    with pytest.raises(DataError, match=said):
        run_stage(stage, tmp_path / "run", {"model": tmp_path / "model", "dataset": data}, **fields)
