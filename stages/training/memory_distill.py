"""How much memory distillation takes beside its steps: the student sampling, and a teacher on servers of vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from stages.training.memory import Phase, Request
from stages.training.memory_engine import Asked, beside, engine_memory, rollout_engine, sampling_apart
from stages.training.memory_online import sent_bytes
from stages.training.memory_sampling import Sampled, sampling
from stages.training.memory_shape import ModelShape


def student_phases(request: Request, step: Phase, asked: Sampled, *, reference: float) -> list[Phase]:
    """The `step`, and sampling what is `asked`. `reference`: other models that stay."""
    training, setup = request.training, request.setup
    state = training.state()
    resident = {"weights": state["weights"], "optimizer": state["optimizer"], "reference": reference}
    engine = rollout_engine(request, asked, sent=sent_bytes(request))
    if engine is None:
        return [step, sampling(request.model, setup, asked, number=training.weight, resident=resident)]
    return [beside(engine, step), sampling_apart(engine, setup, resident), *engine.own]


def with_teacher_servers(request: Request, teacher: ModelShape, phases: Sequence[Phase], *, row: int) -> list[Phase]:
    """The phases of a stage whose teacher reads rows of at most `row` tokens elsewhere."""
    completions = -(-request.config.train_batch_size // request.setup.processes)
    sampled = Sampled(completions, row, 1)
    servers = engine_memory(request, Asked(teacher, request.config.teacher_engine, sampled, reads=row))
    working = servers.sampling - servers.resting
    found = [one if one.room is not None else beside(servers, one) for one in phases]
    step = found[0]
    found[0] = step.with_parts({"engine": step.parts.get("engine", 0.0) + working}) if working else step
    return [*found, *servers.own]
