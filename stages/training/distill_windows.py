"""Windows of distillation: the dataset's completions, or the student's own, decided step by step from the seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from artifacts.errors import StageError
from stages.data.given_tokens import require_vocabulary
from stages.data.ledger import RowLedger
from stages.data.open_prompts import open_prompts, room_for_prompts
from stages.data.privileged import tokenize_privileged
from stages.data.tokenize import TokenizedPrompt, tokenize_sequences
from stages.data.truncation import RowLimit
from stages.data.types import Dataset
from stages.rollouts.requests import Completion
from stages.seeds import generator
from stages.training.batch import Group
from stages.training.generation import Sampling
from stages.training.language_modeling import asked_tokens, sequence_group
from stages.training.loop import Trainer
from stages.training.objective import Window
from stages.training.sampled_distillation import SampledBranch
from stages.training.student_drawing import StudentDrawing, StudentGenerations
from stages.training.windows import row_order


class NothingComparedError(StageError):
    """Of completions that the student sampled, student and teacher have nothing in common."""


class Rows(Protocol):
    """What student and teacher make of rows and completions."""

    def given(self, dataset: Dataset, ledger: RowLedger) -> list[Group]:
        """Rows with their completions."""
        ...

    def prompts(self, dataset: Dataset, ledger: RowLedger) -> list[TokenizedPrompt]:
        """Prompts that the student is to complete."""
        ...

    def sampled(self, prompts: Sequence[TokenizedPrompt], completions: Sequence[Completion]) -> list[Group]:
        """Groups of a step, of what the student wrote. Raises NothingComparedError where a teacher reads none of it."""
        ...


class SharedRows:
    """Rows of models with one tokenizer. The groups of privileged_context rows carry the teacher's prompt as data."""

    def __init__(self, config: Any, trainer: Trainer, tokenizer: Any) -> None:
        self.config, self.scorer, self.tokenizer = config, trainer.scorer, tokenizer

    def given(self, dataset: Dataset, ledger: RowLedger) -> list[Group]:
        """Rows with their completions."""
        require_vocabulary(dataset, self.scorer.vocabulary)
        longest = RowLimit.of(self.config.max_length, self.scorer.context_length)
        rows = tokenize_sequences(dataset, self.tokenizer, max_length=longest, ledger=ledger)
        return [sequence_group(row) for row in rows]

    def prompts(self, dataset: Dataset, ledger: RowLedger) -> list[TokenizedPrompt]:
        """Prompts that the student is to complete."""
        length = self.scorer.context_length
        if dataset.type != "privileged_context":
            return open_prompts(self.config, dataset, self.tokenizer, length, ledger)
        template, longest = self.config.teacher_prompt_template, room_for_prompts(self.config, length)
        return tokenize_privileged(dataset, self.tokenizer, template=template, max_length=longest, ledger=ledger)

    def sampled(self, prompts: Sequence[TokenizedPrompt], completions: Sequence[Completion]) -> list[Group]:
        """Groups of a step, of what the student wrote."""
        return [
            Group(prompt.row_id, prompt.prompt_ids, (_branch(completion),), prompt.teacher_ids)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]


def _branch(completion: Completion) -> SampledBranch:
    return SampledBranch(completion.token_ids, completion.loss_mask, completion.compared_logprobs)


