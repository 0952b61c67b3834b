"""The numbers of an evaluation, made again from its samples: which values of a sample count, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Sample = Mapping[str, Any]
Part = tuple[float, float]
"""(sum, count) of one sample."""


def _field(name: str) -> Callable[[Sample], Part | None]:
    return lambda sample: None if sample.get(name) is None else (float(sample[name]), 1.0)


def _loss(sample: Sample) -> Part | None:
    if sample.get("loss") is None:
        return None
    return float(sample["loss"]) * float(sample["loss_tokens"]), float(sample["loss_tokens"])


def _margin(sample: Sample) -> float | None:
    if sample.get("chosen_score") is None or sample.get("rejected_score") is None:
        return None
    return float(sample["chosen_score"]) - float(sample["rejected_score"])


def _of_margin(value: Callable[[float], float]) -> Callable[[Sample], Part | None]:
    return lambda sample: None if (margin := _margin(sample)) is None else (value(margin), 1.0)


ANSWERS: dict[str, Callable[[Sample], Part | None]] = {
    # a pair's verdict is no answer's
    "accuracy": lambda sample: None if sample.get("completion") is None else _field("correct")(sample),
    "reward": _field("score"),
    "completions/mean_length": _field("tokens"),
    "completions/clipped_ratio": lambda sample: (
        None if sample.get("finished") is None else (float(not sample["finished"]), 1.0)
    ),
}
"""Metric -> what an answer adds to it; a row may have several answers."""

ROWS: dict[str, Callable[[Sample], Part | None]] = {
    "loss": _loss,
    "perplexity": _loss,
    "preference/accuracy": _of_margin(lambda margin: float(margin > 0)),
    "preference/margin": _of_margin(lambda margin: margin),
    "rewards/chosen": _field("chosen_score"),
    "rewards/rejected": _field("rejected_score"),
    "logps/chosen": _field("chosen_score"),
    "logps/rejected": _field("rejected_score"),
}
"""Metric -> what a row adds to it, however often it was answered."""

REWARD_MEAN = re.compile(r"rewards/(?:(.+)/)?mean")
"""`rewards/NAME/mean` of a function, `rewards/mean` of the weighted sum of all."""

VERDICTS = ("accuracy", "preference/accuracy")
"""Metrics whose samples are right (1) or wrong (0)."""
SHARES = (*VERDICTS, "completions/clipped_ratio")
"""Metrics whose samples lie between 0 and 1."""
LARGE_IS_BAD = ("loss", "perplexity", "completions/clipped_ratio")


@dataclass(frozen=True)
class Reading:
    """How a metric comes from samples."""

    part: Callable[[Sample], Part | None]
    """What one adds to it; None: nothing."""
    by_row: bool
    """A row counts once, however often it was answered."""


def reading(metric: str) -> Reading | None:
    """None: the metric is not a mean over samples."""
    if metric in ROWS:
        return Reading(ROWS[metric], by_row=True)
    if metric in ANSWERS:
        return Reading(ANSWERS[metric], by_row=False)
    if named := REWARD_MEAN.fullmatch(metric):
        return Reading(_field(f"reward_{named[1]}" if named[1] else "reward"), by_row=False)
    return None


def row_parts(metric: str, samples: Iterable[Sample]) -> dict[str, Part]:
    """Row -> what it adds to a metric, its answers together; rows that add nothing are left out."""
    how = reading(metric)
    parts: dict[str, Part] = {}
    for sample in samples:
        value, row = how.part(sample) if how else None, str(sample.get("row_id"))
        if how is None or value is None or (how.by_row and row in parts):
            continue
        total, count = parts.get(row, (0.0, 0.0))
        parts[row] = total + value[0], count + value[1]
    return {row: part for row, part in parts.items() if part[1]}


def counted(metric: str, samples: Iterable[Sample]) -> list[tuple[Sample, float]]:
    """The samples that count in a metric, each once, with its value; empty for a metric that is not known here."""
    if (how := reading(metric)) is None:
        return []
    found, seen = [], set()
    for sample in samples:
        value = how.part(sample)
        if value is None or (how.by_row and sample.get("row_id") in seen):
            continue
        seen.add(sample.get("row_id"))
        found.append((sample, value[0] / value[1] if value[1] else 0.0))
    return found


def recomputed(metric: str, samples: Iterable[Sample]) -> float | None:
    """The metric from its samples; None: nothing counts in it."""
    if (how := reading(metric)) is None:
        return None
    parts = [value for sample, _ in counted(metric, samples) if (value := how.part(sample)) is not None]
    total = sum(count for _, count in parts)
    if not total:
        return None
    mean = math.fsum(value for value, _ in parts) / total
    return math.exp(mean) if metric == "perplexity" else mean
