"""Trouble that a row ledger shows before the first step."""

from __future__ import annotations

from collections.abc import Mapping

UNTRAINED = ("masked", "filtered: prompt too long", "filtered: completion too long")
"""States of a row ledger that leave nothing of a row to train."""


def masked_rows(states: Mapping[str, int]) -> str | None:
    """Rows of which no token is trained, by the row ledger of a training stage."""
    total = sum(states.values())
    lost = {state: count for state, count in states.items() if state in UNTRAINED and count}
    if sum(lost.values()) < 0.01 * total or not lost:
        return None
    said = " and ".join(f"{count} {state}" for state, count in sorted(lost.items()))
    return (
        f"{said} of {total} rows: nothing of them is trained; raise max_length, or look at the masks "
        "(assistant_only_loss, completion_only_loss); the row ledger has examples"
    )
