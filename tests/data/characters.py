"""Tokenizers small enough to write their token lists by hand: one token a character."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from stages.data import Dataset, required_columns

# every turn is <role marker><content>; the assistant's ends with $
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}>{% generation %}{{ m.content }}<eos>{% endgeneration %}"
    "{% elif m.role == 'user' %}<{{ m.content }}{% else %}={{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
SPECIAL = ["<unk>", "<bos>", "<eos>"]
CHARACTERS = "<>=abcdefgh "
IDS = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}


def ids(text: str) -> list[int]:
    """Token ids written by hand: ^ is <bos>, $ is <eos>, ? is <unk>, everything else is itself."""
    named = {"^": "<bos>", "$": "<eos>", "?": "<unk>"}
    return [IDS[named.get(character, character)] for character in text]


def build_tokenizer(*, start_token: bool = False, template: str | None = TEMPLATE, **tokens: str) -> Any:
    backend = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if start_token:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", IDS["<bos>"])]
        )
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>", **tokens}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


def dataset(kind: str, rows: Iterable[dict[str, Any]], conversational: bool = False) -> Dataset:
    listed = [{"row_id": f"r{index}", **row} for index, row in enumerate(rows)]
    return Dataset(kind, conversational, ("row_id", *required_columns(kind, conversational)), listed)


def turns(*texts: str) -> list[dict[str, str]]:
    """user, assistant, user, ... ; a text that begins with `=` is a system message."""
    messages = []
    for text in texts:
        if text.startswith("="):
            messages.append({"role": "system", "content": text[1:]})
            continue
        spoken = [message for message in messages if message["role"] != "system"]
        messages.append({"role": ("user", "assistant")[len(spoken) % 2], "content": text})
    return messages


def answers(*texts: str) -> list[dict[str, str]]:
    """assistant, user, assistant, ..."""
    return [{"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(texts)]
