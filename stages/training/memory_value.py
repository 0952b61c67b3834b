"""How much memory a value model takes that is trained beside a policy, on the same rows and in the same steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stages.training.memory import PARTS, Passes, Phase, Request, training_step
from stages.training.memory_head import HeadUse
from stages.training.memory_shape import ModelShape
from stages.training.memory_training import Training


def beside_value_model(phases: Sequence[Phase], request: Request, shape: ModelShape, work: Passes) -> list[Phase]:
    """The phases of a policy, the last of which is its step, with a value model that is there all the time.

    In a step what both keep of their forward passes is held before either goes back, and the gradients of the first
    stay until the other's are there; so the two come to no more than their sum, which is taken.
    """
    config = request.config
    training = Training(shape, request.setup, config.bf16, gradient_checkpointing=config.gradient_checkpointing)
    state, copy = training.state(), training.policy_copy()
    resident = {"weights": state["weights"], "optimizer": state["optimizer"], "reference": copy}
    step = training_step(training, work, HeadUse(), reference=copy)
    return [*(_sum(phase, resident) for phase in phases[:-1]), _sum(phases[-1], step.parts)]


def _sum(phase: Phase, others: Mapping[str, float]) -> Phase:
    """With the parts of others, in one process."""
    both = {part: phase.parts.get(part, 0.0) + others.get(part, 0.0) for part in PARTS}
    both["process"] = phase.parts["process"]
    return Phase(phase.name, {part: size for part, size in both.items() if size})
