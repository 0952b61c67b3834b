"""The monitors beside a run: each speaks once, at the step where its trouble is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from stages.monitors.curves import (
    entropy_collapse,
    held_out_reward_falling,
    held_out_rising,
    kl_runaway,
    loss_spike,
    not_finite,
)
from stages.monitors.history import History, Monitor
from stages.monitors.pairs import accuracy_at_chance, chosen_falling, margin_collapse
from stages.monitors.rollouts import (
    clip_fraction,
    constant_reward,
    duplicates,
    length_explosion,
    no_signal,
    nothing_taught,
    sampler_mismatch,
    truncation,
)
from stages.monitors.rows import masked_rows

MONITORS: dict[str, Monitor] = {
    "loss_spike": loss_spike,
    "held_out_rising": held_out_rising,
    "held_out_reward_falling": held_out_reward_falling,
    "entropy_collapse": entropy_collapse,
    "margin_collapse": margin_collapse,
    "chosen_falling": chosen_falling,
    "accuracy_at_chance": accuracy_at_chance,
    "kl_runaway": kl_runaway,
    "not_finite": not_finite,
    "no_signal": no_signal,
    "nothing_taught": nothing_taught,
    "constant_reward": constant_reward,
    "length_explosion": length_explosion,
    "truncation": truncation,
    "duplicates": duplicates,
    "clip_fraction": clip_fraction,
    "sampler_mismatch": sampler_mismatch,
}

ROW_MONITORS: dict[str, Callable[[Mapping[str, int]], str | None]] = {"masked_rows": masked_rows}
"""Of a row ledger's states, before the first step."""


@dataclass(frozen=True)
class Notice:
    """Something that a monitor noticed; each does so once a run."""

    step: int
    monitor: str
    text: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.monitor}: {self.text}"


def notices_of_rows(states: Mapping[str, int]) -> list[Notice]:
    """What a row ledger gives notice of; of step 0."""
    found = {name: monitor(states) for name, monitor in ROW_MONITORS.items()}
    return [Notice(0, name, text) for name, text in found.items() if text is not None]


class Watch:
    """The monitors beside a run."""

    def __init__(self, rows: Iterable[Mapping[str, float]] = ()) -> None:
        """`rows`: those of a run that is taken up; what they gave notice of is not said again."""
        self._run = History()
        self._silent: set[str] = set()
        for row in rows:
            self.look(row)

    def look(self, row: Mapping[str, float]) -> list[Notice]:
        """What the newest row gives notice of."""
        self._run.add(row)
        notices = []
        for name, monitor in MONITORS.items():
            if name not in self._silent and (text := monitor(self._run)) is not None:
                self._silent.add(name)
                notices.append(Notice(int(row["step"]), name, text))
        return notices


def notices_of(rows: Iterable[Mapping[str, float]]) -> list[Notice]:
    """All that a whole run gives notice of."""
    watch = Watch()
    return [notice for row in rows for notice in watch.look(row)]
