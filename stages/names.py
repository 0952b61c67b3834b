"""Names: the nearest valid one to a misspelt one, and what other tools call our stages (`foreign.py`: our fields)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST_NAME = 200
"""Characters of a text that may be a misspelt name; comparing longer ones takes long."""


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that the name is most likely a slip of; None: it is like none of them."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6) if len(name) <= LONGEST_NAME else []
    return close[0] if close else None


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest valid name, or an empty string."""
    close = closest(name, valid)
    return "" if close is None else f"; did you mean {close!r}?"


FOREIGN_STAGES = {
    # what people call it: how a stage of ours does it
    "dpo": "`uses: preference` with `loss_type: sigmoid`",
    "ipo": "`uses: preference` with `loss_type: ipo`",
    "cpo": "`uses: preference` with `loss_type: cpo`",
    "orpo": "`uses: preference` with `loss_type: orpo`",
    "simpo": "`uses: preference` with `loss_type: simpo`",
    "tpo": "`uses: preference` with `loss_type: tpo`",
    "kto": "`uses: unpaired_preference` with `loss_type: kto`",
    "bco": "`uses: unpaired_preference` with `loss_type: bco`",
    "grpo": "`uses: rl` with `loss_type: grpo`",
    "dapo": "`uses: rl` with `loss_type: dapo`",
    "gspo": "`uses: rl` with `loss_type: gspo`",
    **{name: f"`uses: rl` with `loss_type: {name}`" for name in ("bnpo", "dr_grpo", "luspo", "gspo_token", "cispo")},
    **{name: f"`uses: rl` with `loss_type: {name}`" for name in ("sapo", "vespo", "gmpo")},
    "rloo": "`uses: rl` with `advantage_estimator: rloo`",
    "reinforce": "`uses: rl` with `advantage_estimator: rloo`",
    "reinforce++": "`uses: rl` with `advantage_estimator: reinforce_plus_plus_baseline`",
    "reinforce_plus_plus": "`uses: rl` with `advantage_estimator: reinforce_plus_plus_baseline`",
    "xpo": "`uses: online_dpo` with `xpo_alpha`",
    "gkd": "`uses: distill`",
    "distillation": "`uses: distill`",
    "reward": "`uses: reward_model`",
    "rm": "`uses: reward_model`",
    "prm": "`uses: process_reward_model`",
    "pt": "`uses: sft`",
    "pretrain": "`uses: sft`",
    "finetune": "`uses: sft`",
    "eval": "`uses: evaluate`",
    "generate": "`uses: sample`",
    "merge": "`uses: merge_adapter`, or `uses: average` for several models",
    "dataset": "`uses: normalize`",
}
"""Names of algorithms and steps elsewhere that are settings or stages of another name here."""


_USES = re.compile(r"`uses: (\w+)`")


def stage_hint(name: str, stages: Iterable[str]) -> str:
    """`; here it is ...` for what others call a stage (`grpo`, `PPOTrainer`), or the nearest of ours."""
    known = list(stages)
    plain = name.lower().removesuffix("trainer").rstrip("_-")
    same = f"`uses: {plain}`" if plain in known else None
    elsewhere = FOREIGN_STAGES.get(plain, same)
    return f"; here it is {elsewhere}" if elsewhere else nearest(name, known)


def meant_stage(name: str, stages: Iterable[str]) -> str | None:
    """The stage that `stage_hint` names first; None: it names none."""
    known = list(stages)
    named = _USES.search(stage_hint(name, known))
    return named[1] if named else closest(name, known)
