"""Rows of a case and how they fall into steps: the same for every contestant, whatever the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, pstdev

import numpy

from stages.seeds import generator
from tests.benchmarks.cases import Case

PAD, BOS, EOS = 0, 1, 2
FIRST_TOKEN = 3
"""Rows are made of tokens from here on: none looks like padding or the end."""

PROMPT_SPREAD, COMPLETION_SPREAD = 0.5, 0.6
"""Standard deviation of lengths over their mean."""
LONGEST = 3.0
"""No length is above so many times the mean."""


@dataclass(frozen=True)
class Row:
    """A prompt with its completions (chosen and rejected; those of a group; or one)."""

    row_id: str
    prompt: list[int]
    completions: tuple[list[int], ...]
    advantages: tuple[float, ...]
    """One a completion, mean 0 and deviation 1 over the row's."""

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return len(self.prompt) + max(map(len, self.completions))

    @property
    def completion_tokens(self) -> int:
        """Tokens of all completions: what a stage learns from."""
        return sum(map(len, self.completions))


def make_rows(case: Case) -> list[Row]:
    """Log-normal lengths, tokens at random."""
    rows = []
    for index in range(case.examples):
        draws = generator(case.seed, "benchmark rows", index)
        prompt = _tokens(case, draws, _length(case, draws, case.prompt_tokens, PROMPT_SPREAD))
        completions = tuple(
            _tokens(case, draws, _length(case, draws, case.completion_tokens, COMPLETION_SPREAD))
            for _ in range(case.completions)
        )
        rows.append(Row(f"r{index}", prompt, completions, _advantages(draws, case.completions)))
    return rows


def batches(case: Case, rows: list[Row]) -> list[list[Row]]:
    """The rows of every step: rows of like length go together, which spares the contestants that pad."""
    order = sorted(rows, key=lambda row: (row.longest, row.row_id))
    cut = [order[start : start + case.prompts] for start in range(0, len(order), case.prompts)]
    places = generator(case.seed, "benchmark batches").permutation(len(cut))
    return [cut[places[step % len(cut)]] for step in range(case.steps)]


def _length(case: Case, draws: numpy.random.Generator, mean: int, spread: float) -> int:
    if not case.varied:
        return mean
    variance = math.log(1 + spread**2)
    drawn = draws.lognormal(math.log(mean) - variance / 2, math.sqrt(variance))
    return max(2, min(round(drawn), round(LONGEST * mean)))


def _tokens(case: Case, draws: numpy.random.Generator, count: int) -> list[int]:
    tokens: list[int] = draws.integers(FIRST_TOKEN, case.vocabulary, count).tolist()
    return tokens


def _advantages(draws: numpy.random.Generator, count: int) -> tuple[float, ...]:
    values = draws.standard_normal(count).tolist()
    mean, deviation = fmean(values), pstdev(values)
    return tuple((value - mean) / (deviation or 1.0) for value in values)
