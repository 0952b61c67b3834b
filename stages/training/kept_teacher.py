"""A teacher that has said what it knows: its hidden states of given rows, computed once, and the teacher that has no
more than these and its head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load, save
from torch import Tensor, nn

from artifacts.errors import StageError
from artifacts.shards import LARGEST_BYTES
from stages.context import Context
from stages.disk import require_disk
from stages.losses.head import Head
from stages.losses.top_divergence import TopTokens
from stages.shards import save_pieces
from stages.training.batch import Group, TokenBatch
from stages.training.language_modeling import asked_tokens
from stages.training.loop import Trainer
from stages.training.model import Scorer, token_logprobs
from stages.training.objective import Readout
from stages.training.out_of_memory import TokenBudget
from stages.training.passes import without_gradients
from stages.training.reference import ScoringConfig
from stages.training.state_files import StateFiles, write_head, write_rows, write_states
from stages.training.teachers import likeliest


@dataclass(frozen=True)
class _Place:
    """Where a row's states are; it goes with the group as its data."""

    dataset: str
    states: slice


class KeptTeacher:
    """Teaches the rows of artifacts `teacher_states`."""

    scorer = None

    def __init__(self, files: Mapping[str, StateFiles], most: int | None, temperature: float) -> None:
        """`files`: by the input that their rows are of; `most`: how many likely tokens it tells, None where nobody asks
        it for them. Raises StageError for files of several teachers."""
        self._files, self.most = files, most
        self._head = next(iter(files.values())).head(temperature)
        teachers = sorted({one.teacher for one in files.values()})
        if len(teachers) > 1:
            raise StageError(
                f"inputs teacher_states and eval_teacher_states are of two models ({' and '.join(teachers)}); make "
                "both by one"
            )

    @property
    def vocabulary(self) -> int:
        """How many tokens its head has."""
        return self._head.vocabulary

    def join(self, trainer: Trainer) -> None:
        """On the trainer's device; it tells of the student's tokens alone."""
        self._head = self._head.first(trainer.scorer.vocabulary).to(trainer.accelerator.device)

    def taught(self, dataset: str, groups: Sequence[Group]) -> list[Group]:
        """With the place of their states. Raises StageError where there are none of a row, or those of other tokens."""
        places = self._files[dataset].places(groups)
        return [replace(group, data=_Place(dataset, place)) for group, place in zip(groups, places, strict=True)]

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Of a batch, from the disk."""
        found = [self._files[group.data.dataset].states(group.data.states) for group in batch.groups]
        return torch.cat(found).to(batch.source_N.device, non_blocking=True)

    def head(self) -> Head:
        """As it was."""
        return self._head

    def __call__(self, batch: TokenBatch) -> TopTokens:
        """Of a batch."""
        assert self.most is not None
        return likeliest(self.hidden(batch), self._head, self.most)


def keep_states(
    context: Context, accelerator: Accelerator, teacher: Scorer, groups: Sequence[Group], config: ScoringConfig
) -> list[str]:
    """Compute a teacher's states of `groups`, each of one branch; the names of the shards that they are in.

    Raises StageError for a row whose log-probability is not finite.
    """
    head = teacher.head()
    longest = max(groups, key=asked_tokens)
    row_bytes = max(1, asked_tokens(longest)) * (head.weight_VH.shape[1] + 2) * head.weight_VH.dtype.itemsize
    if row_bytes > LARGEST_BYTES:
        raise StageError(
            f"row {longest.row_id}: the states of its {asked_tokens(longest)} trained tokens take {row_bytes:,} bytes, "
            f"of which {LARGEST_BYTES:,} can be kept at once; lower max_length, or wire the teacher itself into distill"
        )
    size = min(config.shard_rows, max(1, LARGEST_BYTES // (2 * row_bytes)))  # a piece is read as a whole
    budget = TokenBudget(context, config.micro_batch_tokens)

    def compute(part: Sequence[Group]) -> bytes:
        context.tokens += sum(group.length for group in part)
        return _piece(teacher, part, budget)

    return save_pieces(context, accelerator, "states", groups, compute, size=size)


def write_kept(
    context: Context, folder: Path, teacher: Scorer, groups: Sequence[Group], names: Sequence[str]
) -> list[float]:
    """The files of an artifact, of the shards of that name, but for the teacher's configuration and tokenizer; each
    row's log-probability. Raises StageError where the disk is too small."""
    head = teacher.head()
    shape = sum(map(asked_tokens, groups)), head.weight_VH.shape[1]
    require_disk(folder, shape[0] * shape[1] * head.weight_VH.dtype.itemsize, "the teacher's states")
    logps: list[float] = []

    def parts() -> Iterator[Tensor]:
        for name in names:
            piece = load(context.shards.load(name))
            logps.extend(piece["logps"].tolist())
            yield piece["states"]

    write_states(folder, parts(), shape, head.weight_VH.dtype)
    write_rows(folder, groups, logps)
    write_head(folder, head, context.input_digest("model"))
    return logps


def _piece(teacher: Scorer, groups: Sequence[Group], budget: TokenBudget) -> bytes:
    """States and log-probabilities of some rows."""
    states: list[Tensor] = [torch.empty(0)] * len(groups)
    logps: list[float] = [math.nan] * len(groups)

    def compute(indices: list[int], batch: TokenBatch) -> None:
        hidden_NH, sums_K = teacher(batch, _states_and_sums(batch))
        parts = hidden_NH.cpu().split(batch.counts)
        for index, part, total in zip(indices, parts, sums_K.tolist(), strict=True):
            states[index], logps[index] = part, total

    teacher.eval()
    without_gradients(teacher, groups, budget, compute)
    for group, total in zip(groups, logps, strict=True):
        if not math.isfinite(total):
            raise StageError(f"row {group.row_id}: its log-probability under the teacher is not finite")
    return save({"states": torch.cat(states), "logps": torch.tensor(logps, dtype=torch.float64)})


def _states_and_sums(batch: TokenBatch) -> Readout:
    """A readout: the states [N, H] of the asked-for tokens, and the log-probability [K] of every branch."""
    logprobs = token_logprobs(batch)

    def read(hidden_NH: Tensor, scorer: nn.Module) -> tuple[Tensor, Tensor]:
        return hidden_NH, batch.sum_by_branch(logprobs.read(hidden_NH, scorer).logprobs_N)

    return Readout(batch.source_N, read)
