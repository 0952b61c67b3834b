"""What stages of on-line learning have in common: settings of their rollouts."""

from __future__ import annotations

from stages.stage import Config, operational


class RolloutConfig(Config):
    """What is shown of rollouts while they are made."""

    log_completions_steps: int | None = operational(None, gt=0)
    """Show a table of sample completions in the log and in Prefect every so many steps; null: ten times a run."""
