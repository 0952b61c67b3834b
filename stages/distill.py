"""Distillation: a student learns a teacher's token distributions, on its own completions or on given ones.

A teacher may have said before what it knows of the given ones (stage `teacher_states`): then it takes no time and no
memory here. Of privileged_context rows the teacher sees more than the student. Such a teacher may be the student's own
start, which is SDFT (self-distillation with privileged context, arXiv:2601.19897).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from stages.data.columns import template_fields
from stages.data.types import TEXT_COLUMNS
from stages.rollouts.engine_settings import EngineChoice, EngineConfig, engine_problems
from stages.stage import MODELS, Input, Stage
from stages.training.config import MeasuredConfig, PolicyConfig, check_measured, policy_outputs
from stages.training.memory import same_shape
from stages.training.memory_distill import distill_phases

if TYPE_CHECKING:
    from stages.context import Context
    from stages.training.batch import Group
    from stages.training.kept_teacher import KeptTeacher
    from stages.training.loop import Trainer
    from stages.training.model import Scorer
    from stages.training.objective import Objective, Windows
    from stages.training.teachers import LocalTeacher, Teacher


class Config(EngineChoice, PolicyConfig, MeasuredConfig):
    """Settings of distillation. An item of train_batch_size is a prompt with one completion."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW."""
    beta: float = Field(1.0, ge=0, le=1)
    """0: forward KL (teacher to student), 1: reverse KL, between: generalized Jensen-Shannon divergence."""
    lmbda: float = Field(1.0, ge=0, le=1)
    """Share of steps on the student's own completions; the others use the dataset's."""
    temperature: float = Field(1.0, gt=0)
    """Divides both models' logits, and the student's when it samples."""
    max_completion_length: int = Field(256, gt=0)
    """Most tokens of a sampled completion."""
    max_length: int = Field(1024, gt=1)
    """Longest row in tokens (prompt, where completions are sampled; the teacher's too)."""
    loss_top_k: int | None = Field(None, gt=0)
    """Compare the teacher's so many likeliest tokens one by one, and all others by what they sum to; null: every token
    by itself."""
    teacher_engine: EngineConfig = EngineConfig()
    """What computes input teacher, in the terms of `rollouts`: by default the stage itself; `{engine: vllm_server}`:
    servers of vLLM, which send the `loss_top_k` likeliest tokens."""
    teacher_prompt_template: str = "{prompt}\n\n{privileged_context}"
    """What the teacher sees of privileged_context rows in place of the prompt, or of its last user message."""
    teacher_update_rate: float | None = Field(None, gt=0, le=1)
    """Without input teacher: how far its weights move towards the model's at an update; null: they stay."""
    teacher_sync_steps: int = Field(1, gt=0)
    """Steps between two updates of the teacher."""

    @field_validator("teacher_prompt_template")
    @classmethod
    def _has_both_fields(cls, value: str) -> str:
        needed, found = TEXT_COLUMNS["privileged_context"], template_fields(value)
        if set(found) != set(needed):
            raise ValueError(f"takes the fields {' and '.join(needed)}, found {', '.join(found) or 'none'}")
        return value


def check(config: Config, wired: frozenset[str]) -> list[str]:
    """What is wrong with configuration and inputs together."""
    problems = engine_problems(config, None)
    if config.rollouts.is_apart and config.lmbda == 0:
        problems.append(f"rollouts.engine is {config.rollouts.engine}, but lmbda is 0, so nothing is sampled")
    problems += _teacher_problems(config, wired) + _kept_problems(config, wired)
    moves = config.teacher_update_rate is not None
    if not {"teacher", "teacher_states"} & wired and config.lmbda != 1:
        problems.append(
            f"without input teacher the model teaches itself, on completions that it samples: lmbda is {config.lmbda}, "
            "and must be 1; or wire a teacher, or teacher_states"
        )
    if "teacher" in wired and moves:
        problems.append("teacher_update_rate is of a model that teaches itself; input teacher stays as it is")
    if moves and config.lora_r is not None:
        problems.append("teacher_update_rate needs the whole model trained; with lora_r only adapters are")
    if config.teacher_sync_steps != 1 and not moves:
        problems.append("teacher_sync_steps is given, but teacher_update_rate is null, so it would not be used")
    if "eval_dataset" in wired and not {"teacher", "teacher_states"} & wired:
        problems.append(
            "a model that teaches itself says nothing of the given completions of eval_dataset; wire a teacher"
        )
    return problems + check_measured(config, wired, "teacher_states")


