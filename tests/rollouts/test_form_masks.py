"""Masks of forms token by token: added tokens, ends and grammars within grammars; against all that can be written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from pydantic import ValidationError

from artifacts.errors import StageError
from stages.rollouts.form_masks import FormMasks, check_form, spelled_out
from stages.rollouts.requests import SampleRequest, SamplingConfig
from stages.rollouts.rows import Row
from stages.rollouts.sampler import EmbeddedSampler
from stages.rollouts.structured import Structured
from tests.rollouts.forms import EOS, STOP, TOKENS, allowed, every_byte, few_tokens, whole_texts

ROW = Row(0, 0, [1], 0, 16)
UNFORCED = '%llguidance {"no_forcing": true}'
THINKING = r"<think>[a-c]{1,3}</think>b"


def thinking() -> Any:
    """With added tokens that are not special, as Qwen's."""
    tokenizer = every_byte()
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "foobar"])
    return tokenizer


def following(form: dict[str, Any], tokenizer: Any, written: list[int]) -> set[str]:
    """The tokens that are allowed after these."""
    masks = FormMasks(Structured.model_validate(form), tokenizer, (EOS, STOP), len(tokenizer))
    masks.enter(1)
    for token in written:
        assert masks.allowed_BV([ROW])[0, token]
        masks.take([token])
    return set(tokenizer.convert_ids_to_tokens(masks.allowed_BV([ROW])[0].nonzero()[:, 0].tolist()))


def ids(tokenizer: Any, names: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(name) for name in names.split()]


FORMS = [
    {"regex": "ab"},
    {"choices": ["ab"]},
    {"grammar": 'start: "a" "b"'},
    {"grammar": '%llguidance {"allow_initial_skip": true}\nstart: "ab" // the end'},
    {"grammar": '%llguidance {"no_forcing": false}\nstart: "ab"'},
]


@pytest.mark.parametrize("form", FORMS)
def test_a_text_that_must_come_may_be_written_in_any_tokens(form: dict[str, Any]) -> None:
    assert following(form, every_byte(), []) == {"a", "ab"}


@pytest.mark.parametrize("regex", ["abc", "abcdd", "(abc|ab)dd?", "dabc"])
def test_every_way_to_write_a_forced_text(regex: str) -> None:
    """All rows of tokens that there are, by trying all texts."""
    tokenizer, texts = few_tokens(), whole_texts(regex, 5)
    masks = FormMasks(Structured(regex=regex), tokenizer, (EOS, STOP), len(TOKENS))

    def below(written: list[int]) -> Iterator[str]:
        wanted = allowed(texts, "".join(TOKENS[token] for token in written))
        masks.enter(1)
        for token in written:
            masks.take([token])
        assert masks.allowed_BV([ROW])[0].tolist() == wanted
        masks._matchers.clear()
        yield "".join(TOKENS[token] for token in written)
        for token in range(2, len(TOKENS)):
            if wanted[token]:
                yield from below([*written, token])

    assert texts <= set(below([]))


def test_added_tokens_are_no_text_of_a_form(tiny_model: Any) -> None:
    tokenizer = thinking()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=64)
    ends: dict[str, Any] = {"eos_token_ids": (EOS, STOP), "pad_token_id": EOS, "tokenizer": tokenizer}
    sample = partial(EmbeddedSampler(model, **ends).sample, [SampleRequest([5, 6], (0, 1, 2), "r")])
    forms: list[tuple[dict[str, Any], str]] = [
        ({"regex": THINKING}, THINKING),
        ({"choices": ["<tool_call>x", "<tool_call>y", "a<think>"]}, "<tool_call>[xy]|a<think>"),
        ({"grammar": 'start: <think> /[a-c]{1,3}/ </think> "b"'}, THINKING),
    ]
    for form, regex in forms:
        [group] = sample(SamplingConfig.model_validate({"max_completion_length": 24, "structured": form}))
        for one in group:
            assert one.finished and re.fullmatch(regex, tokenizer.decode(one.token_ids[:-1])), (form, one)
            added = {token for token in one.token_ids if token in ids(tokenizer, "<think> </think> <tool_call>")}
            assert bool(added) == ("grammar" in form)
    assert following({"regex": "foobar"}, tokenizer, []) == {"f", "foobar"}


