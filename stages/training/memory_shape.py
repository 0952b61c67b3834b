"""The sizes of a model that its memory follows from, read from its config.json. Imports nothing heavy.

Counts of parameters are exact for the families below; other architectures are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stages.names import nearest
from stages.training.memory_adapters import Adapters


class UnknownShapeError(Exception):
    """The memory of this model cannot be predicted; the message says why."""


@dataclass(frozen=True)
class Family:
    """What layers have beside the common form: pre-norm attention, gated feed-forward part, RMSNorm."""

    norms: int = 2
    """Norms of a layer."""
    normed_heads: bool = False
    """Queries and keys pass a norm of their own."""
    attention_bias: bool = False
    """Biases of queries, keys and values, whatever the config says."""
    wide_norms: bool = False
    """Norms are scaled in float32, in bfloat16 models too."""
    tied: bool = False
    """Whether embedding and head are one where the config does not say."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(attention_bias=True),
    "qwen3": Family(normed_heads=True),
    "gemma": Family(wide_norms=True, tied=True),
    "gemma2": Family(norms=4, wide_norms=True, tied=True),
    "gemma3_text": Family(norms=4, normed_heads=True, wide_norms=True, tied=True),
    "mixtral": Family(),
    "qwen3_moe": Family(normed_heads=True),
}
"""`model_type` of a config.json -> its family."""

