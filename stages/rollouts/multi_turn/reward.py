"""What the environment gave, as a reward beside others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.rollouts.reward_base import BuiltIn


class EnvironmentReward(BuiltIn):
    """The sum of what the environment gave in the episode; None where it gave nothing, or broke."""

    def score(self, environment_reward: Sequence[float | None], **_: Any) -> list[float | None]:
        return list(environment_reward)

    def columns_used(self) -> frozenset[str] | None:
        """Only this one."""
        return frozenset({"environment_reward"})