def test_what_is_spelled_out_is_said() -> None:
    tokenizer = thinking()
    found: list[str] = []
    check_form(Structured(regex=r"<think>(?s:.*)<\/think>b|foobar"), tokenizer, [], found.append)
    [line] = found
    assert line.startswith("structured: </think>, <think> of the form are written in other tokens than the added ones")
    assert spelled_out(Structured.model_validate({"json_schema": {"const": "<think>"}}), tokenizer) == ["<think>"]
    assert spelled_out(Structured(choices=("a", "b<tool_call>")), tokenizer) == ["<tool_call>"]
    check_form(Structured(grammar='start: <think> "a" // "</think>"'), tokenizer, [], found.append)
    check_form(Structured(regex="(?s:.*)"), tokenizer, [], found.append)
    check_form(None, tokenizer, [], found.append)
    assert found == [line]


@pytest.mark.parametrize("regex", ["(?x)a\n b # c\n", "(?x: a\n)b", "a(?ix-s)\n", "[(](?isx:\n)"])
def test_a_verbose_expression_of_several_lines_is_refused(regex: str) -> None:
    with pytest.raises(ValidationError, match="flag x together with a line end; write the expression on one line"):
        Structured(regex=regex)


def test_line_ends_and_verbose_expressions_go_alone() -> None:
    for regex, text in [("(?x) a b", "a b"), (r"\(?x\)" "\nb", "( x ) Ċ b"), ("(?P<x>a)\n(?i-x:b)", "a Ċ B")]:
        assert "<eos>" in following({"regex": regex}, every_byte(), ids(every_byte(), text))


@pytest.mark.parametrize("grammar", ['start: "a" <eos>', 'start: "a" <[1]> "b"', 'start: "a" (<eos> | "b")'])
def test_an_end_within_a_grammar_is_refused(grammar: str) -> None:
    number = 1 if "[1]" in grammar else 0
    message = rf"has end tokens \({number}\) within a completion of prompt 0; .* leave them out of the grammar"
    with pytest.raises(StageError, match=message):
        following({"grammar": grammar}, every_byte(), ids(every_byte(), "a"))
    assert "b" in following({"grammar": 'start: "a" <[^0-1]>'}, every_byte(), ids(every_byte(), "a"))


@pytest.mark.parametrize(
    ("grammar", "word"),
    [
        ('start: "a" <eos>', "<eos>"),
        ('start: "a" <[0-1]>? "b"', "<[0-1]>"),
        ('start: "a" <[*]>', "<[*]>"),
        ('start: "a" <[^1,5-7]>', "<[^1,5-7]>"),
        ("start: %lark {\n start: <[9,0]>\n}", "<[9,0]>"),
    ],
)
def test_an_end_in_a_grammar_is_refused_before_any_engine_samples(grammar: str, word: str) -> None:
    """vLLM would stop there, and its answer say that it ended as it should."""
    message = rf"the grammar's {re.escape(word)} allows the end token <eos> \(0\) within a completion"
    with pytest.raises(StageError, match=message):
        check_form(Structured(grammar=grammar), every_byte(), [0], print)
    check_form(Structured(grammar='start: "<eos>" <[^0-1]> <[2-9]> <stop> // <eos>'), every_byte(), [0], print)


def test_an_end_that_may_follow_anyway() -> None:
    assert following({"grammar": 'start: "a" <eos>?'}, every_byte(), ids(every_byte(), "a")) == {"<eos>", "<stop>"}


WRAPPED = [
    (
        'start: x "b"\nx: %lark {\n  start: y{1,2} "}"\n  y: %json {"const": 1}\n}\n',
        'whole_form: x "b"\nx: %lark {\n  start: y{1,2} "}"\n  y: %json {"const": 1}\n}\n',
    ),
    ('start: whole_form\nwhole_form: "a" start?', 'whole_form_: whole_form\nwhole_form: "a" whole_form_?'),
    ("start: <start> /a\nstart/ start?", "whole_form: <start> /a\nstart/ whole_form?"),
]


@pytest.mark.parametrize(("grammar", "renamed"), WRAPPED)
def test_grammars_that_have_the_names_themselves(grammar: str, renamed: str) -> None:
    """They are read where recipes are, as vLLM is given them too."""
    name = renamed.partition(":")[0]
    ours = Structured(grammar=grammar).lark_with_ends([3])
    assert ours == f"start: {name} (<[3]>)?\n{renamed}\n{UNFORCED}\n"


def test_a_grammar_is_refused_for_what_vllm_would_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.rollouts.structured._renamed", lambda lark, name: lark)
    with pytest.raises(ValidationError, match=r"with a rule around `start`, as vLLM is given it: .*duplicate rule"):
        Structured(grammar='start: "a"')
