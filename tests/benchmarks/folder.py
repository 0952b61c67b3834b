"""The files of a case: what its contestants load, without what they load it with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CaseFolder:
    """What a case's contestants read."""

    path: Path

    @property
    def model(self) -> Path:
        """The model that is trained or scores: a causal one, or a classifier with one output for `reward`."""
        return self.path / "model"

    @property
    def teacher(self) -> Path:
        """The teacher, where the stage is distillation."""
        return self.path / "teacher"

    @property
    def states(self) -> Path:
        """The teacher's states of all rows (`distill_kept` only)."""
        return self.path / "states"

    @property
    def scratch(self) -> Path:
        """A place for what a contestant writes."""
        return self.path / "scratch"

    def references(self) -> dict[str, list[float]]:
        """Row id -> summed log-probability of every completion under the untrained model (`dpo` only)."""
        found: dict[str, list[float]] = json.loads((self.path / "references.json").read_text(encoding="utf-8"))
        return found

    def save_references(self, references: dict[str, list[float]]) -> None:
        """What `references` gives back."""
        (self.path / "references.json").write_text(json.dumps(references), encoding="utf-8")
