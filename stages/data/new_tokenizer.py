"""A tokenizer trained on datasets: byte-level BPE, or one token a character."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.errors import DataError
from stages.data.dataset import read_dataset
from stages.data.types import Message, text_columns

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from stages.init_model import InitModelConfig

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unknown|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")


def build_tokenizer(
    config: InitModelConfig, folders: Sequence[Path], chat_template: str
) -> tuple[PreTrainedTokenizerFast, int]:
    """(tokenizer, characters of the texts that it does not know). Equal texts give an equal tokenizer.

    Raises DataError when the texts hold nothing to train on.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    characters: Counter[str] = Counter()
    for text in _texts(folders):
        characters.update(text)
    if not characters:
        raise DataError("the datasets given to init_model hold no text; wire in datasets with text or messages")
    special = [PAD, END, *ROLE_TOKENS]
    unknown = 0
    if config.tokenizer == "characters":
        special.append(UNKNOWN)
        backend, unknown = _characters(characters, special, config.vocab_size)
    else:
        backend = _byte_bpe(_texts(folders), special, config.vocab_size)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=list(ROLE_TOKENS),
        clean_up_tokenization_spaces=False,
        model_max_length=config.max_position_embeddings,
        **({"unk_token": UNKNOWN} if config.tokenizer == "characters" else {}),
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in config.added_tokens])
    tokenizer.chat_template = chat_template
    return tokenizer, unknown


def _texts(folders: Sequence[Path]) -> Iterator[str]:
    """Every text and every message's content, in order."""
    for folder in folders:
        dataset = read_dataset(folder)
        if not text_columns(dataset.type, dataset.conversational):
            raise DataError(f"a tokenizer is trained on text; a {dataset.type} dataset holds token ids")
        for row in dataset:
            for column in text_columns(dataset.type, dataset.conversational):
                if dataset.conversational:
                    yield from (text for message in row[column] for text in message_texts(message))
                else:
                    yield row[column]


def message_texts(message: Message) -> Iterator[str]:
    """What a message says, and what it calls tools with."""
    yield message.get("content") or ""
    if message.get("tool_calls"):
        yield json.dumps([call["function"] for call in message["tool_calls"]], ensure_ascii=False)


def _characters(counts: Counter[str], special: list[str], vocab_size: int) -> tuple[Tokenizer, int]:
    """The most frequent characters (of equally frequent ones, the lower code point) that find room."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    room = vocab_size - len(special)
    kept = sorted(ranked[:room])
    vocabulary = {token: index for index, token in enumerate([*special, *kept])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer, sum(counts[character] for character in ranked[room:])


def _byte_bpe(texts: Iterator[str], special: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE as GPT-2's, with single digits, so that numbers are spelled the same way everywhere."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
