"""The gate: contestants that should compute the same must report the same numbers at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TOLERANCE, BF16_TOLERANCE = 1e-4, 0.03
"""Largest relative difference, of passes in float32 and in bfloat16."""

Values = Sequence[Mapping[str, Sequence[float]]]
"""A run's steps: name -> numbers."""


class ParityError(Exception):
    """Two contestants differ; the message has the numbers."""


def difference(left: Values, right: Values) -> float:
    """Largest relative difference over all steps and names that both report."""
    return max((_relative(a, b) for _, a, b in _compared(left, right)), default=0.0)


def require_parity(name: str, left: Values, other: str, right: Values, tolerance: float = TOLERANCE) -> None:
    """Raises ParityError, with the first step that differs and all losses side by side."""
    for place, a, b in _compared(left, right):
        if not _relative(a, b) <= tolerance:  # so that NaN is a difference
            lines = [f"{at}: {name} {x:.8g}, {other} {y:.8g}" for at, x, y in _compared(left, right)][:40]
            raise ParityError(
                f"{name} and {other} differ by {_relative(a, b):.2g} at {place}, more than {tolerance:g}:\n"
                + "\n".join(lines)
            )


def _compared(left: Values, right: Values) -> list[tuple[str, float, float]]:
    """(step and name, left's number, right's number)."""
    if len(left) != len(right):
        raise ParityError(f"{len(left)} steps against {len(right)}")
    return [
        (f"step {step + 1} {key}", a, b)
        for step, (ours, theirs) in enumerate(zip(left, right, strict=True))
        for key in ours
        if key in theirs
        for a, b in zip(ours[key], theirs[key], strict=True)
    ]


def _relative(a: float, b: float) -> float:
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))
