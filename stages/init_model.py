"""A small base model from nothing: a tokenizer trained on given datasets, a chat template, random weights by seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from stages.seeds import generator
from stages.stage import Config, Input, Stage
from stages.training.memory_shape import ModelShape, read_shape

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from stages.context import Context

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}"
    "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- elif message['role'] in ('system', 'user') -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- else -%}{{- raise_exception('unknown role ' + message['role']) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""One special token before a turn, an end token after the assistant's: a turn more is only ever appended."""


class InitModelConfig(Config):
    """Settings of `init_model`."""

    architecture: Literal["llama", "qwen3"] = "llama"
    """Architecture, as transformers names it."""
    tokenizer: Literal["byte_bpe", "characters"] = "byte_bpe"
    """byte_bpe: byte-level BPE, digits one by one. characters: one token a character; others become unknown."""
    vocab_size: int = Field(default=4096, ge=8)
    """Most tokens of the vocabulary, special ones included; what the texts do not fill is left out."""
    hidden_size: int = Field(default=128, ge=2)
    """Width of the model."""
    intermediate_size: int = Field(default=512, ge=1)
    """Width of the feed-forward layers."""
    num_hidden_layers: int = Field(default=4, ge=1)
    """Layers."""
    num_attention_heads: int = Field(default=4, ge=1)
    """Query heads."""
    num_key_value_heads: int | None = Field(default=None, ge=1)
    """Key and value heads; null: as many as query heads."""
    head_dim: int | None = Field(default=None, ge=2)
    """Width of a head; null: hidden_size / num_attention_heads."""
    max_position_embeddings: int = Field(default=2048, ge=1)
    """Longest sequence in tokens."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary positions; a small one tells near positions apart sooner (RoFormer, arXiv:2104.09864)."""
    tie_word_embeddings: bool = True
    """Use the embedding as the output head."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of the random weights."""
    added_tokens: tuple[str, ...] = ()
    """Texts that are one token each wherever they stand, such as the marks of a chat template's tool calls."""
    chat_template: str | None = None
    """Jinja chat template with {% generation %} markers; null: one special token a turn, an end token after the
    assistant's."""
    seed: int = 0
    """Seed of the weights."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; set head_dim"
            )
        if self.width_of_head % 2:
            raise ValueError(f"a head is {self.width_of_head} wide; rotary positions need an even number")
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.tokenizer == "byte_bpe" and self.vocab_size < 256 + 5:
            raise ValueError(f"vocab_size {self.vocab_size}: byte_bpe needs 256 bytes and 5 special tokens, 261")
        return self

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


def run(context: Context) -> None:
    """Writes the model folder: config, safetensors, tokenizer with chat template, generation config."""
    from stages.data.new_tokenizer import build_tokenizer

    config: InitModelConfig = context.config
    context.phase("training the tokenizer")
    tokenizer, unknown = build_tokenizer(config, context.inputs_of("dataset"), config.chat_template or CHAT_TEMPLATE)
    folder = context.output("model")
    context.phase("initialising the weights")
    parameters = _write_weights(config, tokenizer, folder)
    tokenizer.save_pretrained(folder)
    context.metrics.update({"parameters": parameters, "vocab_size": len(tokenizer)})
    context.counts["unknown_characters"] = unknown


def _write_weights(config: InitModelConfig, tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    """Writes config, generation config and float32 safetensors; returns the number of parameters.

    Every parameter is drawn from a counter of its own, so that its name and the seed alone decide it.
    Matrices are N(0, initializer_range^2), norms one, biases zero.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_config(_model_config(config, tokenizer), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                drawn = generator(config.seed, "init_model", name).standard_normal(parameter.shape, dtype="float32")
                parameter.copy_(torch.from_numpy(drawn) * config.initializer_range)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _model_config(config: InitModelConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        config.architecture,
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.key_value_heads,
        head_dim=config.width_of_head,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def shapes(config: InitModelConfig, _: Mapping[str, ModelShape]) -> dict[str, ModelShape]:
    """As configured; the vocabulary may come out smaller."""
    values = config.model_dump(exclude={"architecture", "num_key_value_heads", "head_dim"})
    made = {
        "model_type": config.architecture,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.width_of_head,
    }
    return {"model": read_shape({**values, **made})}


STAGE = Stage(
    name="init_model",
    version=1,
    config=InitModelConfig,
    inputs={"dataset": Input(kinds=("dataset",), many=True)},
    outputs={"model": "model"},
    run=run,
    single=True,
    summary="A small base model with random weights and a tokenizer trained on the given datasets",
    main_metric="parameters",
    shapes=shapes,
)
