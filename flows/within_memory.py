"""A stage whose processes ran out of memory is started again with micro-batches of half the size.

`micro_batch_tokens` is operational: the fingerprint stays, so the stage goes on from its last checkpoint. A single
process halves its budget by itself where an allocator gives up; here are the cases in which it cannot: several
processes that wait for each other, and a process that the kernel killed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flows.stage_result import Event, StageFailed, StageOutOfMemory, StageResult

LEAST_MICRO_BATCH_TOKENS = 128
"""Below, weights and optimizer need the memory, not the micro-batch."""

_ADVICE = "`posttrain plan RECIPE --memory` says what each stage needs and the smallest change that fits"


def within_memory(
    spec: dict[str, Any], start: Callable[[dict[str, Any]], StageResult], tell: Callable[[Event], None]
) -> StageResult:
    """`start(spec)`, again with smaller `micro_batch_tokens` as often as it ends with StageOutOfMemory.

    Raises StageFailed once smaller micro-batches cannot help.
    """
    while True:
        try:
            return start(spec)
        except StageOutOfMemory as error:
            tokens = _next_budget(spec, error)
            again = f"starting {spec['name']} again with micro_batch_tokens {tokens:,}, from its last checkpoint"
            tell({"kind": "warning", "text": f"{error}; {again}"})
        spec = {**spec, "config": {**spec["config"], "micro_batch_tokens": tokens}}


def _next_budget(spec: dict[str, Any], error: StageOutOfMemory) -> int:
    """The micro_batch_tokens to try. Raises StageFailed where there is none, or too little to matter."""
    if error.smaller is None or "micro_batch_tokens" not in spec["config"]:
        why = "it had not come to its first micro-batch, so smaller ones do not help"
    elif error.smaller < LEAST_MICRO_BATCH_TOKENS:
        why = f"micro-batches of less than {LEAST_MICRO_BATCH_TOKENS} tokens save nothing that matters"
    else:
        return error.smaller
    raise StageFailed(f"{error}; {why}; {_ADVICE}", expected=error.expected) from error
