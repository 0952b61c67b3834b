"""How much memory a value model takes that is trained beside a policy, on the same rows and in the same steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stages.training.memory import training_step
from stages.training.memory_head import HeadUse
from stages.training.memory_phase import Phase
from stages.training.memory_request import Passes, Request
from stages.training.memory_shape import ModelShape
from stages.training.memory_training import Training, averages_beside


def beside_value_model(phases: Sequence[Phase], request: Request, shape: ModelShape, work: Passes) -> list[Phase]:
    """The phases of a policy, whose step is among them, with a value model that is there all the time.

    In a step what both keep of their forward passes is held before either goes back, and the gradients of the first
    stay until the other's are there; so the two come to no more than their sum, which is taken.
    """
    config = request.config
    training = Training(
        shape,
        request.setup,
        config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        optim=config.optim,
        pure_bf16=config.pure_bf16,
        averages=averages_beside(config, request.setup.device),
    )
    copy = training.policy_copy()
    resident = {**training.resident(), "reference": copy}
    step = training_step(training, work, HeadUse(), reference=copy)
    return [_sum(phase, step.parts if phase.name == step.name else resident) for phase in phases]


def _sum(phase: Phase, others: Mapping[str, float]) -> Phase:
    """With the parts of others, in one process; what has a place of its own has none of them."""
    if phase.room is not None:
        return phase
    both = {part: phase.parts.get(part, 0.0) + size for part, size in others.items() if part != "process"}
    return phase.with_parts(both)
