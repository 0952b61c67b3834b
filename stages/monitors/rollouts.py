"""Trouble of on-line learning: rewards that tell nothing apart, completions that get out of hand, stale samplers."""

from __future__ import annotations

from statistics import fmean

from stages.monitors.history import FEW, History

WITHOUT_SIGNAL = 0.9
"""Share of groups with equal rewards from which almost nothing is learnt."""
LONGER = 2.0
"""Growth of completions that is said."""
CLIPPED = 0.3
"""Share of clipped tokens at which most of what a step would learn is thrown away."""
CUT_OFF = 0.5
"""Share of completions that ended at max_completion_length."""
EQUAL = 0.5
"""Share of a group's completions that repeat another one of it."""
SHORT = 10
"""Tokens of completions that are rightly equal: there are not many ways to write a number."""
TAUGHT = "self_distillation/reprompt_sample_fraction"
"""Share of completions that have something to learn from a teacher, whatever their rewards."""
MISMATCH = 1e-4
"""Difference of sampler and trainer, in nats a token, that rounding in float32 does not reach."""


def no_signal(run: History) -> str | None:
    """Almost every group has equal rewards."""
    if len(run.values("frac_reward_zero_std")) < FEW:
        return None
    share = run.last("frac_reward_zero_std")
    if share < WITHOUT_SIGNAL or (run.values(TAUGHT) and run.last(TAUGHT) > 1 - WITHOUT_SIGNAL):
        return None
    reward = f" (mean reward {run.last('reward'):.3g})" if run.values("reward") else ""
    return (
        f"{share:.0%} of the groups of the last {FEW} steps have equal rewards{reward}, and such groups teach nothing: "
        "take prompts that are sometimes solved (curriculum, dynamic_sampling_rounds), raise num_generations or "
        "temperature, or give a reward with more than two values"
    )


def nothing_taught(run: History) -> str | None:
    """No completion has anything to learn from the model as its own teacher."""
    if len(run.values(TAUGHT)) < FEW or run.last(TAUGHT):
        return None
    found = [f"no completion of the last {FEW} steps had a teacher"]
    if run.last("self_distillation/too_long_fraction"):
        found.append("prompts of the teacher were too long: raise max_reprompt_len, or lower max_completion_length")
    if not run.last("self_distillation/success_group_fraction"):
        found.append(
            "none succeeded: lower success_reward_threshold to what the rewards can reach, take easier prompts, raise "
            "num_generations, or give feedback_column or feedback_function"
        )
    return "; ".join(found)


def constant_reward(run: History) -> str | None:
    """A reward function gives every completion the same."""
    constant = []
    for name in run.between("rewards/", "/std"):
        spreads, means = run.values(f"rewards/{name}/std")[-FEW:], run.values(f"rewards/{name}/mean")[-FEW:]
        if len(spreads) == FEW and not any(spreads) and len(set(means)) == 1:
            constant.append(f"{name} ({means[0]:.4g})")
    if not constant:
        return None
    return (
        f"the same value for every completion of the last {FEW} steps from {', '.join(constant)}: look at "
        "samples.jsonl whether it should tell these completions apart; if so mend it, else leave it out of rewards"
    )


def length_explosion(run: History) -> str | None:
    """Completions have become much longer; what the reward did meanwhile is told."""
    name = "completions/mean_length"
    if len(run.values(name)) < 2 * FEW:
        return None
    first, last = run.first(name), run.last(name)
    if last < LONGER * first:
        return None
    rewards = ""
    if len(run.values("reward")) >= 2 * FEW:
        before, now = run.first("reward"), run.last("reward")
        rewards = f", while the reward went {'up' if now > before else 'down'} from {before:.3g} to {now:.3g}"
    return (
        f"completions of {last:.4g} tokens, {first:.4g} at the start{rewards}: look at samples.jsonl whether length "
        "itself is rewarded; punish it by a reward, lower max_completion_length, raise beta, or take loss_type dr_grpo"
    )


def truncation(run: History) -> str | None:
    """Many completions end because they may not be longer."""
    if len(run.values("completions/clipped_ratio")) < FEW:
        return None
    share = run.last("completions/clipped_ratio")
    if share < CUT_OFF:
        return None
    return (
        f"{share:.0%} of the completions of the last {FEW} steps reached max_completion_length without an end token: "
        "raise it; look whether the model was taught to end (sft first); mask_truncated_completions leaves them out of "
        "the loss"
    )


def duplicates(run: History) -> str | None:
    """Long completions of a group are the same."""
    names = ("completions/duplicate_ratio", "completions/mean_length")
    if min(len(run.values(name)) for name in names) < FEW:
        return None
    share, length = (run.last(name) for name in names)
    if share < EQUAL or length < SHORT:
        return None
    return (
        f"{share:.0%} of the completions of the last {FEW} steps repeat another one of their group, word "
        "for word: little is left to explore; raise temperature, take harder prompts, or stop earlier"
    )


def clip_fraction(run: History) -> str | None:
    """Most tokens are clipped."""
    names = ("clip_ratio/low_mean", "clip_ratio/high_mean")
    if min(len(run.values(name)) for name in names) < FEW:
        return None
    low, high = (run.last(name) for name in names)
    if low + high < CLIPPED:
        return None
    return (
        f"{low + high:.0%} of the tokens of the last {FEW} steps are clipped ({low:.0%} below, {high:.0%} above): the "
        "policy moves too far from what was sampled; lower learning_rate, num_iterations or steps_per_generation, or "
        "raise epsilon and epsilon_high"
    )


def sampler_mismatch(run: History) -> str | None:
    """Sampler and trainer give the same tokens other probabilities, more and more so: stale weights."""
    differences = run.values("sampling/sampling_logp_difference/mean")
    if len(differences) < 2:
        return None
    first, last = differences[0], fmean(differences[-min(5, len(differences) - 1) :])
    if last <= max(MISMATCH, 10 * first):
        return None
    return (
        f"log-probabilities of sampler and trainer differ by {last:.3g} nats a token, {first:.3g} at the first step: "
        "the sampler has old weights or computes differently; look whether it gets the weights after every step "
        "(weight_version in the rollouts), and correct by importance_sampling_correction"
    )
