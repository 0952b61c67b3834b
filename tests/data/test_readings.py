"""Rows as tokenizers of other manners read them: which tokens stand for the completion, and which ends it."""

from __future__ import annotations

from typing import Any

import pytest

from stages.data.readings import Reader, Reading, UnreadableError
from tests.data.two_tokenizers import BRACKETS, CHATML, byte_level, lowercasing, pieces

TALK = {
    "row_id": "r0",
    "prompt": [{"role": "user", "content": "hi"}],
    "completion": [{"role": "assistant", "content": "é ok"}],
}
PLAIN = {"row_id": "r1", "prompt": "ab", "completion": " é"}


def completion(tokenizer: Any, reading: Reading) -> tuple[list[str], str | None]:
    """(the tokens of the completion, the one that ends it)."""
    names = tokenizer.convert_ids_to_tokens(reading.token_ids)
    spans, region = reading.part
    assert reading.problem is None and len(spans) == len(names)
    inside = [place for place, span in enumerate(spans) if region.start < span.stop and span.start < region.stop]
    return [names[place] for place in inside], None if reading.end is None else names[reading.end]


@pytest.mark.parametrize(
    ("tokenizer", "tokens", "end"),
    [
        (byte_level(["o k"]), ["Ã", "©", "Ġ", "ok"], "<end>"),
        (pieces(["▁ok", "▁hi", "é"]), ["é", "▁ok"], "</s>"),
    ],
)
def test_a_conversation(tokenizer: Any, tokens: list[str], end: str) -> None:
    """In each model's own template; what it puts before the completion is none of it."""
    reader = Reader(tokenizer)
    assert completion(tokenizer, reader.given(TALK)) == (tokens, end)
    written = reader.continued(TALK, "é ok", ended=True)
    text = tokenizer.decode(written.token_ids)
    assert text.endswith("é ok" + end) and text.startswith(tokenizer.decode(reader.prompt(TALK).token_ids))
    assert completion(tokenizer, written)[1] == end
    assert completion(tokenizer, reader.continued(TALK, "é ok", ended=False))[1] is None


def test_plain_text() -> None:
    for tokenizer, tokens, end in (
        (byte_level(["b Ġ"]), ["bĠ", "Ã", "©"], "<end>"),
        (pieces(["▁ab", "▁é"]), ["▁é"], "</s>"),
    ):
        for reading in (Reader(tokenizer).given(PLAIN), Reader(tokenizer).continued(PLAIN, " é", ended=True)):
            assert completion(tokenizer, reading) == (tokens, end)


CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
CALLS = (
    "{% for m in messages %}<im>{{ m.role }}\n{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "<tool>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool>{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<im>assistant\n{% endif %}"
)


def test_tool_calls_are_read_as_the_template_shows_them() -> None:
    """With what is said before them; the token that ends the turn is none of it."""
    tokenizer = byte_level(template=CALLS)
    for content, text in (("ok", "ok<tool>"), ("", "<tool>")):
        said = {"role": "assistant", "content": content, "tool_calls": [CALL]}
        reader, row = Reader(tokenizer), {**TALK, "completion": [said]}
        assert reader.called(row) == text + 'add {"a": 1}</tool>'
        tokens, end = completion(tokenizer, reader.given(row))
        assert ("".join(tokens).replace("Ġ", " "), end) == (text + 'add {"a": 1}</tool>', "<end>")
    result = {"role": "tool", "content": "1"}
    with pytest.raises(UnreadableError, match="the completion is not one message of the assistant's"):
        Reader(tokenizer).given({**TALK, "completion": [said, result, *TALK["completion"]]})


def test_the_token_of_a_turns_end_is_the_templates() -> None:
    """Not the end of all text, where the template ends a turn by another one."""
    tokenizer = byte_level(template=CHATML.replace("<end>", "<im>"), end="<eos>")
    reader = Reader(tokenizer)
    for reading in (reader.given(TALK), reader.continued(TALK, "", ended=True)):
        assert completion(tokenizer, reading)[1] == "<im>"
    without = byte_level(template=CHATML.replace("<end>", ""), end="<eos>")
    assert completion(without, Reader(without).given(TALK))[1] is None
    assert completion(without, Reader(without).continued(TALK, "", ended=True))[1] == "<eos>"


def test_what_the_model_wrote() -> None:
    """€ is E2 82 AC: cut within it, what comes before it is text, and nothing says that the completion is over."""
    tokenizer = byte_level(["â Ĥ"])
    reader = Reader(tokenizer)
    token_ids = tokenizer("é€")["input_ids"]
    reading, text = reader.written([*token_ids, tokenizer.eos_token_id], ended=True)
    assert (text, completion(tokenizer, reading)) == ("é€", (["Ã", "©", "âĤ", "¬"], "<end>"))
    reading, text = reader.written(token_ids[:3], ended=False)
    assert (text, completion(tokenizer, reading)) == ("é", (["Ã", "©"], None))
    assert reader.written([*token_ids[:3], tokenizer.eos_token_id], ended=True)[0].end is None
    reading, text = reader.written([tokenizer.eos_token_id], ended=True)
    assert (text, completion(tokenizer, reading)) == ("", ([], "<end>"))
    beyond = [token_ids[0], len(tokenizer), *token_ids[1:]]  # of a padded head: it says nothing
    reading, text = reader.written(beyond, ended=False)
    assert (text, reading.part.spans) == ("é€", [(0, 1), (1, 1), (1, 2), (2, 4), (4, 5)])


def test_a_completion_that_begins_as_the_generation_prompt_ends() -> None:
    """Where the prompt for it ends in <think>, what the completion says of it is found all the same."""
    thinking = CHATML.replace("assistant\n", "assistant\n<think>\n")
    said = "<think>\nhm</think>é ok"
    row = {**TALK, "completion": [{"role": "assistant", "content": said}]}
    tokenizer = byte_level(template=thinking)
    assert tokenizer.apply_chat_template(TALK["prompt"], tokenize=False, add_generation_prompt=True).endswith(
        "<think>\n"
    )
    reader = Reader(tokenizer)
    tokens, end = completion(tokenizer, reader.given(row))
    assert (tokenizer.convert_tokens_to_string(tokens), end) == (said, "<end>")
    repeated = {**TALK, "prompt": [{"role": "user", "content": said}], "completion": row["completion"]}
    reading = reader.given(repeated)
    assert completion(tokenizer, reading) == (tokens, "<end>") and len(reading.token_ids) - 1 == reading.end + 1


def test_completions_that_a_template_does_not_show() -> None:
    spaced = {**TALK, "completion": [{"role": "assistant", "content": " x "}]}
    reader = Reader(pieces(["▁x"]))
    with pytest.raises(UnreadableError, match=r"the chat template does not show the completion as it is \(' x '\)"):
        reader.given(spaced)
    assert reader.given(spaced, trimmed=True).problem is None  # what the template trims is not there
    with pytest.raises(UnreadableError, match="not one message of the assistant's"):
        reader.given({**TALK, "completion": [*TALK["completion"], *TALK["prompt"], *TALK["completion"]]})


def test_a_tokenizer_that_changes_texts() -> None:
    reading = Reader(lowercasing(template=BRACKETS)).given({**PLAIN, "completion": "aB"})
    assert reading.problem == "it reads 'b' where the text goes on with 'B' (byte 3)"
    assert len(reading.part.spans) == 3


def test_only_so_many_tokens() -> None:
    reading = Reader(byte_level()).given(PLAIN)
    assert reading.first(99) is reading
    assert (len(reading.first(4).token_ids), reading.first(4).end) == (4, None)
    assert reading.first(6).end == reading.end == 5
