"""What a plan says of one stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from artifacts import Artifact, Record
from flows.inputs import ResolvedInput

State = Literal["cached", "resume", "run", "may_run", "skipped"]
Outputs = Mapping[str, Mapping[str, Artifact]]
"""Stage name -> output name -> artifact."""


@dataclass(frozen=True)
class Decision:
    """What happens to one stage. `fingerprint` and what follows from it: None while an input is not known."""

    stage: str
    state: State
    reasons: tuple[str, ...]
    fingerprint: str | None = None
    identity: dict[str, Any] | None = None
    inputs: Mapping[str, tuple[ResolvedInput, ...]] = field(default_factory=dict)
    record: Record | None = None
    """The record whose outputs are taken."""
    step: int | None = None
    """The step of the checkpoint to go on from."""
    fallen: str | None = None
    """Why a record of the same does not count: what it wrote outside of the store is not there."""

    @property
    def outputs(self) -> dict[str, Artifact]:
        """The artifacts that are there already."""
        return {} if self.record is None else dict(self.record.outputs)

    @property
    def state_in_words(self) -> str:
        """`may run`, `resume at step 40`"""
        at = f" at step {self.step}" if self.step is not None else ""
        return self.state.replace("_", " ") + at

    def summary(self) -> str:
        """`resume at step 40: with.beta: 0.1 -> 0.2`"""
        return f"{self.state_in_words}: {'; '.join(self.reasons)}"

    @property
    def left_out(self) -> bool:
        """It is not selected, and nothing of it is read."""
        return self.state == "skipped" and self.record is None

    def to_json(self) -> dict[str, Any]:
        """For `posttrain plan --json`."""
        return {
            "state": self.state,
            "reasons": list(self.reasons),
            "fingerprint": self.fingerprint,
            "step": self.step,
            "inputs": {name: [entry.label for entry in entries] for name, entries in self.inputs.items()},
            "outputs": {name: {"kind": found.kind, "id": found.id} for name, found in self.outputs.items()},
        }


def left_out_line(decisions: Mapping[str, Decision]) -> str | None:
    """`not selected by --until sft: dpo, eval_dpo`: the stages that tables do without; None: there are none."""
    left = {name: decision for name, decision in decisions.items() if decision.left_out}
    if not left:
        return None
    reason = "; ".join(next(iter(left.values())).reasons)  # the same of each: what was selected
    return f"{reason}: {', '.join(left)}"
