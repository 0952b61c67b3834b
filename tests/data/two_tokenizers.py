"""Two tokenizers that split texts differently, small enough to do so by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<im>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<im>assistant\n{% endif %}"
)
BRACKETS = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]"
    "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)


def byte_level(
    merges: Sequence[str] = (), template: str | None = CHATML, normalizer: Any = None, end: str = "<end>"
) -> Any:
    """A token a byte, and one for each of `merges` ("a b": a and b together); Ġ is a space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokens = [*alphabet, *("".join(pair) for pair in pairs)]
    backend = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    return _fast(backend, template, eos_token=end, extra_special_tokens=["<im>"])


def lowercasing(**settings: Any) -> Any:
    """One that does not keep texts as they are."""
    return byte_level(normalizer=normalizers.Lowercase(), **settings)


def pieces(words: Sequence[str], template: str | None = BRACKETS) -> Any:
    """Pieces in SentencePiece's manner: ▁ is a space, one stands before the text, and bytes stand for what has none."""
    characters = sorted({character for word in words for character in word})
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = ["<unk>", *bytes_, *characters]
    pairs = []
    for word in words:
        for stop in range(2, len(word) + 1):
            if word[:stop] not in vocabulary:
                vocabulary.append(word[:stop])
                pairs.append((word[: stop - 1], word[stop - 1]))
    backend = Tokenizer(
        models.BPE(
            {token: place for place, token in enumerate(vocabulary)},
            pairs,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(backend, template, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def _fast(backend: Any, template: str | None, **tokens: Any) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **tokens)
    tokenizer.chat_template = template
    return tokenizer
