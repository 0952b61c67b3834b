"""What of a model has adapters, read from a configuration or from an adapter's folder. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stages.training.adapter_settings import MOVING


@dataclass(frozen=True)
class Adapters:
    """LoRA on a model."""

    rank: int
    """The largest."""
    targets: tuple[str, ...] | None = None
    """Names of the modules that have one; None: every linear part of every layer but the head."""
    saved: tuple[str, ...] = ()
    """Names of the modules that are trained whole."""
    lengths: bool = False
    """With DoRA's lengths of all outputs."""
    ranks: tuple[tuple[str, int], ...] = ()
    """(pattern, rank), as peft's rank_pattern has them and then lora_r for the rest; none: all have the same."""
    layers: tuple[int, ...] | None = None
    """Those that have some; None: all."""

    @classmethod
    def of(cls, config: Any) -> Adapters | None:
        """By a TrainingConfig; None: it asks for none."""
        if config.lora_r is None:
            return None
        targets, ranks = config.lora_target_modules, {**config.rank_pattern, ".*": config.lora_r}
        return cls(
            max(ranks.values()),
            None if isinstance(targets, str) else tuple(targets),
            config.modules_to_save,
            config.use_dora,
            tuple(ranks.items()),
            config.layers_to_transform,
        )

    @classmethod
    def written(cls, config: Any) -> Adapters | None:
        """As `of`, of what is left of them: of twice the rank where their start is a part of the weights."""
        made = cls.of(config)
        if made is None or config.init_lora_weights not in MOVING:
            return made
        return replace(made, rank=2 * made.rank, ranks=tuple((pattern, 2 * rank) for pattern, rank in made.ranks))

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Adapters:
        """By the values of an adapter_config.json."""
        targets, saved = values.get("target_modules"), values.get("modules_to_save") or ()
        # all-linear is written as the paths of all modules
        named = tuple(path.rpartition(".")[2] for path in targets) if isinstance(targets, list) else None
        ranks, layers = (
            {**(values.get("rank_pattern") or {}), ".*": int(values["r"])},
            values.get("layers_to_transform"),
        )
        numbers = None if layers is None else tuple(layers) if isinstance(layers, list) else (layers,)
        return cls(
            max(ranks.values()), named, tuple(saved), bool(values.get("use_dora")), tuple(ranks.items()), numbers
        )

    def rank_at(self, path: str) -> int:
        """Of the module of that path, by peft's way to read patterns."""
        return next((rank for pattern, rank in self.ranks if re.match(rf"(.*\.)?({pattern})$", path)), self.rank)
