"""How much memory a policy that teaches itself takes: that of `rl`, a teacher beside it, and the teacher's passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stages.training.memory import scoring
from stages.training.memory_head import HeadUse
from stages.training.memory_online import longest_prompt, online_phases
from stages.training.memory_phase import Phase
from stages.training.memory_request import Passes, Request
from stages.training.memory_sampling import Sampled


def self_taught_phases(request: Request) -> list[Phase]:
    """Sampling, the passes of reward model and reference, the steps, and the teacher's passes in them."""
    config, prompt = request.config, longest_prompt(request)
    groups = config.train_batch_size // config.num_generations
    row = prompt + config.num_generations * config.max_completion_length
    sampled = groups * config.num_generations * config.steps_per_generation
    reference = request.models.get("reference", request.model) if config.beta else None
    scored = request.passes(row=row, rows=groups * config.steps_per_generation)
    taught = config.distillation_weight > 0
    base = request.came_adapters if request.came_with_policy else request.frozen(request.model)
    copies = {"base": base, "ema": request.following(request.model), "live": 0.0}
    compares = config.distillation_mode != "sampled_token"
    phases = online_phases(
        request,
        reference=reference,
        asked=Sampled(
            -(-sampled // request.setup.processes),
            prompt,
            config.max_completion_length,
            config.num_generations,
            sorts=config.top_p < 1,
        ),
        scored=[(reference, scored), (request.models.get("reward_model"), scored)],
        work=request.passes(row=row, rows=groups),
        use=HeadUse(
            together=config.couples_tokens and config.distillation_weight < 1,
            entropy=config.has_entropy_bonus,
            teacher=request.model if taught and compares else None,
            apart=compares and 0 < config.distillation_weight < 1,
        ),
        teacher=copies[config.teacher_model_kind] if taught else 0.0,
    )
    return [*phases, _teaching(request, phases, groups)] if taught else phases


def _teaching(request: Request, phases: Sequence[Phase], groups: int) -> Phase:
    """The teacher's pass, beside the gradients of the passes before and what else stays in a step. Nobody knows how
    long feedback is; without it a prompt has the solution of a sibling, and one group the prompts of two. Passes are
    cut between prompts, and one prompt may be that of all completions of a group."""
    config, completion = request.config, request.config.max_completion_length
    longest = min(config.max_reprompt_len, request.model.context - completion)
    if not config.has_feedback:
        templates = len(config.reprompt_template) + len(config.solution_template)
        longest = min(longest, longest_prompt(request) + 2 * completion + templates)
    longest, read = max(1, longest), config.num_generations * completion
    prompts = config.num_generations if config.feedback_function is not None else 2
    share, row = -(-groups // request.setup.processes), longest + read
    tokens = max(min(config.micro_batch_tokens, share * (prompts * longest + read)), row)
    work = Passes(tokens, min(share * read, tokens), row)
    (step,) = (one for one in phases if one.name == "training step")
    stays = {part: step.parts.get(part, 0.0) for part in ("weights", "reference", "sampler", "engine")}
    stays |= {part: request.training.state()[part] for part in ("gradients", "optimizer")}
    teaching = scoring(request.model, request.setup, work, resident=stays, own=None, bf16=request.training.bf16)
    return replace(teaching, name="teaching")
