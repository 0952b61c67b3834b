"""Settings of the correction for samplers that are not quite the policy that is trained. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.losses.policy_correction import MODES, Correction
from stages.stage import Config

if TYPE_CHECKING:
    ModeName = str
else:  # the table of modes is what may be chosen
    ModeName = Literal[tuple(MODES)]


class CorrectionConfig(Config):
    """How completions count that the trainer finds more or less likely than the sampler did."""

    importance_sampling_mode: ModeName | None = None
    """Multiply the loss by how much likelier the trainer finds what was sampled than the sampler did: by token, by
    sequence, or by its geometric mean; truncated at the bounds below, or 0 beyond them (mask). null: no correction."""
    importance_sampling_clip_max: float | None = Field(3.0, gt=1)
    """Upper bound of that ratio; null: none."""
    importance_sampling_clip_min: float | None = Field(None, gt=0, lt=1)
    """Lower bound of that ratio; null: none."""

    @property
    def correction(self) -> Correction | None:
        """The chosen one."""
        mode = self.importance_sampling_mode
        bounds = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        return None if mode is None else Correction(MODES[mode], *bounds)


def correction_problems(config: CorrectionConfig) -> list[str]:
    """What is wrong with the fields together."""
    mode, fields = config.importance_sampling_mode, CorrectionConfig.model_fields
    if mode is None:
        bounds = ("importance_sampling_clip_max", "importance_sampling_clip_min")
        unused = sorted(name for name in bounds if getattr(config, name) != fields[name].default)
        return [f"{name} is given, but importance_sampling_mode is null, so it would not be used" for name in unused]
    if config.importance_sampling_clip_max is None and config.importance_sampling_clip_min is None:
        return [f"importance_sampling_mode {mode} has no bounds; give importance_sampling_clip_max or _min"]
    return []
