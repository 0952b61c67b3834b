"""How much memory stages of on-line learning need: they sample, have what was sampled scored, and take steps on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.rollouts.engine_settings import OverlappedEngineConfig
from stages.training.memory import scoring, training_step
from stages.training.memory_engine import beside, rollout_engine, sampling_apart
from stages.training.memory_head import HeadUse
from stages.training.memory_phase import Phase
from stages.training.memory_request import Passes, Request
from stages.training.memory_sampling import Sampled, sampling_at_most
from stages.training.memory_shape import ModelShape


def longest_prompt(request: Request) -> int:
    """Most tokens of a prompt: max_length, where the model has room for a completion after it."""
    completion: int = request.config.max_completion_length
    return max(1, min(request.longest, request.model.context - completion))


def online_phases(
    request: Request,
    *,
    reference: ModelShape | None,
    asked: Sampled,
    scored: Sequence[tuple[ModelShape | None, Passes]],
    work: Passes,
    use: HeadUse,
    teacher: float = 0.0,
) -> list[Phase]:
    """Sampling what is `asked`, a pass of each model that scores, and a step; input reward_model, the `reference` and a
    `teacher` of so many bytes stay all the time. None among `scored`: there is no such model."""
    setup, training = request.setup, request.training
    judge = request.models.get("reward_model")
    apart = [judge] if request.reference_is_policy else [reference, judge]
    others = training.policy_copy() + request.frozen(*apart) + teacher
    others += request.kept_adapters if reference is not None else 0
    resident = {**training.resident(), "reference": others}
    engine = rollout_engine(request, asked, sent=sent_bytes(request))
    phases = [
        sampling_at_most(request, asked, number=training.weight, resident=resident)
        if engine is None
        else sampling_apart(engine, setup, resident),
        *(
            scoring(shape, setup, passes, resident=resident, own=None, bf16=training.bf16)
            for shape, passes in scored
            if shape is not None
        ),
        training_step(training, work, use, reference=others),
    ]
    held = held_bytes(request)
    phases = [one.with_parts({"sampler": one.parts.get("sampler", 0.0) + held}) for one in phases]
    return phases if engine is None else [phases[0], *(beside(engine, one) for one in phases[1:]), *engine.own]


def sent_bytes(request: Request) -> float:
    """Of the weights of the policy as an engine gets them: with the head under its own name, or its adapters alone."""
    rollouts: Any = getattr(request.config, "rollouts", None)
    training, model = request.training, request.model
    head = model.embedding_parameters if model.tied else 0
    alone = rollouts is not None and rollouts.lora_sync == "adapter"
    return float((training.trained if alone else model.parameters + head) * training.weight)


def held_bytes(request: Request) -> float:
    """Of the weights that wait to sample later generations (`max_staleness`); beside a GPU they are in the host's
    memory, which is not what is predicted there."""
    rollouts: Any = getattr(request.config, "rollouts", None)
    if not isinstance(rollouts, OverlappedEngineConfig) or request.setup.device != "cpu":
        return 0.0
    # in flight they go to the engine as they are, while the trainer waits
    return 0.0 if rollouts.changes_in_flight else rollouts.max_staleness * sent_bytes(request)
