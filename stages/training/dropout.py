"""A model without the noise that its configuration asks for in training: dropout, dropped layers, jitter of routers.

Stages that compare a model with itself train so: a policy with what it gave its completions when they were sampled, or
with a reference, whose difference would be noise at the first step. TRL's trainers of preferences, rewards and PPO do
the same (`disable_dropout`). Adapters' own dropout is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.nn.modules.dropout import _DropoutNd

_NOISE = re.compile("(?!summary_|classifier_).*(drop|jitter)")
"""Names of settings and attributes that are shares or sizes of noise; but of heads that are not used here."""


def without_dropout(model: Any) -> dict[str, float]:
    """Switch it off in a transformers model, for good; the settings that asked for some, with what they were.

    Modules read them when they are built, or from the configuration in every pass, so both are set.
    """
    found: dict[str, float] = {}
    for config in _configurations(model.config):
        found |= _silenced(config)
    for module in model.modules():
        _silenced(module)
        if isinstance(module, _DropoutNd):
            module.p = 0.0
    return found


def restore_settings(model: Any, folder: Path) -> None:
    """Let the configuration say of noise what the folder's says, so that who trains the model next has it."""
    from transformers import AutoConfig

    original = AutoConfig.from_pretrained(folder, local_files_only=True)
    if type(original) is not type(model.config):  # a class for text alone was all there was for a multimodal folder
        original = original.get_text_config()
    for ours, theirs in zip(_configurations(model.config), _configurations(original), strict=True):
        for name, value in _noise_of(theirs).items():
            setattr(ours, name, value)


def _configurations(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        if (nested := getattr(config, name, None)) is not None:
            yield nested


def _noise_of(holder: Any) -> dict[str, float]:
    found = {name: value for name, value in vars(holder).items() if _NOISE.match(name)}
    return {name: value for name, value in found.items() if type(value) is float and value > 0}


def _silenced(holder: Any) -> dict[str, float]:
    found = _noise_of(holder)
    if "input_jitter_noise" in vars(holder):  # PhiMoE, which chooses experts by the other one in evaluation too
        found.pop("router_jitter_noise", None)
    for name in found:
        setattr(holder, name, 0.0)
    return found
