"""What became of results that a record tells of and that are not whole in the store any more."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property

from artifacts import Artifact, Record, Store, collected
from artifacts.errors import DamagedError, MissingError


class Losses:
    """Reads once when gc deleted what."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def fate(self, records: Sequence[Record]) -> str | None:
        """Of the outputs of records of one fingerprint, none of which counts; None: there is no record."""
        if not records:
            return None
        made = records[0].provenance.get("finished_at")
        outputs = [found for found in records[0].outputs.values() if not self.store.is_intact(found)]
        fates = [self._fate(found, made if isinstance(made, int | float) else 0.0) for found in outputs]
        return "; ".join(dict.fromkeys(fates)) or "its result was not there a moment ago"

    def _fate(self, artifact: Artifact, made: float) -> str:
        """Of an artifact that is not whole and was made at that time (seconds since 1970)."""
        what = f"{artifact.kind} {artifact.id[:15]}"
        try:
            self.store.manifest(artifact)
        except MissingError:
            when = self._collected.get(artifact, 0.0)
            if when > made:
                return f"its result was deleted by gc on {datetime.fromtimestamp(when, UTC):%Y-%m-%d}"
            return f"its result is gone from the store: {what}"
        except DamagedError:
            pass
        return f"its result is damaged: {what}"

    @cached_property
    def _collected(self) -> dict[Artifact, float]:
        return collected.read(self.store.files)
