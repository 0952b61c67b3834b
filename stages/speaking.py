"""What `set_chat_template` does: tokenizer, configuration and weights of a model that is to follow a chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from artifacts.errors import DataError, StageError
from stages.context import Context
from stages.data.chat import Encoder
from stages.disk import require_disk
from stages.set_chat_template import CHATML, CHATML_TOKENS, END_OF_TURN, Config
from stages.training.export import copy_settings, forget_paths
from stages.training.model import load_causal_lm, load_tokenizer

_QUESTION, _ANSWER = "what is asked", "what is answered"


@dataclass(frozen=True)
class Speech:
    """What a tokenizer is given."""

    template: str
    tokens: tuple[str, ...]
    """Added where the tokenizer does not have them."""
    end: str | None
    """None: the end token stays."""


def set_chat_template(context: Context) -> None:
    """Writes output `model`. Raises StageError for a template that does not show what is said, or an end token that is
    none."""
    config: Config = context.config
    folder, target = context.input("model"), context.output("model")
    tokenizer, speech = load_tokenizer(folder), _speech(context, config)
    added = _teach(tokenizer, speech)
    _require_heard(tokenizer, speech)
    tokenizer.save_pretrained(target)
    _require_same_ids(tokenizer, load_tokenizer(target))
    context.phase("loading the model")
    model = load_causal_lm(folder)
    _make_room(model, tokenizer, added, config.pad_to_multiple_of)
    _end_turns(model, tokenizer)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    require_disk(target, int(size * 1.05) + 1_000_000, "the model")
    model.save_pretrained(target)
    forget_paths(target / "config.json")
    copy_settings(folder, target, leave=("generation_config.json", *_TOKENIZER_FILES))
    tokenizer.save_pretrained(target)  # in the place of what was copied
    context.metrics["added_tokens"] = len(added)


_TOKENIZER_FILES = ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "tokenizer_config.json")
"""Written anew, or left out on purpose."""


def _speech(context: Context, config: Config) -> Speech:
    if context.has("like"):
        like = load_tokenizer(context.input("like"))
        if not like.chat_template:
            raise StageError("input like has no chat template to take over")
        tokens = tuple(str(token.content) for token in like.added_tokens_decoder.values())
        return Speech(like.get_chat_template(), (*tokens, *config.added_tokens), config.eos_token or like.eos_token)
    if config.chat_template is not None:
        return Speech(_read(config.chat_template), config.added_tokens, config.eos_token)
    return Speech(CHATML, (*CHATML_TOKENS, *config.added_tokens), config.eos_token or END_OF_TURN)


def _read(path: str) -> str:
    import fsspec

    with fsspec.open(path, "r", encoding="utf-8") as file:
        text: str = file.read()
    return text


def _teach(tokenizer: Any, speech: Speech) -> list[int]:
    """The ids of the tokens that were added."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    new = [text for text in dict.fromkeys(speech.tokens) if text not in known]
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in new])
    taken = {token: text for text, token in known.items()}
    for text in new:
        if (token := tokenizer.convert_tokens_to_ids(text)) in taken:
            raise StageError(
                f"the model's tokenizer has ids that are no token's, and counts wrongly where new ones begin: {text!r} "
                f"would have id {token}, as {taken[token]!r}; name tokens that it has already, or take another model"
            )
    if speech.end is not None:
        if speech.end not in tokenizer.get_vocab():
            raise StageError(
                f"eos_token {speech.end!r} is no token of the model's tokenizer; name it in added_tokens too, or take "
                "one that there is"
            )
        tokenizer.eos_token = speech.end
    tokenizer.chat_template = speech.template
    return sorted(tokenizer.convert_tokens_to_ids(text) for text in new)


def _require_heard(tokenizer: Any, speech: Speech) -> None:
    """The template shows both sides of a conversation, and the end of a turn."""
    talk = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text, said = Encoder(tokenizer).rendered(talk, "an example")
    except DataError as error:
        raise StageError(f"the chat template cannot be used: {error}") from error
    for shown in (_QUESTION, _ANSWER):
        if shown not in text:
            raise StageError(f"the chat template does not show {shown!r} of an example; it makes {text!r} of it")
    if speech.end is not None and speech.end not in (text if said is None else said):
        raise StageError(
            f"the chat template does not end what the assistant says with eos_token {speech.end!r}, so a model would "
            f"not learn to stop; it makes {text!r} of an example"
        )


def _require_same_ids(tokenizer: Any, written: Any) -> None:
    """A tokenizer with ids that are no token's may number what was added anew when it is read."""
    before, after = tokenizer.get_vocab(), written.get_vocab()
    for text in sorted(before, key=before.__getitem__):
        if before[text] != after.get(text):
            raise StageError(
                f"the model's tokenizer has ids that are no token's: from its files it gives {text!r} id "
                f"{after.get(text)}, where it had {before[text]} before it was written; take another model"
            )


def _make_room(model: Any, tokenizer: Any, added: list[int], multiple: int) -> None:
    """Rows of the embedding and of the head for the tokens that were added: the mean of the rows that there were."""
    import torch

    before, ids = model.get_input_embeddings().weight.shape[0], set(tokenizer.get_vocab().values())
    known = min(before, min(added, default=before))
    if max(ids) >= before:  # not by their number: between ids there may be some that are no token's
        model.resize_token_embeddings(1 + max(ids), pad_to_multiple_of=multiple, mean_resizing=False)
    there = ids - set(added)
    free = [row for row in range(known, model.get_input_embeddings().weight.shape[0]) if row not in there]
    head = model.get_output_embeddings()
    tensors = {id(one): one for one in (model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None))}
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor is not None:
                tensor[free] = tensor[:known].mean(dim=0)


def _end_turns(model: Any, tokenizer: Any) -> None:
    """A completion ends with the end of a turn, and where the model ended documents before."""
    before = model.generation_config.eos_token_id
    ends = [*(before if isinstance(before, list) else [before]), tokenizer.eos_token_id]
    model.generation_config.eos_token_id = list(dict.fromkeys(token for token in ends[::-1] if token is not None))
    model.config.eos_token_id = tokenizer.eos_token_id
