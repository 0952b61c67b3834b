"""Where the tokens of a text are in its bytes, by hand, and for tokenizers of every manner."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from artifacts.errors import DataError
from stages.data.token_bytes import Misread, Span, TokenBytes, same_tokens
from tests.data.characters import build_tokenizer as characters
from tests.data.two_tokenizers import byte_level, lowercasing, pieces

TEXTS = ["hello", " two  spaces ", "é€𝄞 \n\tß", "naïve Ġ <0x41>", ""]


def spans(tokenizer: Any, text: str, *, added: bool = False) -> tuple[list[Span], Misread | None]:
    token_ids = tokenizer(text, add_special_tokens=added)["input_ids"]
    return TokenBytes(tokenizer).spans(token_ids, text.encode())


def test_characters_that_are_split_over_tokens() -> None:
    """€ is E2 82 AC, written â, Ĥ and ¬; the first two are one token here."""
    found, misread = spans(byte_level(["â Ĥ"]), "a€b")
    assert (found, misread) == ([(0, 1), (1, 3), (3, 4), (4, 5)], None)


def test_pieces_with_a_space_before_the_text_and_bytes_for_what_has_no_piece() -> None:
    """▁ab stands for the first two bytes alone, and for three within the text."""
    tokenizer = pieces(["▁ab", "c"])
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc abé")["input_ids"]) == [
        *("▁ab", "c", "▁ab", "<0xC3>", "<0xA9>")
    ]
    assert spans(tokenizer, "abc abé") == ([(0, 2), (2, 3), (3, 6), (6, 7), (7, 8)], None)


def test_tokens_that_are_no_part_of_the_text() -> None:
    assert spans(characters(start_token=True), "ab", added=True) == ([(0, 0), (0, 1), (1, 2)], None)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [byte_level(["Ġ Ġ", "l l"]), pieces(["▁two", "▁", "lo"])])
def test_tokens_lie_side_by_side_from_the_beginning_to_the_end(tokenizer: Any, text: str) -> None:
    found, misread = spans(tokenizer, text)
    assert misread is None
    assert all(before.stop == after.start for before, after in pairwise(found))
    assert [found[0].start, found[-1].stop] == [0, len(text.encode())] if text else not any(b - a for a, b in found)


def test_the_text_of_tokens_is_what_the_tokenizer_decodes() -> None:
    tokenizer = byte_level(["h e", "Ġ Ġ"])
    for text in TEXTS:
        token_ids = tokenizer(text)["input_ids"]
        assert TokenBytes(tokenizer).joined(token_ids).decode() == tokenizer.decode(token_ids) == text


def test_tokens_that_a_padded_head_has_beyond_the_tokenizers_have_no_bytes() -> None:
    tokenizer = byte_level(["h e"])
    (token,) = tokenizer("he")["input_ids"]
    assert TokenBytes(tokenizer).joined([token, len(tokenizer), token, len(tokenizer) + 7]) == b"hehe"


def test_tokens_behind_ids_that_are_left_out() -> None:
    """Their ids are beyond the number of tokens; those between are of no token, and have no bytes."""
    told = json.loads(byte_level(["h e"]).backend_tokenizer.to_str())
    told["model"]["vocab"]["he"] += 90
    told["added_tokens"] = []
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(told)))
    token_ids = tokenizer("hey")["input_ids"]
    assert token_ids[0] == 346 and len(tokenizer) == 257
    known = TokenBytes(tokenizer)
    assert known.spans(token_ids, b"hey") == ([(0, 2), (2, 3)], None)
    assert known.joined([300, *token_ids, 347]) == b"hey"


def test_a_text_that_the_tokenizer_changes() -> None:
    found, misread = spans(lowercasing(), "ab Cd")
    assert found == [(0, 1), (1, 2), (2, 3)]
    assert misread == (3, "it reads 'c' where the text goes on with 'Cd' (byte 3)")
    assert spans(pieces(["▁"]), "a ▁")[1] == (3, "it reads ' ' where the text goes on with '▁' (byte 2)")


def test_tokens_that_are_no_pieces_of_a_text() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    for decoder, name in ((decoders.WordPiece(), "WordPiece"), (None, "None")):
        backend.decoder = decoder
        with pytest.raises(DataError, match=f"a decoder of type {name}, so they are no pieces of the text"):
            TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_the_same_tokens_of_two_vocabularies() -> None:
    """By bytes, not by how a tokenizer writes them: Ġ and ▁ are a space, and `a` is a piece before it is a byte."""
    first, second = byte_level(["Ġ a"]), pieces(["▁a", "é"])
    names = {
        first.convert_ids_to_tokens(own): second.convert_ids_to_tokens(other)
        for own, other in same_tokens(TokenBytes(first), TokenBytes(second), (None, None))
    }
    assert names["Ġa"] == "▁a" and names["a"] == "a" and names["Ġ"] == "▁" and names["b"] == "<0x62>"
    assert len(names) == 257  # every byte, and the one token of two; é is one piece there and none here
    assert "<end>" not in names
    ends = first.eos_token_id, second.eos_token_id
    assert ends in same_tokens(TokenBytes(first), TokenBytes(second), ends)
