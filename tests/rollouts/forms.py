"""Tokenizers of a few tokens, and which of them keep a text on its way to a form: found by trying all texts."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS, STOP = 0, 1
"""Two tokens that end a completion; the first is the tokenizer's."""
TOKENS = ["<eos>", "<stop>", "a", "b", "c", "d", "ab", "bc", "abc", "dd"]
MERGES = [("a", "b"), ("b", "c"), ("ab", "c"), ("d", "d")]
LETTERS = "abcd"


def few_tokens() -> Any:
    """Byte-level BPE that writes four letters, in more than one way."""
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(TOKENS)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _fast(backend)


def every_byte() -> Any:
    """Byte-level BPE with all bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<eos>", "<stop>", *alphabet, "12", "tr", "true", 'ab"', "Ã©"]
    merges = [("1", "2"), ("t", "r"), ("u", "e"), ("tr", "ue"), ("a", "b"), ("ab", '"'), ("Ã", "©")]
    names += [one + other for one, other in merges if one + other not in names]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(names)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _fast(backend)


def pieces() -> Any:
    """As SentencePiece has them: spaces are part of tokens, and what is in none is written in bytes."""
    names = ["<eos>", "<stop>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", *"abcdeinrstu0123456789", "▁a", "▁b", "ab", "▁ab", "12", *'{}":,[]']
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("1", "2")]
    vocabulary = {token: index for index, token in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>"])
    return _fast(backend, unk_token="<unk>")


def _fast(backend: Tokenizer, **tokens: str) -> Any:
    backend.add_special_tokens(["<eos>", "<stop>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", **tokens)


@cache
def whole_texts(regex: str, longest: int) -> frozenset[str]:
    """All texts of the four letters that match, up to a length that holds all of them."""
    tried = ("".join(text) for length in range(longest + 1) for text in itertools.product(LETTERS, repeat=length))
    return frozenset(text for text in tried if re.fullmatch(regex, text))


@cache
def allowed(texts: frozenset[str], written: str) -> list[bool]:
    """By token: whether it keeps the text the beginning of one of these, or ends it where it is one."""
    beginnings = {text[:length] for text in texts for length in range(len(text) + 1)}
    return [written in texts] * 2 + [written + token in beginnings for token in TOKENS[2:]]


def is_balanced(text: str) -> bool:
    """A grammar's: as many a before a c as b after it."""
    count = text.index("c") if "c" in text else -1
    return text == "a" * count + "c" + "b" * count


def fits(schema: Any) -> Callable[[str], bool]:
    """Whether a text is JSON that the schema allows."""
    import jsonschema

    checker = jsonschema.Draft202012Validator(schema)

    def check(text: str) -> bool:
        return bool(checker.is_valid(json.loads(text)))

    return check
