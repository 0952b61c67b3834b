"""What one run of a stage is to do, as its process reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from artifacts.errors import StageError


@dataclass(frozen=True)
class Spec:
    """One stage run, as written in `spec.json`: all that `python -m stages` needs."""

    stage: str
    name: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    fingerprint: str
    identity: dict[str, Any]
    store: str
    job: str
    run: str = "manual"
    recipe: str = "manual"
    processes: int = 1
    threads: int | None = None
    launcher: str | None = None
    """The accelerate configuration by name; None: plain."""
    inputs_store: str | None = None
    """Where input artifacts lie; None: in `store`."""
    command: list[str] = field(default_factory=list)
    source: str = ""
    """What the recipe calls the file or function that rows come from: for people, no part of a result."""
    outside: list[dict[str, Any]] = field(default_factory=list)
    """What the plan saw of that which the stage reads from outside the store (`Outside.known`)."""

    @classmethod
    def read(cls, path: Path) -> Spec:
        """Raises StageError when the file is not a spec."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**values)
        except (OSError, ValueError, TypeError) as error:
            raise StageError(f"{path} is not a stage's spec.json: {error}") from error
