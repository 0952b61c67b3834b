"""A model that learns to chat: its chat template, the tokens that this needs, and the token that ends a turn.

Base models come without a template, or with an end token that ends documents. What comes out of here is trained,
sampled from and evaluated as any other model: files and embeddings agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from stages.stage import Config as StageConfig
from stages.stage import DataRef, Input, Stage
from stages.training.memory_shape import ModelShape

if TYPE_CHECKING:
    from stages.context import Context

END_OF_TURN = "<|im_end|>"
CHATML = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ('system', 'user', 'assistant') -%}"
    "{{- raise_exception('unknown role ' + message['role']) -}}{%- endif -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""ChatML, with markers of what the assistant says."""
CHATML_TOKENS = ("<|im_start|>", END_OF_TURN)


class Config(StageConfig):
    """Settings of `set_chat_template`."""

    chat_template: DataRef | None = None
    """A file with a Jinja chat template; null: that of input `like`, or without that input ChatML."""
    added_tokens: tuple[str, ...] = ()
    """Texts that are one token each, besides those of ChatML or `like`: such as the marks of the file's template."""
    eos_token: str | None = None
    """The token that ends a turn; null: that of `like`, `<|im_end|>` with ChatML, or else the one that there is."""
    pad_to_multiple_of: int = Field(64, ge=1)
    """Where the embedding grows, up to a multiple of this, which GPUs are faster with."""


def run(context: Context) -> None:
    """Input `model` with another template, tokenizer, end token, and rows of embedding and head for new tokens."""
    from stages.speaking import set_chat_template

    set_chat_template(context)


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration."""
    if config.chat_template is not None and "like" in wired:
        return ["chat_template is given, and input like is wired in; the template comes from one of them"]
    return []


def shapes(_: Config, models: Mapping[str, ModelShape]) -> dict[str, ModelShape]:
    """Some tokens more or less make no difference."""
    return {"model": models["model"]}


STAGE = Stage(
    name="set_chat_template",
    version=2,
    config=Config,
    inputs={"model": Input(("model",)), "like": Input(("model",), required=False)},
    outputs={"model": "model"},
    run=run,
    single=True,
    summary="a chat template, its tokens and its end token for a base model",
    main_metric="added_tokens",
    check=check,
    shapes=shapes,
)
