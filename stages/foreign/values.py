"""Values as other tools write them, and what to write here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

VALUES = {
    "dpo": "sigmoid",
    "cdpo": "sigmoid, with label_smoothing",
    "rso": "hinge",
    "sppo": "sppo_hard",
    "chunked_nll": "nll",
    "jsd": "divergence, with a beta between 0 and 1",
    "reverse_kl": "divergence, with beta: 1",
    "forward_kl": "divergence, with beta: 0",
    "rloo": "grpo, with advantage_estimator: rloo, importance_sampling_level: sequence_sum and kl_placement: reward",
    "cosine_with_min_lr": "cosine, with min_lr_ratio",
    "cosine_warmup_with_min_lr": "cosine, with min_lr_ratio, whose warm-up begins at zero",
    "constant_with_warmup": "constant, with warmup_steps",
    "wsd": "warmup_stable_decay",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit, which stays on the GPU",
    "paged_adamw_32bit": "adamw, which stays on the GPU",
    "all": "all-linear",
}
"""Text elsewhere -> what it is here, for every field that has it among its choices."""

_UNPAIRED = "`uses: unpaired_preference` has it, which also takes pairs"
_FOLLOWS_STEPS = (
    "the learning rate follows from the step alone, not from losses; `keep: best` and `early_stopping_patience` go by "
    "the loss of held-out rows"
)
_TRACKERS = "name those that you use; metrics.jsonl has every step in any case"

OF_FIELDS: Mapping[str, Mapping[str, str]] = {
    "scale_rewards": {"true": "write group"},
    "top_k": {"-1": "write 0", "null": "write 0"},
    "top_p": {"null": "write 1"},
    "min_p": {"null": "write 0"},
    "max_steps": {"-1": "write null, or leave it out"},
    "bf16": {'"auto"': "write true"},
    "lr_scheduler_type": {f'"{name}"': _FOLLOWS_STEPS for name in ("reduce_lr_on_plateau", "greedy")},
    "loss_type": {f'"{name}"': _UNPAIRED for name in ("kto", "kto_pair", "bco")},
    "report_to": {
        '"all"': _TRACKERS,
        '"comet_ml"': f"there is no Comet; {_TRACKERS}",
        '"swanlab"': f"there is no SwanLab; {_TRACKERS}",
    },
}
"""Field -> value elsewhere, as JSON -> what to do here."""


def foreign_value(field: str, value: Any, choices: Sequence[str]) -> str:
    """`; here it is sigmoid` or ` (write group)` where the value of the field is another tool's; else nothing."""
    if done := OF_FIELDS.get(field, {}).get(json.dumps(value)):
        return f" ({done})"
    if field == "warmup_steps" and isinstance(value, float) and 0 < value < 1:  # transformers takes a share there
        return f" (write warmup_ratio: {value:g})"
    meant = VALUES.get(value.lower(), "") if isinstance(value, str) else ""
    return f"; here it is {meant}" if meant.partition(",")[0] in choices else ""
