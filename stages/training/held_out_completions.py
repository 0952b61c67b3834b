"""Distillation measured on what the student itself says to held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from artifacts.errors import DataError
from stages.context import Context
from stages.data.dataset import read_dataset
from stages.data.tokenize import TokenizedPrompt
from stages.rollouts.requests import Completion
from stages.training.distill_windows import DistillWindows, NothingComparedError, Rows, completion_metrics
from stages.training.global_random import kept_random_numbers
from stages.training.held_out import INPUT, LOSS, PREFIX, Measured, measure, named, read_apart, say_known, when
from stages.training.held_out_sampling import Pieces, held_out_sampling, held_out_seeds
from stages.training.loop import Trainer
from stages.training.objective import Windows
from stages.training.rollouts_ahead import Ahead

_WITHOUT_COMPLETIONS = ("prompt", "privileged_context")
"""Types of rows that the student is to complete."""


@dataclass(frozen=True)
class OwnCompletions(Measured):
    """Prompts that the student completes; its divergence from the teacher is that on these completions."""

    rows: Rows
    prompts: Sequence[TokenizedPrompt]
    seeds: Sequence[tuple[int, ...]]
    sampling: Pieces
    in_turn: Callable[[Callable[[], list[list[Completion]]]], list[list[Completion]]] = lambda job: job()
    """Has it done when the engine has time and the present weights."""

    at_start: ClassVar[bool] = True

    def measure(self, trainer: Trainer, windows: Windows) -> dict[str, float]:
        """`eval/loss`, the objective's other metrics, and the lengths of the completions. As in a step, completions of
        which nothing is compared are no reason to end a run: these have lengths alone."""
        with kept_random_numbers():
            sampled = self.in_turn(lambda: self.sampling(self.prompts, self.seeds))
        prompts = [prompt for prompt, made in zip(self.prompts, sampled, strict=True) for _ in made]
        completions = [completion for made in sampled for completion in made]
        lengths = named(completion_metrics(completions))
        try:
            groups = self.rows.sampled(prompts, completions)
        except NothingComparedError as error:
            trainer.context.log(f"input {INPUT}: {error}")
            return lengths
        if not any(map(trainer.objective.count, groups)):
            return lengths
        found = measure(trainer, groups) | lengths
        if trainer.context.config.sampled_loss is not None:
            # only the slope of a policy gradient's value means something; what it leads down is the divergence
            found[LOSS] = found[f"{PREFIX}divergence"]
        return found


def are_own(context: Context) -> bool:
    """Whether input `eval_dataset`, which is wired in, brings prompts alone. Raises DataError where the rows and the
    stage's settings do not fit."""
    config, found = context.config, read_dataset(context.input(INPUT)).type
    taught = context.has("teacher") or context.has("teacher_states")
    if not taught and found != "privileged_context":
        raise DataError(
            f"input {INPUT} is of type {found}, and a model that teaches itself says nothing of such rows: give some "
            "of type privileged_context, or wire a teacher"
        )
    if found not in _WITHOUT_COMPLETIONS:
        if config.sampled_loss is not None:
            raise DataError(
                f"input {INPUT} is of type {found}, and loss_type {config.loss_type} measures what the student draws: "
                "give rows of type prompt"
            )
        if given := config.samples_apart():
            raise DataError(
                f"{given[0]} is given, but the rows of input {INPUT} have completions, so it would not be used; to "
                "measure the student's own, give rows of type prompt"
            )
        return False
    if config.lmbda == 0:
        raise DataError(
            f"input {INPUT} is of type {found}, but with lmbda 0 nothing is sampled: give rows with completions"
        )
    if config.rollouts.in_flight_updates:
        instead = "" if config.sampled_loss is not None else "give rows with completions, or "
        raise DataError(
            f"input {INPUT} is of type {found}, and to complete its prompts would change what is trained: with "
            f"rollouts.in_flight_updates what is in flight must end first, with older weights; {instead}leave one of "
            "the two out"
        )
    return True


def own_completions(context: Context, trainer: Trainer, windows: DistillWindows) -> OwnCompletions:
    """Of input `eval_dataset`; prompts that are trained on too are said."""
    config = context.config
    prompts = read_apart(context, trainer.scorer.vocabulary, windows.rows.prompts)[: config.eval_max_prompts]
    context.counts["eval_rows"] = len(prompts)
    say_known(context, map(_tokens, prompts), map(_tokens, windows.prompts), metric="loss")
    assert windows.own is not None, "with lmbda above 0 the stage opens it"
    sampling = held_out_sampling(windows.own.sampling.policy, config, completions=config.train_batch_size)
    more: dict[str, Any] = when(config)
    if isinstance(windows.own.draws, Ahead):
        more["in_turn"] = windows.own.draws.between
    return OwnCompletions(windows.rows, prompts, held_out_seeds(config, prompts), sampling, **more)


def _tokens(prompt: TokenizedPrompt) -> tuple[int, ...]:
    return tuple(prompt.prompt_ids)
