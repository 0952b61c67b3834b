"""The ledger of a run or an artifact: what each stage took, in all, and what the cache saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from artifacts import Artifact, Store
from artifacts.errors import RequestError
from flows.ancestry import Ancestry
from flows.which_run import LATEST, read_run

SUMMED = ("seconds", "cpu_seconds", "gpu_seconds", "tokens", "energy_joules")
MEASURED = (*SUMMED, "tokens_per_second", "peak_memory_gb", "mfu")
SPENT = ("ran", "failed", "interrupted")


@dataclass(frozen=True)
class Cost:
    """Of one stage; what was not measured is None. `cpu_seconds` and `gpu_seconds` are summed over processors and
    GPUs. Of a cached stage: what it took when it was made."""

    stage: str
    state: str
    seconds: float | None = None
    cpu_seconds: float | None = None
    gpu_seconds: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    peak_memory_gb: float | None = None
    mfu: float | None = None
    energy_joules: float | None = None

    @classmethod
    def of(cls, stage: str, state: str, timings: Mapping[str, Any], seconds: float | None = None) -> Cost:
        """From the timings of a record or of a run's entry; `seconds`: by the clock of whoever waited for it."""
        known: dict[str, Any] = {name: timings.get(name) for name in MEASURED}
        return cls(stage, state, **(known if seconds is None else {**known, "seconds": seconds}))


@dataclass(frozen=True)
class Bill:
    """`title`: of what. `spent`: sums over the stages that worked; `saved`: over those that were cached."""

    title: str
    costs: tuple[Cost, ...]
    spent: Mapping[str, float]
    saved: Mapping[str, float]

    @classmethod
    def of(cls, title: str, costs: Sequence[Cost]) -> Bill:
        return cls(
            title,
            tuple(costs),
            _sums(cost for cost in costs if cost.state in SPENT),
            _sums(cost for cost in costs if cost.state == "cached"),
        )

    def to_json(self) -> dict[str, Any]:
        """For `posttrain ledger --json`."""
        stages = [{name: value for name, value in vars(cost).items() if value is not None} for cost in self.costs]
        return {"of": self.title, "stages": stages, "spent": dict(self.spent), "saved": dict(self.saved)}


def _sums(costs: Iterable[Cost]) -> dict[str, float]:
    """Of what at least one of them measured."""
    found: dict[str, float] = {}
    for cost in costs:
        for name in SUMMED:
            value = getattr(cost, name)
            if value is not None:
                found[name] = found.get(name, 0) + value
    return found


def bill(store: Store, reference: str) -> Bill:
    """Of a run, or of an artifact and all that it was made of. Raises RequestError for what is neither."""
    known = LATEST.fullmatch(reference) or any(name.startswith(reference) for name in store.runs())
    if known:
        return run_bill(read_run(store, reference))
    try:
        artifact = store.find(reference)
    except RequestError as error:
        raise RequestError(f"{reference!r} is neither a run nor an artifact: {error}") from error
    return artifact_bill(store, artifact)


def run_bill(run: Mapping[str, Any]) -> Bill:
    """Of a run's payload. A stage that was skipped, or taken from the store without being asked for, is left out."""
    costs = [
        Cost.of(name, str(entry["state"]), entry["timings"], entry["seconds"] if entry["state"] in SPENT else None)
        for name, entry in run["stages"].items()
        if entry["state"] in (*SPENT, "cached")
    ]
    return Bill.of(f"run {run['run']} of recipe {run['recipe']}", costs)


def artifact_bill(store: Store, artifact: Artifact) -> Bill:
    """Every stage behind an artifact once, itself last, as if nothing had been cached."""
    ancestry = Ancestry(store)
    costs: dict[str, Cost] = {}
    for node in reversed(list(ancestry.down(artifact).walk())):
        if not node.kind or node.repeated:
            continue
        record = ancestry.record_of(Artifact.of(node.kind, node.identifier))
        if record is not None:
            costs.setdefault(record.fingerprint, Cost.of(node.stage or node.uses, "ran", record.timings))
    return Bill.of(f"{artifact.kind} {artifact.id} and all that it was made of", list(costs.values()))
