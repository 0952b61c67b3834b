"""Out of memory: the same work again in smaller micro-batches.

How a step is cut does not change its gradient, so nothing but the budget of a forward pass changes.
"""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from artifacts.errors import OutOfMemory, StageError
from stages.context import Context
from stages.training.batch import Group

T = TypeVar("T")

_ALLOCATOR_WORDS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In the RuntimeErrors of torch's CPU allocator, of CUDA outside its allocator, and of cuBLAS."""

_REMEDIES = "lower max_length, turn on gradient_checkpointing, train LoRA adapters (lora_r) or use more processes"


@dataclass(frozen=True)
class Shortage:
    """A micro-batch that did not fit. Holds no tensor and no frame of the failed attempt."""

    groups: int
    tokens: int
    longest_row: str
    longest_tokens: int
    cause: str
    """The allocator's words."""


class MicroBatchTooLarge(Exception):
    """The block of a micro-batch ran out of memory."""

    def __init__(self, shortage: Shortage) -> None:
        self.shortage = shortage
        super().__init__(shortage.cause)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up: CUDA's, torch's on the CPU, or Python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATOR_WORDS)


class TokenBudget:
    """Most tokens of a forward pass. Where memory does not suffice it is halved, says so, and stays small."""

    def __init__(self, context: Context, tokens: int) -> None:
        self.context, self.tokens = context, tokens
        self._largest = 0

    def fit(self, attempt: Callable[[int], T], *, drop: Callable[[], object] | None = None, alone: bool = True) -> T:
        """`attempt(budget)`, again with half of it for as long as one of its micro-batches does not fit.

        `drop` lets go of what a failed attempt leaves behind. A single group cannot be split: StageError naming its
        longest row. Work of several processes together (`alone` False) cannot be repeated by one of them:
        OutOfMemory, so that whoever started them starts them again.
        """
        while True:
            try:
                return attempt(self.tokens)
            except MicroBatchTooLarge as error:
                shortage = error.shortage
            # here the exception is gone, and with its frames all that the attempt had computed
            self._halve(shortage, alone)
            if drop is not None:
                drop()
            free_memory()

    @contextmanager
    def micro_batch(self, groups: Sequence[Group]) -> Iterator[None]:
        """The block computes these groups at once; `fit` hears of it where memory does not suffice."""
        tokens = sum(group.length for group in groups)
        if tokens > self._largest:
            self._largest = tokens
            self.context.micro_batch(tokens)
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            longest = max(groups, key=lambda group: group.length)
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            shortage = Shortage(len(groups), tokens, longest.row_id, longest.length, cause)
            raise MicroBatchTooLarge(shortage) from None

    def _halve(self, shortage: Shortage, alone: bool) -> None:
        if shortage.groups == 1:
            raise StageError(
                f"out of memory on row {shortage.longest_row} alone: its {shortage.longest_tokens:,} tokens need more "
                f"memory than there is, and a row cannot be split; {_REMEDIES} ({shortage.cause})"
            )
        what = f"out of memory on a micro-batch of {shortage.groups} rows, {shortage.tokens:,} tokens"
        # the budget is an upper bound and may lie far above what was in the micro-batch
        smaller = max(1, min(self.tokens, shortage.tokens) // 2)
        if not alone:
            raise OutOfMemory(
                f"{what}; one of several processes cannot repeat a step by itself: start the stage again with "
                f"micro_batch_tokens {smaller} ({shortage.cause})",
                smaller,
            )
        text = (
            f"{what}: micro_batch_tokens {self.tokens:,} -> {smaller:,}, and the same work again; results differ by "
            f"rounding, and by dropout where there is any, whose random numbers follow the micro-batches "
            f"({shortage.cause})"
        )
        self.tokens, self._largest = smaller, 0
        if self.context.is_main:
            self.context.log(text)
        else:  # only the first process has events
            logging.warning("%s", text)


def trim_heap() -> None:
    """Give the system what a CPU's heap keeps for later, where its library can. Between two kinds of work: what one
    leaves free in the heap does not fit the other, which would take more beside it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_memory() -> None:
    """Give back what nothing refers to any more, also what the allocator of a GPU keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
