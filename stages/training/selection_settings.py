"""Which prompts are sampled and which of their completions are trained: settings of on-line learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.stage import Config

if TYPE_CHECKING:
    from stages.training.rollout_selection import Selection

_OF_ANY = ("curriculum_floor", "pass_reward")
"""Fields of every curriculum."""


class SelectionConfig(Config):
    """By default every prompt has its turn, and every completion is trained."""

    dynamic_sampling_rounds: int = Field(0, ge=0)
    """Times a generation that groups whose rewards are all equal are replaced by groups of the next prompts (DAPO,
    arXiv:2503.14476); what is still without signal then stays. 0: never."""
    replay_buffer_size: int = Field(0, ge=0)
    """Informative groups that are kept and take the places of later groups without signal; 0: none."""
    num_trained_generations: int | None = Field(None, ge=2)
    """Train on so many completions of a group, those whose rewards vary most (PODS, arXiv:2504.13818); null: all."""
    curriculum: Literal["weighted", "filtered"] | None = None
    """A prompt's chance to be sampled at its turn, by its pass rate p when it was last sampled: 4 p (1 - p), or 1
    within pass_rate_range and curriculum_floor outside. Prompts not sampled yet are always taken."""
    curriculum_floor: float = Field(0.1, gt=0, le=1)
    """Least chance of a prompt at its turn, so that none is given up."""
    pass_rate_range: tuple[float, float] = (0.1, 0.9)
    """Pass rates that curriculum: filtered prefers, both ends included."""
    pass_reward: float = 1.0
    """Reward from which a completion counts as passed."""

    def selection(self) -> Selection:
        """What windows of rollouts need to know."""
        from stages.training.prompt_order import Curriculum
        from stages.training.rollout_selection import Selection

        low, high = self.pass_rate_range
        curricula = {
            "weighted": Curriculum.weighted(self.curriculum_floor, self.pass_reward),
            "filtered": Curriculum.filtered(self.curriculum_floor, self.pass_reward, low=low, high=high),
        }
        return Selection(
            dynamic_sampling_rounds=self.dynamic_sampling_rounds,
            replay_buffer_size=self.replay_buffer_size,
            trained=self.num_trained_generations,
            curriculum=None if self.curriculum is None else curricula[self.curriculum],
        )


def selection_problems(config: SelectionConfig, num_generations: int) -> list[str]:
    """What is wrong with the fields together."""
    problems = []
    trained = config.num_trained_generations
    if trained is not None and trained > num_generations:
        problems.append(
            f"num_trained_generations {trained} is more than num_generations {num_generations}, which it chooses from"
        )
    low, high = config.pass_rate_range
    if not 0 <= low <= high <= 1:
        problems.append(f"pass_rate_range [{low}, {high}] is no range of rates; give 0 <= low <= high <= 1")
    own = {"weighted": _OF_ANY, "filtered": (*_OF_ANY, "pass_rate_range"), None: ()}[config.curriculum]
    for name in (*_OF_ANY, "pass_rate_range"):
        if name not in own and getattr(config, name) != SelectionConfig.model_fields[name].default:
            problems.append(f"{name} would do nothing with curriculum {config.curriculum or 'null'}; leave it out")
    return problems