def _teacher_problems(config: Config, wired: frozenset[str]) -> list[str]:
    """Of a teacher elsewhere."""
    engine = config.teacher_engine
    if not engine.is_apart:
        return []
    if engine.engine != "vllm_server":
        return [f"teacher_engine.engine is {engine.engine}; what computes a teacher elsewhere is vllm_server"]
    found = engine_problems(EngineChoice(rollouts=engine), None)
    problems = [problem.replace("rollouts.", "teacher_engine.") for problem in found]
    problems += [
        f"teacher_engine.{name} is of what is trained; a teacher stays as it is, leave it out"
        for name in ("lora_sync", "proof_interval")
        if getattr(engine, name) != EngineConfig.model_fields[name].default
    ]
    if "teacher" not in wired:
        problems.append("teacher_engine computes input teacher, which is not wired in")
    if config.loss_top_k is None:
        problems.append("teacher_engine is a server, which sends likely tokens and not all: give loss_top_k")
    if config.temperature != 1:
        problems.append(
            f"temperature is {config.temperature}, but a server sends a teacher's distributions as they are; use 1"
        )
    return problems


def _kept_problems(config: Config, wired: frozenset[str]) -> list[str]:
    """Of a teacher that has said what it knows."""
    if "teacher_states" not in wired:
        return []
    problems = []
    if "teacher" in wired:
        problems.append("inputs teacher and teacher_states exclude each other; wire one of them")
    if config.lmbda != 0:
        problems.append(
            f"lmbda is {config.lmbda:g}, but teacher_states are of the dataset's completions: use lmbda 0, or wire "
            "teacher in their place"
        )
    if config.teacher_update_rate is not None:
        problems.append("teacher_update_rate is of a model that teaches itself; teacher_states stay as they are")
    return problems


def run(context: Context) -> None:
    """Train input `model` (the student) towards input `teacher` on input `dataset`, or towards `teacher_states` of it.

    Without a teacher it is the input model itself, a copy of it, which sees the dataset's privileged context; frozen,
    or (`teacher_update_rate`) following the student.
    """
    from stages.data.dataset import read_dataset
    from stages.data.ledger import RowLedger
    from stages.training.distill_windows import distill_windows, given_groups, require_same_vocabulary
    from stages.training.export import export
    from stages.training.held_out import HeldOut
    from stages.training.start import start

    config: Config = context.config
    dataset = read_dataset(context.input("dataset"))
    kept = context.has("teacher_states")
    objective, teacher, vocabulary = _kept(context) if kept else _present(context, dataset.type)
    trainer, tokenizer = start(context, config, objective)
    require_same_vocabulary(tokenizer, vocabulary)
    teacher.join(trainer)
    ledger = RowLedger()
    given_of = partial(given_groups, config, trainer, tokenizer)
    given: list[Group] = []
    if config.lmbda < 1:  # with both kinds of steps the ledger is that of the prompts
        given = teacher.taught("dataset", given_of(dataset, ledger if config.lmbda == 0 else RowLedger()))
    held_out = HeldOut.of(
        context,
        trainer.scorer.vocabulary,
        lambda dataset, ledger: teacher.taught("eval_dataset", given_of(dataset, ledger)),
        given,
    )
    windows = distill_windows(context, config, trainer, tokenizer, dataset, given, ledger)
    trained = trainer.run(_followed(trainer, windows, teacher.scorer, config), ledger.states, held_out)
    export(context, trained, ledger.to_json(), samples=windows.samples)


