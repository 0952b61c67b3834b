"""What a person would notice in a run's curves: what happened, at which step, and what to do.

Pure functions of the rows of `metrics.jsonl`, so that a running stage, a resumed one and the report say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

FEW = 20
"""Steps that are compared with those before them."""
UNTRAINED = ("masked", "filtered: prompt too long", "filtered: completion too long")
"""States of a row ledger that leave nothing of a row to train."""


class History:
    """Every metric of a run so far, in order."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._best: dict[str, float] = {}

    def add(self, row: Mapping[str, float]) -> None:
        """The newest step."""
        for name, value in row.items():
            values = self._values.setdefault(name, [])
            values.append(value)
            if len(values) >= 2 * FEW:
                before = fmean(values[-2 * FEW : -FEW])
                self._best[name] = max(before, self._best.get(name, before))

    def values(self, name: str) -> Sequence[float]:
        """Of a metric, in the steps that have it."""
        return self._values.get(name, ())

    def first(self, name: str) -> float:
        """Mean of its first values."""
        return fmean(self._values[name][:FEW])

    def last(self, name: str, count: int = FEW) -> float:
        """Mean of its newest values."""
        return fmean(self._values[name][-count:])

    def best(self, name: str) -> float:
        """The largest mean of so many values in a row, the newest left out; needs twice as many."""
        return self._best[name]


Monitor = Callable[[History], str | None]
"""A run up to a step -> what is wrong by then, and what to do."""


@dataclass(frozen=True)
class Notice:
    """Something that a monitor noticed; each does so once a run."""

    step: int
    monitor: str
    text: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.monitor}: {self.text}"


def loss_spike(run: History) -> str | None:
    """The newest loss is far above those before it."""
    losses = run.values("loss")
    before = losses[-FEW - 1 : -1]
    if len(before) < FEW:
        return None
    usual = median(before)
    spread = median(abs(loss - usual) for loss in before)
    if losses[-1] <= usual + 10 * spread + 0.5 * abs(usual):
        return None
    return (
        f"loss {losses[-1]:.4g} after {usual:.4g} (median of {FEW} steps); look at this step's rows in steps.jsonl; a "
        "lower learning_rate, a longer warmup_ratio or a smaller max_grad_norm keep single rows from this"
    )


def entropy_collapse(run: History) -> str | None:
    """The model has become almost certain of every token."""
    if len(run.values("entropy")) < 2 * FEW:
        return None
    first, last = run.first("entropy"), run.last("entropy")
    if first <= 0 or last >= 0.1 * first:
        return None
    return (
        f"entropy {last:.3g} nats a token, {first:.3g} at the start; the model writes one answer only: stop earlier, "
        "or lower learning_rate; in preference and RL stages raise beta"
    )


def margin_collapse(run: History) -> str | None:
    """The implicit reward margin was there and has gone."""
    if len(run.values("rewards/margins")) < 3 * FEW:
        return None
    best, last = run.best("rewards/margins"), run.last("rewards/margins")
    if best <= 0 or last > 0.2 * best:
        return None
    return (
        f"reward margin {last:.3g}, {best:.3g} at its best; chosen and rejected are no longer told apart: lower "
        "learning_rate, raise beta, or look whether the order of the rows changes their kind"
    )


def chosen_falling(run: History) -> str | None:
    """Chosen completions have become much less likely, although they win."""
    if min(len(run.values("logps/chosen")), len(run.values("rewards/margins"))) < 2 * FEW:
        return None
    first, last = run.first("logps/chosen"), run.last("logps/chosen")
    # log-probabilities are below 0
    if last >= 1.5 * first or run.last("rewards/margins") <= run.first("rewards/margins"):
        return None
    return (
        f"log-probability of chosen completions {last:.4g}, {first:.4g} at the start, while margins grow: both "
        "completions are unlearnt; add the likelihood of the chosen one (loss_type: [sigmoid, sft]), or take apo_zero"
    )


def accuracy_at_chance(run: History) -> str | None:
    """Chosen completions win as often as a coin."""
    for name in ("rewards/accuracies", "accuracy"):
        steps = len(run.values(name))
        if steps >= 5 * FEW and abs(run.last(name, 2 * FEW) - 0.5) <= 0.03:
            return (
                f"{name} {run.last(name, 2 * FEW):.3f} over the last {2 * FEW} of {steps} steps: nothing is learnt; "
                "raise learning_rate, or look whether chosen and rejected are mixed up"
            )
    return None


def kl_runaway(run: History) -> str | None:
    """The policy is far from its reference, and getting farther."""
    divergences = run.values("kl")
    if len(divergences) < 2 * FEW:
        return None
    before, last = fmean(divergences[-2 * FEW : -FEW]), run.last("kl")
    if last < 10 or last < 1.5 * before:
        return None
    return (
        f"KL divergence from the reference {last:.3g}, {before:.3g} {FEW} steps before: raise beta, lower learning_rate"
    )


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


MONITORS: dict[str, Monitor] = {
    "loss_spike": loss_spike,
    "entropy_collapse": entropy_collapse,
    "margin_collapse": margin_collapse,
    "chosen_falling": chosen_falling,
    "accuracy_at_chance": accuracy_at_chance,
    "kl_runaway": kl_runaway,
}


ROW_MONITORS: dict[str, Callable[[Mapping[str, int]], str | None]] = {"masked_rows": masked_rows}
"""Of a row ledger's states, before the first step."""


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