ROUTER_AUX_LOSS_COEF = 0.001
"""Of these families with experts, where a config.json does not say."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Names of a layer's linear parts, in the order of `linear_shapes`."""
_PARENT = dict.fromkeys(LINEAR[:4], "self_attn")
"""What of a layer they are in, where it is not the feed-forward part."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer. Sizes are numbers of elements unless they say otherwise."""

    family: Family
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    """Most tokens of a row."""
    tied: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    """The attention's output projection has a bias."""
    mlp_bias: bool = False
    experts: int = 0
    """0: one feed-forward part for every token."""
    experts_per_token: int = 0
    router_aux_loss_coef: float = 0.0
    """Of the routers' loss, by the model's configuration."""
    silu: bool = True
    """The gate of the feed-forward part is a SiLU."""
    softcapped_attention: bool = False
    classifier: bool = False
    """A score of the last token in place of the head: a reward model."""
    adapters: Adapters | None = None
    """Those that come with it, and are trained on where it is trained."""

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys of a token, or of its values."""
        return self.kv_heads * self.head_dim

    @property
    def linear_shapes(self) -> list[tuple[int, int, bool]]:
        """(in, out, has a bias) of every linear part of a layer, those of one expert once."""
        biased = self.attention_bias or self.family.attention_bias
        return [
            (self.hidden, self.queries, biased),
            (self.hidden, self.keys, biased),
            (self.hidden, self.keys, biased),
            (self.queries, self.hidden, self.output_bias),
            (self.hidden, self.intermediate, self.mlp_bias),
            (self.hidden, self.intermediate, self.mlp_bias),
            (self.intermediate, self.hidden, self.mlp_bias),
        ]

    @property
    def layer_parameters(self) -> int:
        """Of one layer, with all of its experts."""
        sizes = [inside * outside + (outside if biased else 0) for inside, outside, biased in self.linear_shapes]
        attention, feed_forward = sum(sizes[:4]), sum(sizes[4:])
        if self.experts:
            feed_forward = self.experts * (feed_forward + self.hidden)  # and the router
        norms = self.family.norms * self.hidden + (2 * self.head_dim if self.family.normed_heads else 0)
        return attention + feed_forward + norms

    @property
    def embedding_parameters(self) -> int:
        """The embedding, which is the head too where they are tied."""
        return self.vocabulary * self.hidden

    @property
    def head_parameters(self) -> int:
        """What the head has of its own."""
        if self.classifier:
            return self.hidden
        return 0 if self.tied else self.embedding_parameters

    @property
    def parameters(self) -> int:
        """All of them, shared ones once."""
        return self.embedding_parameters + self.layers * self.layer_parameters + self.hidden + self.head_parameters

    @property
    def expert_parameters(self) -> int:
        """The matrices of all experts of one layer; 0 where every token takes the same way."""
        return self.experts * 3 * self.hidden * self.intermediate

    def adapter_parameters(self, adapters: Adapters) -> int:
        """Trained parameters: of the adapters, of what is trained whole, and a classifier's score, which always is.
        Not for DoRA on experts, which it does not take."""
        named = dict(zip(LINEAR, self.linear_shapes, strict=True))
        chosen = [shape for name, shape in named.items() if adapters.targets is None or name in adapters.targets]
        numbers = range(self.layers) if adapters.layers is None else adapters.layers
        outputs = len(numbers) * sum(outside for _, outside, _ in chosen) if adapters.lengths else 0
        if self.experts:  # gate and up are one matrix there, of twice the rank; the router is a linear part too
            widths = [inside + outside for inside, outside, _ in self.linear_shapes]
            both, down = self.hidden + 2 * self.intermediate, widths[-1]
            widths = [*widths[:4], self.hidden + self.experts, self.experts * (2 * both + down)]
            inside_layers = self.layers * adapters.rank * sum(widths)
        else:
            inside_layers = sum(
                adapters.rank_at(f"model.layers.{number}.{_PARENT.get(name, 'mlp')}.{name}") * (inside + outside)
                for number in numbers
                for name, (inside, outside, _) in named.items()
                if adapters.targets is None or name in adapters.targets
            )
        for name, path, lengths in (
            ("embed_tokens", "model.embed_tokens", self.hidden),
            ("lm_head", "lm_head", self.vocabulary),
        ):
            if name in (adapters.targets or ()) and adapters.layers is None:
                rank = adapters.rank_at(path)
                outputs += rank * (self.vocabulary + self.hidden) + (lengths if adapters.lengths else 0)
        whole = sum(self._whole(name, named) for name in adapters.saved)
        score = self.hidden if self.classifier else 0
        return inside_layers + outputs + whole + score

    def _whole(self, name: str, named: Mapping[str, tuple[int, int, bool]]) -> int:
        if name in ("embed_tokens", "lm_head"):
            return self.embedding_parameters
        inside, outside, biased = named.get(name, (0, self.hidden, False))  # else a norm
        return self.layers * (inside * outside + (outside if biased or not inside else 0))

    def as_classifier(self) -> ModelShape:
        """The reward model that is made of this one."""
        return replace(self, classifier=True)


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape of a model from the values of its config.json. Raises UnknownShapeError, saying why."""
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise UnknownShapeError(
            f"architecture {kind!r} is not among those whose memory is known{nearest(str(kind), FAMILIES)} "
            f"({', '.join(FAMILIES)})"
        )
    try:
        return _shape(family, config)
    except KeyError as error:
        raise UnknownShapeError(f"its config.json has no {error.args[0]!r}") from error


def _shape(family: Family, config: Mapping[str, Any]) -> ModelShape:
    heads, experts = config["num_attention_heads"], config.get("num_local_experts", config.get("num_experts")) or 0
    expert_width = config.get("moe_intermediate_size") if experts else None
    architectures = [str(name) for name in config.get("architectures") or ()]
    attention_bias = bool(config.get("attention_bias", False))
    tied = config.get("tie_word_embeddings")
    return ModelShape(
        family=family,
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=expert_width or config["intermediate_size"],
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        tied=family.tied if tied is None else bool(tied),
        attention_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        experts=experts,
        experts_per_token=config.get("num_experts_per_tok", 0) if experts else 0,
        router_aux_loss_coef=config.get("router_aux_loss_coef", ROUTER_AUX_LOSS_COEF) if experts else 0.0,
        silu=config.get("hidden_activation", config.get("hidden_act", "silu")) == "silu",
        softcapped_attention=config.get("attn_logit_softcapping") is not None,
        classifier=any(name.endswith("ForSequenceClassification") for name in architectures),
    )
