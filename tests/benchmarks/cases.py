"""What is measured: models, stages, shapes, and the matrix of cases with what each is to reach."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

WARMUP_STEPS = 2
"""Steps of a run on a CPU that are not timed: first allocations, first calls into libraries."""


GPU_EXAMPLES = 32
"""Rows of a case in bfloat16: few, for all of them are met before a step is timed."""


@dataclass(frozen=True)
class Architecture:
    """A Qwen3 decoder; sizes as in transformers' Qwen3Config."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = True
    """Whether the head has the embedding's weight."""

    def deeper(self, layers: int) -> Architecture:
        """The same with another number of layers."""
        return replace(self, layers=layers)


MODELS = {
    "XS": Architecture(2, 128, 384, 2, 1, 64),
    "S": Architecture(4, 256, 768, 4, 2, 64),
    "M": Architecture(5, 512, 1536, 8, 4, 64),  # 32 million parameters with a vocabulary of 32,000
    # for a GPU: the sizes of Qwen3's models, with a vocabulary of 151,936
    "0.6B": Architecture(28, 1024, 3072, 16, 8, 128),
    "4B": Architecture(36, 2560, 9728, 32, 8, 128),
    "8B": Architecture(36, 4096, 12288, 32, 8, 128, tied=False),
}


def teacher_of(architecture: Architecture) -> Architecture:
    """The teacher in distillation: half as many layers again."""
    return architecture.deeper(architecture.layers * 3 // 2)


@dataclass(frozen=True)
class Step:
    """What one step of a stage takes."""

    prompts: int
    completions: int
    """Completions of one prompt."""
    samples: bool = False
    """The completions are sampled in the step, all of the same length, for the same prompts in every step."""


STEPS = {
    "sft": Step(prompts=8, completions=1),
    "reference": Step(prompts=4, completions=2),
    "dpo": Step(prompts=4, completions=2),
    "reward": Step(prompts=4, completions=2),
    "grpo": Step(prompts=8, completions=8),
    "distill": Step(prompts=8, completions=1),
    "distill_kept": Step(prompts=8, completions=1),
    "online": Step(prompts=8, completions=8, samples=True),
}
"""Stage -> its step. `reference` scores pairs, `grpo` and `distill` update on recorded completions, `online` is a whole
step of GRPO. In `distill_kept` we have the teacher's states from before (stage `teacher_states`), as `dpo` has its
reference's log-probabilities; the others, who have no such thing, run the teacher in the step."""
TAUGHT = ("distill", "distill_kept")
"""Those with a teacher."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement: everything that rows, weights and steps follow from."""

    stage: str
    prompt_tokens: int
    """Mean length of a prompt."""
    completion_tokens: int
    """Mean length of a completion."""
    prompts: int
    """Prompts of one step."""
    completions: int
    """Completions of one prompt."""
    vocabulary: int = 32_000
    architecture: Architecture = MODELS["S"]
    examples: int = 64
    """Prompts of the dataset, which the steps go round."""
    varied: bool = True
    """Lengths are drawn around their means; otherwise all are equal to them."""
    steps: int = 10
    seed: int = 0
    bf16: bool = False
    """Passes in bfloat16; what is trained stays float32, as everybody does who mixes the two."""
    lora_r: int | None = None
    """Rank of the adapters that are trained in place of the weights."""
    checkpointing: bool = False
    """Activations are computed again in the backward pass."""

    @property
    def warmup_steps(self) -> int:
        """Steps that are not timed. On a GPU all rows are met once: it loads its programs when a shape first comes."""
        return -(-self.examples // self.prompts) if self.bf16 else WARMUP_STEPS

    @property
    def shape(self) -> str:
        """As on the command line, `P384C32`."""
        return f"P{self.prompt_tokens}C{self.completion_tokens}"

    @property
    def name(self) -> str:
        """One line that tells cases apart."""
        group = f" G{self.completions}" if STEPS[self.stage].completions > 2 else ""
        how = [f"LoRA {self.lora_r}"] if self.lora_r else []
        how += ["bf16"] if self.bf16 else []
        how += ["checkpointing"] if self.checkpointing else []
        known = [name for name, one in MODELS.items() if one == self.architecture and name != "S"]
        return " ".join([self.stage, *known, f"{self.shape}{group}", f"V{self.vocabulary}", *how])


def case_of(
    stage: str,
    shape: str,
    *,
    vocabulary: int = 32_000,
    model: str = "S",
    group_size: int | None = None,
    steps: int = 10,
    **precision: Any,
) -> Case:
    """The case that names mean; `precision`: bf16, lora_r, checkpointing. Raises ValueError for names that mean
    nothing."""
    found = re.fullmatch(r"P(\d+)C(\d+)", shape)
    if found is None:
        raise ValueError(f"shape {shape!r}: expected mean lengths of prompt and completion, such as P384C32")
    if stage not in STEPS:
        raise ValueError(f"no stage {stage!r} to measure; there are {', '.join(STEPS)}")
    if model not in MODELS:
        raise ValueError(f"no model {model!r}; there are {', '.join(MODELS)}")
    step = STEPS[stage]
    case = Case(
        stage=stage,
        prompt_tokens=int(found[1]),
        completion_tokens=int(found[2]),
        prompts=step.prompts,
        completions=step.completions if group_size is None else group_size,
        examples=step.prompts if step.samples else GPU_EXAMPLES if precision.get("bf16") else 64,
        varied=not step.samples,
        vocabulary=vocabulary,
        architecture=MODELS[model],
        steps=steps,
        **precision,
    )
    if steps <= case.warmup_steps:
        raise ValueError(f"{steps} steps: the first {case.warmup_steps} are not timed, so give more")
    return case


@dataclass(frozen=True)
class Goal:
    """A row of the published table: how many times the tokens a second, which share of the working memory."""

    case: Case
    over_plain: float
    over_trl: float
    memory: float
    """Of the plain loop's."""


MATRIX = (
    Goal(case_of("sft", "P128C128"), 2, 4, 0.6),
    Goal(case_of("sft", "P128C128", vocabulary=151_936), 2, 7, 0.3),
    Goal(case_of("reference", "P384C32"), 6, 12, 0.5),
    Goal(case_of("dpo", "P384C32"), 7, 17, 0.4),
    Goal(case_of("dpo", "P128C128"), 2.8, 6.5, 0.5),
    Goal(case_of("reward", "P384C32"), 3, 3, 0.6),
    Goal(case_of("grpo", "P384C32"), 8, 15, 0.3),
    Goal(case_of("distill", "P384C32"), 3, 5, 0.5),
    Goal(case_of("distill_kept", "P384C32"), 3, 5, 0.5),
)

_REAL: dict[str, Any] = {"vocabulary": 151_936, "steps": 16, "bf16": True}
GPU_MATRIX = (
    case_of("sft", "P512C512", model="0.6B", **_REAL),
    case_of("reference", "P2048C128", model="0.6B", **_REAL),
    case_of("dpo", "P2048C128", model="0.6B", **_REAL),
    case_of("reward", "P2048C128", model="0.6B", **_REAL),
    case_of("grpo", "P512C256", model="0.6B", **_REAL),
    case_of("distill", "P512C512", model="0.6B", **_REAL),
    case_of("sft", "P512C512", model="4B", checkpointing=True, **_REAL),
    case_of("dpo", "P2048C128", model="8B", lora_r=16, **_REAL),
)
"""On one GPU of 140 GB, in bfloat16: whole small models, a middling one with its activations computed again, adapters
on a large one."""

FLOOR_GOAL = 1.5
"""A step takes at most so many times its arithmetic floor."""
