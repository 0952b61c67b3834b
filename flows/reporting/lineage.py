"""How each number was made: evaluation, model, datasets, down to the sources, with the id of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from artifacts.errors import PosttrainError
from flows.reporting.headline import Measurement
from flows.reporting.reading import Reader, artifact_of
from flows.reporting.text import in_words, plain, short
from flows.reporting.wiring import Wiring


@dataclass(frozen=True)
class Node:
    """One artifact (or thing from outside) and what it was made of. `repeated`: its inputs stand above."""

    role: str
    stage: str
    uses: str
    kind: str
    identifier: str
    fingerprint: str
    source: str
    repeated: bool
    inputs: tuple[Node, ...]


@dataclass(frozen=True)
class Trail:
    """The numbers of one evaluation and the tree behind them."""

    stage: str
    measurements: Sequence[Measurement]
    root: Node


@dataclass(frozen=True)
class Lineage:
    trails: tuple[Trail, ...]
    notes: tuple[str, ...]


def read_lineage(
    run: Mapping[str, Any],
    wiring: Wiring,
    measurements: Mapping[str, Sequence[Measurement]],
    reader: Reader,
) -> Lineage:
    """A trail for every evaluation of the run."""
    trails = []
    for stage, entry in run["stages"].items():
        for output in (entry.get("outputs") or {}).values():
            if output["kind"] != "evaluation":
                continue
            try:
                tree = reader.store.lineage(artifact_of(output))
            except PosttrainError as error:
                reader.note(f"{stage}: the lineage of {short(output['id'])} cannot be read: {error}")
                continue
            root = _Tree(run, wiring, reader).node("", tree)
            trails.append(Trail(stage, measurements.get(stage, ()), root))
    return Lineage(tuple(trails), tuple(reader.notes))


class _Tree:
    """One walk; an artifact that feeds several others is opened once."""

    def __init__(self, run: Mapping[str, Any], wiring: Wiring, reader: Reader) -> None:
        self.run = run
        self.wiring = wiring
        self.reader = reader
        self.seen: set[str] = set()

    def node(self, role: str, tree: Mapping[str, Any]) -> Node:
        """A node of the store's lineage; one without `artifact` is a source outside the store."""
        if "artifact" not in tree:
            return self._outside(role, tree["source"])
        identifier, kind = str(tree["artifact"]), str(tree["kind"])
        stage = self.wiring.producers.get(identifier, "")
        inputs: list[Node] = []
        repeated = identifier in self.seen and bool(tree["inputs"])
        self.seen.add(identifier)
        for name, below in {} if repeated else tree["inputs"].items():
            inputs += [self.node(name, item) for item in (below if isinstance(below, list) else [below])]
        if tree.get("note"):
            self.reader.note(f"{stage or kind} {short(identifier)}: {tree['note']}")
        fingerprint = tree["fingerprint"] or (self.run["stages"][stage]["fingerprint"] if stage else "")
        return Node(
            role=role,
            stage=stage,
            uses=str(tree["stage"] or ""),
            kind=kind,
            identifier=identifier,
            fingerprint=str(fingerprint or ""),
            source="" if inputs or repeated or kind != "dataset" else self._source(identifier, kind),
            repeated=repeated,
            inputs=tuple(inputs),
        )

    def _outside(self, role: str, source: Any) -> Node:
        """A path or Hub model: the recipe's name for it where the run knows it."""
        text = plain(source)
        name = next((name for known, name in self.wiring.outside.items() if _bare(known) == _bare(text)), "")
        return Node(role, "", "", "from outside", text, "", name, False, ())

    def _source(self, identifier: str, kind: str) -> str:
        """Where the rows of a dataset came from, by its own word."""
        content = self.reader.json(artifact_of({"kind": kind, "id": identifier}), "dataset.json", "lineage")
        source = content.get("source")
        settings = self.wiring.settings.get(self.wiring.producers.get(identifier, ""), {}).get("with") or {}
        # the manifest names content; the recipe says where it was found
        return in_words([settings.get("source") or "", "" if source is None else source])


def _bare(identifier: str) -> str:
    return identifier.removeprefix("sha256:")