def _teacher_input(context: Context, dataset_type: str) -> str:
    """Raises StageError where the model would learn from itself what it knows already."""
    from artifacts.errors import StageError

    if context.has("teacher"):
        return "teacher"
    if dataset_type != "privileged_context":
        raise StageError(
            f"there is no input teacher, and the dataset is of type {dataset_type}: the model would be its own teacher "
            "and see what it sees already; wire a teacher, or normalize the source with type: privileged_context"
        )
    return "model"


def _present(context: Context, dataset_type: str) -> tuple[Objective, Teacher, Any]:
    """Under a teacher that reads the batches: (objective, teacher, its tokenizer)."""
    from stages.losses.distillation import divergence_of
    from stages.training.start import frozen_scorer, tokenizer_of
    from stages.training.teachers import LocalTeacher, ServedTeacher
    from stages.training.top_distillation import TopDistillationLoss

    config: Config = context.config
    name, most = _teacher_input(context, dataset_type), config.loss_top_k
    tokenizer = tokenizer_of(context, name)
    if config.teacher_engine.is_apart:
        assert most is not None
        served = ServedTeacher(most)
        return TopDistillationLoss(served, divergence_of(config.beta), config.temperature), served, tokenizer
    # one that follows the student stays in float32: small moves would be rounded away
    bf16 = config.bf16 and config.teacher_update_rate is None
    local = LocalTeacher(frozen_scorer(context, name, bf16=bf16), most, config.temperature)
    return _by_whole(local, config), local, tokenizer


def _kept(context: Context) -> tuple[Objective, KeptTeacher, Any]:
    """The same under one that has read them before."""
    from stages.training.kept_teacher import KeptTeacher
    from stages.training.model import load_tokenizer
    from stages.training.state_files import StateFiles

    config: Config = context.config
    files = {
        dataset: StateFiles(context.input(name), name)
        for dataset, name in (("dataset", "teacher_states"), ("eval_dataset", "eval_teacher_states"))
        if context.has(name)
    }
    kept = KeptTeacher(files, config.loss_top_k, config.temperature)
    return _by_whole(kept, config), kept, load_tokenizer(context.input("teacher_states"))


def _by_whole(teacher: LocalTeacher | KeptTeacher, config: Config) -> Objective:
    """The objective under a teacher that can tell of every token."""
    from stages.losses.distillation import divergence_of
    from stages.training.distillation import DistillationLoss
    from stages.training.top_distillation import TopDistillationLoss

    divergence = divergence_of(config.beta)
    if config.loss_top_k is None:
        return DistillationLoss(teacher, divergence, config.temperature)
    return TopDistillationLoss(teacher, divergence, config.temperature)


def _followed(trainer: Trainer, windows: Windows, teacher: Scorer | None, config: Config) -> Windows:
    from artifacts.errors import StageError
    from stages.training.adapters import is_adapted
    from stages.training.following import FollowedWindows, Follower, Following

    if config.teacher_update_rate is None:
        return windows
    assert teacher is not None, "the model teaches itself, here"
    if is_adapted(trainer.scorer.model):
        raise StageError(
            "teacher_update_rate needs the whole model trained, and input model is an adapter; merge it first"
        )
    following = Following(config.teacher_update_rate, config.teacher_sync_steps)
    return FollowedWindows(windows, Follower(trainer, teacher, following))


STAGE = Stage(
    name="distill",
    version=3,
    config=Config,
    inputs={
        "model": Input(MODELS),
        "teacher": Input(MODELS, required=False),
        "teacher_states": Input(("teacher_states",), required=False),
        "dataset": Input(("dataset",)),
        "eval_dataset": Input(("dataset",), required=False),
        "eval_teacher_states": Input(("teacher_states",), required=False),
    },
    outputs={"model": "model", "adapter": "adapter"},
    active_outputs=policy_outputs,
    run=run,
    check=check,
    summary="a student learns a teacher's distributions, or its own given privileged context, on-policy or off-policy",
    main_metric="divergence",
    memory=distill_phases,
    shapes=same_shape,
)
