"""Settings of adapters. Names are peft's, with `lora_` where the bare name would say too little."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from stages.sharding import Sharding, Whole
from stages.stage import Config

BITSANDBYTES = {"bitsandbytes": "'posttrain[bitsandbytes]'"}
Start = Literal["default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16"]
MOVING = ("olora", "pissa", "pissa_niter_4", "pissa_niter_16")
"""Starts that take what they put into the adapters out of the weights below."""
APART = (*MOVING, "orthogonal")
"""Starts of which neither factor is 0: in bfloat16 each is rounded, and the policy starts a little beside the model as
it came, so the reference is with these adapters as they started."""


class AdapterConfig(Config):
    """What of a model is trained where not all of it is, and from where."""

    goes_on: ClassVar[bool] = False
    """Whether the stage also trains an adapter that it is given."""

    lora_r: int | None = Field(None, gt=0)
    """Rank of LoRA adapters; null: all weights are trained."""
    lora_alpha: float = Field(32, gt=0)
    """LoRA's scale is lora_alpha / lora_r, with use_rslora lora_alpha / sqrt(lora_r)."""
    use_rslora: bool = False
    """rsLoRA (arXiv:2312.03732): a scale that keeps large ranks learning."""
    use_dora: bool = False
    """DoRA (arXiv:2402.09353): also trains the length of every output's weight vector."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the adapters, of those of the input model too. The model's own, by its configuration, is
    used by `sft` alone."""
    lora_target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get adapters; all-linear: every linear layer but the head."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole beside the adapters, such as embed_tokens and lm_head; all whose name ends so."""
    layers_to_transform: tuple[int, ...] | None = None
    """Numbers of the layers, from 0, whose modules get adapters; null: all. lora_target_modules are then of layers."""
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    """Ranks of modules in place of lora_r, by name (q_proj), by the end of a path (layers.3.self_attn.q_proj), or by a
    regular expression for such an end. Patterns that give different values fit no module together."""
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    """In the same way what stands for lora_alpha in their scales."""
    init_lora_weights: Start = "default"
    """Where adapters start: default, as in LoRA's paper, or gaussian: one factor random, the other 0; orthogonal: both
    random, with product 0; olora (arXiv:2406.01775) and pissa (arXiv:2404.02948): parts of the weight, by QR or of its
    largest singular values, which the frozen weight is then without. Of large weights pissa_niter_16 or 4 find these
    sooner, in so many iterations, and less exactly."""
    loraplus_lr_ratio: float | None = Field(None, gt=0)
    """LoRA+ (arXiv:2402.12354): learning rate of the factors B of linear layers over that of A, which is learning_rate;
    the paper has 16."""

    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Keep the frozen linear layers under the adapters in few bits (needs bitsandbytes): nf4 or fp4, 4 bits that stand
    for quantiles of a normal distribution or small floats, with a scale for 64 weights (QLoRA, arXiv:2305.14314); int8,
    with a scale for a row (arXiv:2208.07339, without its rounding of states). What is written is of the weights in full
    precision."""

    def rate_scale(self, name: str) -> float:
        """What learning_rate is multiplied by for the trained tensor of that name."""
        return self.loraplus_lr_ratio if self.loraplus_lr_ratio is not None and ".lora_B." in name else 1.0

    def packages(self) -> dict[str, dict[str, str]]:
        """Of weights of few bits."""
        return super().packages() | ({} if self.quantization is None else {"quantization": BITSANDBYTES})

    def against(self, sharding: Sharding) -> dict[str, str]:
        """Weights of few bits are not sliced."""
        found = super().against(sharding)
        if self.quantization is not None and not isinstance(sharding, Whole):
            both = f"{self.quantization} and sharding ({sharding.name})"
            found["quantization"] = f"{both} exclude each other: launch with ddp, or leave it out"
        return found

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_are_some(cls, given: dict[str, float]) -> dict[str, float]:
        for pattern, value in given.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
            if value <= 0:
                raise ValueError(f"{pattern!r} is given {value}; it is a number above 0")
        return given

    @field_validator("layers_to_transform")
    @classmethod
    def _layers_are_counted_from_0(cls, given: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if given is not None and (not given or min(given) < 0 or len(set(given)) < len(given)):
            raise ValueError(f"numbers of layers from 0, each once, found {list(given)}; null is all of them")
        return given

    @model_validator(mode="after")
    def _adapters_have_a_rank(self) -> Self:
        # which a stage may be given, and trains on
        of_input_ones = ("lora_dropout", "quantization", *(("loraplus_lr_ratio",) if self.goes_on else ()))
        own = [name for name in AdapterConfig.model_fields if name not in ("lora_r", *of_input_ones)]
        given = [
            name
            for name in own
            if getattr(self, name) != AdapterConfig.model_fields[name].get_default(call_default_factory=True)
        ]
        if given and self.lora_r is None:
            raise ValueError(f"{given[0]} is of LoRA adapters; give lora_r too")
        if self.quantization is not None and self.lora_r is None and not self.goes_on:
            raise ValueError("quantization is of the frozen weights under LoRA adapters; give lora_r too")
        return self

    @model_validator(mode="after")
    def _the_start_is_one_of_the_adapters(self) -> Self:
        start, ranks = self.init_lora_weights, (self.lora_r or 0, *self.rank_pattern.values())
        if start == "orthogonal" and (odd := [rank for rank in ranks if rank % 2]):
            raise ValueError(f"init_lora_weights is orthogonal, which takes even ranks, found {odd[0]}")
        if start == "orthogonal" and self.quantization is not None:
            raise ValueError(
                "quantization is given, but init_lora_weights is orthogonal: peft would put its factors into the few "
                "bits of the weights below; take gaussian, or leave quantization out"
            )
        if start not in MOVING:
            return self
        if self.quantization is not None:
            raise ValueError(
                f"quantization is given, but init_lora_weights is {start}: the frozen weights change at the start, and "
                "would be rounded anew; take another start, or leave quantization out"
            )
        for name, is_given in (("use_dora", self.use_dora), ("lora_dropout", self.lora_dropout > 0)):
            if is_given:
                raise ValueError(
                    f"{name} is given, but init_lora_weights is {start}: the adapters hold a part of the weights, "
                    f"which {name} would change from the start; leave one of the two out"
                )
        return self