class DistillWindows:
    """A step takes sampled completions with probability `lmbda` (GKD, arXiv:2306.13649), else given ones."""

    def __init__(self, config: Any, rows: Rows, given: list[Group], prompts: list[TokenizedPrompt]) -> None:
        self.config, self.rows, self.given, self.prompts = config, rows, given, prompts
        self.order = row_order(max(len(given), len(prompts)), config)
        self.total_steps = self.order.total_steps
        self.samples: list[dict[str, Any]] = []
        self.own: StudentGenerations | None = None
        """What the student says; None where nothing is sampled."""

    def sample(self, trainer: Trainer, sampling: Sampling, teacher: Any) -> None:
        """Have own completions sampled so; ahead, where that is asked for, and put before a `teacher` elsewhere."""
        drawing = StudentDrawing(self.prompts, self.order, self.own_steps(), sampling, self.config.seed)
        self.own = StudentGenerations(trainer.context, drawing, self.rows.sampled, sampling, teacher)

    def own_steps(self) -> Sequence[int]:
        """Those on own completions."""
        steps = range(self.total_steps)
        if self.config.lmbda == 1:
            return steps
        return [step for step in steps if generator(self.config.seed, "on-policy", step).random() < self.config.lmbda]

    def window(self, step: int) -> Window:
        """The groups of a step."""
        epoch = self.order.epoch_after(step)
        if self.own is not None:
            if (generation := self.own.drawing.generation_of(step)) is not None:
                return self._own_window(self.own, generation, step, epoch)
            self.own.draws.moved_on()
        given = [self.given[row % len(self.given)] for row in self.order.rows(step)]
        return Window(given, metrics={"epoch": epoch, "on_policy": 0.0})

    def _own_window(self, own: StudentGenerations, generation: int, step: int, epoch: float) -> Window:
        completions, groups, found = own(generation)
        first = own.drawing.chosen(generation)[0]
        self.samples.append(
            {
                "step": step + 1,
                "row_id": first.row_id,
                "prompt": first.row["prompt"],
                "completion": own.sampling.text(completions[0]),
            }
        )
        return Window(
            groups,
            # completions of which nothing can be learnt are no reason to end a run
            uncounted_items=float(not any(map(asked_tokens, groups))),
            metrics={"epoch": epoch, "on_policy": 1.0, **completion_metrics(completions), **found},
        )

    def state(self) -> dict[str, Any]:
        """The samples kept so far, and what is in flight."""
        state: dict[str, Any] = {"samples": list(self.samples)}  # it grows while a checkpoint is written
        return state if self.own is None else {**state, "drawing": self.own.draws.state()}

    def tensors(self) -> dict[str, Tensor]:
        """What teachers elsewhere said of completions that are in flight."""
        return {} if self.own is None else self.own.tensors()

    def load(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` and `tensors` gave."""
        self.samples = state.get("samples", [])
        if self.own is not None and state.get("drawing"):
            self.own.load(state["drawing"], tensors)


def completion_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Of what the student sampled."""
    lengths = [len(completion.token_ids) for completion in completions]
    ended = sum(completion.finished for completion in completions)
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/clipped_ratio": 1 - ended / len(lengths),
    }


def distill_windows(
    trainer: Trainer,
    tokenizer: Any,
    dataset: Dataset,
    rows: Rows,
    given: list[Group],
    ledger: RowLedger,
    teacher: Any = None,
) -> DistillWindows:
    """Tokenize the prompts where completions are sampled; `given`: rows with theirs, where these are used. `teacher`:
    who may be asked ahead."""
    config: Any = trainer.context.config
    require_vocabulary(dataset, trainer.scorer.vocabulary)
    prompts = rows.prompts(dataset, ledger) if config.lmbda > 0 else []
    trainer.context.counts["rows"] = max(len(given), len(prompts))
    windows = DistillWindows(config, rows, given, prompts)
    if config.lmbda > 0:  # it would keep a whole copy of a sharded student in every process
        windows.sample(trainer, Sampling.with_engine(trainer, tokenizer, config), teacher)
    return windows


def require_same_vocabulary(student: Any, teacher: Any, sizes: set[int]) -> None:
    """Raises StageError when token ids mean different tokens to the two models, or where their heads, of these sizes,
    differ in more than what fills them up."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        if len(sizes) > 1 and min(sizes) <= (last := max(ours.values())):
            found = " and ".join(map(str, sorted(sizes)))
            raise StageError(
                f"student and teacher have heads of {found} tokens, and their tokenizer knows token {last}: resize "
                "the smaller one's embedding for the tokens that were added"
            )
        return
    different = [token for token, _ in sorted(set(ours.items()) ^ set(theirs.items()))][:3]
    raise StageError(
        f"student and teacher have different tokenizers ({len(ours)} and {len(theirs)} tokens, which differ at "
        f"{', '.join(map(repr, dict.fromkeys(different)))}); without cross_tokenizer, distributions are compared token "
        "by token: give cross_tokenizer: {}, or take models of one family, or stages init_model with the same dataset "
        "and tokenizer"
    )
