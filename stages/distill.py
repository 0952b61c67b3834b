"""Distillation: a student learns a teacher's token distributions, on its own completions or on given ones.

A teacher may have said before what it knows of the given ones (stage `teacher_states`): then it takes no time and no
memory here. Of privileged_context rows the teacher sees more than the student. Such a teacher may be the student's own
start, which is SDFT (self-distillation with privileged context, arXiv:2601.19897). By policy gradients (`loss_type`) it
is asked for the probability of what the student sampled alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stages.stage import MODELS, Input, Stage
from stages.training.config import policy_outputs
from stages.training.distill_config import Config, check
from stages.training.memory import same_shape
from stages.training.memory_distill import distill_phases
from stages.training.teacher_settings import number_problems

if TYPE_CHECKING:
    from stages.context import Context
    from stages.training.batch import Group
    from stages.training.distill_windows import Rows
    from stages.training.held_out import Measured
    from stages.training.kept_teacher import KeptTeacher
    from stages.training.loop import Trainer
    from stages.training.model import Scorer
    from stages.training.objective import Objective, Windows
    from stages.training.teachers import LocalTeacher, Teacher

    RowsOf = Callable[[Trainer, Any], Rows]
    """(trainer, the student's tokenizer) -> what the models make of rows."""


def run(context: Context) -> None:
    """Train input `model` (the student) towards input `teacher` on input `dataset`, or towards `teacher_states` of it.

    Several teachers teach rows of their own.

    Without a teacher it is the input model itself, a copy of it, which sees the dataset's privileged context; frozen,
    or (`teacher_update_rate`) following the student.
    """
    from stages.data.dataset import read_dataset
    from stages.data.ledger import RowLedger
    from stages.training.distill_windows import distill_windows
    from stages.training.export import export
    from stages.training.held_out import HeldOut
    from stages.training.held_out_completions import are_own, own_completions
    from stages.training.occupancy import utilization
    from stages.training.start import start

    config: Config = context.config
    dataset = read_dataset(context.input("dataset"))
    own = context.has("eval_dataset") and are_own(context)
    objective, teacher, rows_of = _teaching(context, dataset.type)
    trainer, tokenizer = start(context, config, objective)
    rows = rows_of(trainer, tokenizer)
    teacher.join(trainer)
    ledger = RowLedger()
    given: list[Group] = []
    if config.lmbda < 1:  # with both kinds of steps the ledger is that of the prompts
        given = teacher.taught("dataset", rows.given(dataset, ledger if config.lmbda == 0 else RowLedger()))
    held_out: Measured | None = None
    if not own:
        held_out = HeldOut.of(
            context,
            trainer.scorer.vocabulary,
            lambda dataset, ledger: teacher.taught("eval_dataset", rows.given(dataset, ledger)),
            given,
        )
    windows = distill_windows(trainer, tokenizer, dataset, rows, given, ledger, teacher)
    if own:
        held_out = own_completions(context, trainer, windows)
    started = time.monotonic()
    trained = trainer.run(_followed(trainer, windows, teacher.scorer, config), ledger.states, held_out)
    if windows.own is not None:
        context.timings |= utilization(context.timings, time.monotonic() - started)
    export(context, trained, ledger.to_json(), samples=windows.samples)


def _teaching(context: Context, dataset_type: str) -> tuple[Objective, Teacher, RowsOf]:
    """The objective under a teacher, the teacher, and what the two models make of rows."""
    from stages.training.distill_windows import SharedRows, require_same_vocabulary

    if context.config.cross_tokenizer is not None:
        from stages.training.cross_teaching import cross_teaching

        return cross_teaching(context)
    listed = context.has("teacher") and len(context.inputs_of("teacher")) > 1
    if context.config.teacher_column is not None or listed:
        return _several(context)
    kept = context.has("teacher_states")
    objective, teacher, vocabulary = (
        _kept(context) if kept else _present(context, _teacher_input(context, dataset_type))
    )

    def rows_of(trainer: Trainer, tokenizer: Any) -> Rows:
        require_same_vocabulary(tokenizer, vocabulary, {trainer.scorer.vocabulary, teacher.vocabulary or 0} - {0})
        return SharedRows(context.config, trainer, tokenizer)

    return objective, teacher, rows_of


def _several(context: Context) -> tuple[Objective, Teacher, RowsOf]:
    """The same of several teachers, each of rows of its own."""
    from stages.training.distill_windows import SharedRows, require_same_vocabulary
    from stages.training.row_teachers import RowsOfTeachers
    from stages.training.several_teachers import several_teachers

    objective, teachers, known, choice = several_teachers(context, "teacher", _present)

    def rows_of(trainer: Trainer, tokenizer: Any) -> Rows:
        for theirs, size in known:
            require_same_vocabulary(tokenizer, theirs, {trainer.scorer.vocabulary, size or 0} - {0})
        return RowsOfTeachers(SharedRows(context.config, trainer, tokenizer), choice)

    return objective, teachers, rows_of


def _teacher_input(context: Context, dataset_type: str) -> str:
    """Raises StageError where the model would learn from itself what it knows already."""
    from artifacts.errors import StageError
    from stages.training.start import say_own_teacher

    if context.has("teacher"):
        return "teacher"
    if dataset_type != "privileged_context":
        raise StageError(
            f"there is no input teacher, and the dataset is of type {dataset_type}: the model would be its own teacher "
            "and see what it sees already; wire a teacher, or normalize the source with type: privileged_context"
        )
    say_own_teacher(context)
    return "model"


def _present(
    context: Context, name: str, number: int | None = None, seen: Callable[[Any], Any] = lambda teacher: teacher
) -> tuple[Objective, Teacher, Any]:
    """Under a teacher that reads the batches: (objective, teacher, its tokenizer). `number`: of several; `seen`: the
    teacher as the objective sees it."""
    from stages.losses.distillation import divergence_of
    from stages.training.sampled_distillation import SampledDistillationLoss
    from stages.training.start import frozen_scorer, tokenizer_of
    from stages.training.teachers import LocalTeacher, ServedTeacher
    from stages.training.top_distillation import TopDistillationLoss

    config: Config = context.config
    most = config.loss_top_k
    tokenizer = tokenizer_of(context, name)
    if config.engine_of(number or 0).is_apart:
        served = ServedTeacher(most, name, number)
        if config.sampled_loss is not None:
            return SampledDistillationLoss(served.tell, config.sampled_settings(config.temperature)), served, tokenizer
        return TopDistillationLoss(seen(served), divergence_of(config.beta), config.temperature), served, tokenizer
    # one that follows the student is given in float32, of which it makes what is computed with
    bf16 = config.bf16 and config.teacher_update_rate is None
    local = LocalTeacher(frozen_scorer(context, name, bf16=bf16), most, config.temperature)
    return _by_whole(seen(local), config), local, tokenizer


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
    from stages.training.sampled_distillation import SampledDistillationLoss, telling
    from stages.training.top_distillation import TopDistillationLoss

    if config.sampled_loss is not None:
        tell = telling(teacher, whole=config.decomposes)
        return SampledDistillationLoss(tell, config.sampled_settings(config.temperature))
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
    version=8,
    config=Config,
    inputs={
        "model": Input(MODELS),
        "teacher": Input(MODELS, required=False, many=True),
        "teacher_states": Input(("teacher_states",), required=False),
        "dataset": Input(("dataset",)),
        "eval_dataset": Input(("dataset",), required=False),
        "eval_teacher_states": Input(("teacher_states",), required=False),
    },
    outputs={"model": "model", "adapter": "adapter"},
    active_outputs=policy_outputs,
    run=run,
    check=check,
    check_lists=lambda config, counts: number_problems(config, counts.get("teacher", 0)),
    summary="a student learns a teacher's distributions, or its own given privileged context, on-policy or off-policy",
    main_metric="divergence",
    memory=distill_phases,
    shapes=same_shape,
)
