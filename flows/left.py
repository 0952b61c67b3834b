"""What a run that was ended leaves in the store: results, and work to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from artifacts import Store
from flows.entries import ENDED_BEFORE

_DONE = ("ran", "cached")
_AT_WORK = ("interrupted", "running")


@dataclass(frozen=True)
class Left:
    """Stages of a run by what is there of them."""

    done: tuple[str, ...]
    """Whose results are kept."""
    begun: Mapping[str, str]
    """Stage that was at work -> where it goes on (`step 40`, `3 shards`); empty: from its start."""
    waiting: tuple[str, ...]
    """Whose turn had not come."""
    forced: tuple[str, ...] = ()
    """Of those done or begun what `--force` had named: named again, it begins anew."""
    set_aside: tuple[str, ...] = ()
    """Of those begun what `--force` had named although its result is in the store: no run goes on with it."""

    @classmethod
    def of(cls, store: Store, payload: Mapping[str, Any]) -> Left:
        """Of a run as the store has it after its end."""
        stages: Mapping[str, Mapping[str, Any]] = payload.get("stages", {})
        done = tuple(name for name, entry in stages.items() if entry.get("state") in _DONE)
        begun = {name: entry for name, entry in stages.items() if entry.get("state") in _AT_WORK}
        forced = tuple(name for name in (*done, *begun) if "forced" in stages[name].get("reasons", ()))
        return cls(
            done,
            {name: _goes_on(store, entry.get("fingerprint")) for name, entry in begun.items()},
            tuple(
                name
                for name, entry in stages.items()
                if entry.get("state") == "waiting" or entry.get("reason") == ENDED_BEFORE
            ),
            forced,
            tuple(name for name in begun if name in forced and _has_result(store, begun[name])),
        )

    def in_words(self) -> str:
        """`kept: rows, sft; dpo goes on from step 40; not begun: scores`"""
        parts = [f"kept: {', '.join(self.done)}"] if self.done else []
        for name, place in self.begun.items():
            if name in self.set_aside:
                parts.append(f"{name} has its result of before, which is taken without `--force`")
            else:
                parts.append(
                    f"{name} goes on from {place}" if place else f"{name} had saved nothing yet and begins anew"
                )
        parts += [f"not begun: {', '.join(self.waiting)}"] if self.waiting else []
        return "; ".join(parts)


def _has_result(store: Store, entry: Mapping[str, Any]) -> bool:
    fingerprint = entry.get("fingerprint")
    return fingerprint is not None and store.lookup(str(entry["uses"]), fingerprint) is not None


def _goes_on(store: Store, fingerprint: str | None) -> str:
    if fingerprint is None:
        return ""
    step = store.checkpoints(fingerprint).latest_step()
    if step is not None:
        return f"step {step:,}"
    shards = len(store.shards(fingerprint).names())
    return f"{shards} shard{'s' if shards > 1 else ''} of its rows" if shards else ""
