"""What the stages hold that let a model answer prompts. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from stages.training.memory import scoring
from stages.training.memory_engine import beside, rollout_engine, sampling_apart
from stages.training.memory_phase import Phase
from stages.training.memory_request import Request
from stages.training.memory_sampling import Sampled, sampling

_COMPLETIONS_AT_ONCE = 256
"""As `answers` cuts its shards."""


def answering_phases(request: Request, others: Sequence[Phase] = ()) -> list[Phase]:
    """Sampling, and the passes of a reward model over what was sampled. `others`: of the stage's other passes."""
    config, setup = request.config, request.setup
    judge = request.models.get("reward_model")
    resident = {"weights": request.frozen(request.model), "reference": request.frozen(judge)}
    prompt = max(1, min(request.longest, request.model.context - config.max_completion_length))
    at_once = max(config.num_generations, _COMPLETIONS_AT_ONCE // config.num_generations * config.num_generations)
    asked = Sampled(
        at_once,
        prompt,
        config.max_completion_length,
        config.num_generations,
        sorts=config.top_p < 1,
        of_form=config.structured is not None,
    )
    engine = rollout_engine(request, asked)
    if engine is None:
        phases = [sampling(request.model, setup, asked, number=2 if config.bf16 else 4, resident=resident)]
    else:
        proof = request.passes(row=prompt + config.max_completion_length, rows=at_once)
        proving = scoring(request.model, setup, proof, resident=resident, own=None, bf16=config.bf16)
        phases = [sampling_apart(engine, setup, resident), beside(engine, proving)]
    if judge is not None:
        group = prompt + config.num_generations * config.max_completion_length
        work = request.passes(row=group, rows=at_once // config.num_generations, read=at_once)
        judging = scoring(judge, setup, work, resident=resident, own=None, bf16=config.bf16)
        phases.append(judging if engine is None else beside(engine, judging))
    if engine is None:
        return [*phases, *others]
    return [*phases, *(beside(engine, one) for one in others), *engine.own]
