"""How much memory distillation takes: its steps, the student sampling, and a teacher, here or on servers of vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from stages.training.memory import training_step
from stages.training.memory_engine import Asked, beside, engine_memory, rollout_engine, sampling_apart
from stages.training.memory_head import HeadUse
from stages.training.memory_online import held_bytes, sent_bytes
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request
from stages.training.memory_sampling import Sampled, sampling_at_most
from stages.training.memory_shape import ModelShape


def distill_phases(request: Request) -> list[Phase]:
    """Sampling, where the student's completions are used, and the steps with the teacher beside them."""
    config, training = request.config, request.training
    kept = request.models.get("teacher_states")
    teachers = [kept] if kept is not None else request.several("teacher") or [request.model]
    elsewhere = [number for number in range(len(teachers)) if kept is None and config.engine_of(number).is_apart]
    here = [teacher for number, teacher in enumerate(teachers) if number not in elsewhere]
    own = config.max_completion_length if config.lmbda > 0 else 0
    row = min(request.longest + own, request.model.context)
    followed = config.teacher_update_rate is not None
    others = training.policy_copy() if own else 0.0
    if kept is not None:
        others += 4.0 * kept.vocabulary * kept.hidden
    else:
        others += request.following(here[0]) if followed else request.frozen(*here)
    work = request.passes(row=row, rows=config.train_batch_size)
    use = HeadUse(
        teacher=max(here, key=lambda one: one.hidden, default=None) if config.compares_all else None,
        groups=config.cross_tokenizer is not None,
        together=config.couples_tokens,
        entropy=config.decomposes,
    )
    phases = [training_step(training, work, use, reference=others)]
    if own:
        asked = Sampled(-(-config.train_batch_size // request.setup.processes), max(1, row - own), own)
        phases = _student_phases(request, phases[0], asked, reference=others)
    for number in elsewhere:
        phases = _with_teacher_servers(request, teachers[number], number, phases, row=row)
    return phases


def _student_phases(request: Request, step: Phase, asked: Sampled, *, reference: float) -> list[Phase]:
    """The `step`, and sampling what is `asked`. `reference`: other models that stay."""
    training, setup = request.training, request.setup
    resident = {**training.resident(), "reference": reference}
    engine = rollout_engine(request, asked, sent=sent_bytes(request))
    if engine is None:
        return [step, sampling_at_most(request, asked, number=training.weight, resident=resident)]
    resident["sampler"] = held_bytes(request)
    step = step.with_parts({"sampler": held_bytes(request)})
    return [beside(engine, step), sampling_apart(engine, setup, resident), *engine.own]


def _with_teacher_servers(
    request: Request, teacher: ModelShape, number: int, phases: Sequence[Phase], *, row: int
) -> list[Phase]:
    """The phases of a stage of whose teachers the one with this number reads rows of at most `row` tokens elsewhere."""
    completions = -(-request.config.train_batch_size // request.setup.processes)
    sampled = Sampled(completions, row, 1)
    servers = engine_memory(request, Asked(teacher, request.config.engine_of(number), sampled, reads=row))
    working = servers.sampling - servers.resting
    found = [one if one.room is not None else beside(servers, one) for one in phases]
    step = found[0]
    found[0] = step.with_parts({"engine": step.parts.get("engine", 0.0) + working}) if working else step
    return [*found, *servers.own]
