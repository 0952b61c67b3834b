"""Series of cases in which one size grows, and how steeply time and memory follow it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tests.benchmarks.cases import Case, case_of

TOKENS_PER_STEP = 4096
"""Of a step in the series over the context: rows become fewer as they become longer."""


def context_series(steps: int) -> list[tuple[int, Case]]:
    """Context length -> supervised fine-tuning on as many tokens in fewer, longer rows."""
    series = []
    for context in (128, 256, 512, 1024, 2048):
        rows = TOKENS_PER_STEP // context
        case = case_of("sft", f"P{context // 2}C{context // 2}", steps=steps)
        series.append((context, replace(case, prompts=rows, examples=8 * rows)))
    return series


def group_series(steps: int) -> list[tuple[int, Case]]:
    """Completions of a prompt -> an update on two prompts' completions."""
    return [
        (size, replace(case_of("grpo", "P384C32", group_size=size, steps=steps), prompts=2, examples=16))
        for size in (2, 4, 8, 16)
    ]


def vocabulary_series(steps: int) -> list[tuple[int, Case]]:
    """Vocabulary -> supervised fine-tuning with it."""
    return [
        (size, case_of("sft", "P128C128", vocabulary=size, steps=steps)) for size in (1_024, 8_192, 32_000, 151_936)
    ]


SERIES = {"context": context_series, "group": group_series, "vocabulary": vocabulary_series}
"""What grows -> series(steps per run) -> [(size, case)]."""


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope in log-log: 1 is growth in proportion, 2 quadratic."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
