"""The recipe as a layered drawing: every stage below what it reads, few crossings, curves between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flows.reporting.boxes import BOX_HEIGHT, OUTSIDE, Box, box_of
from flows.reporting.wiring import Wire, Wiring

LAYER, PLACE = 96, 194
"""From one layer down to the next, and the width that a box takes in its layer."""
MARGIN = 12
BEND_WIDTH = 22
"""Width that an arrow takes in a layer that it passes."""
BEND = "bend "
"""Before the names of places that an arrow passes; a stage's name holds no space."""


@dataclass(frozen=True)
class Drawing:
    """Sizes and coordinates in SVG units. `edges` are (source, target, path data)."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    edges: tuple[tuple[str, str, str], ...]


def draw(
    run: Mapping[str, Any], wiring: Wiring, anchors: Mapping[str, str], alarms: Mapping[str, int] | None = None
) -> Drawing:
    """The graph of a run's stages and of what they read from outside. `alarms`: how many a stage has."""
    parents = _parents(wiring)
    depths = _depths(parents)
    chains = _chains(parents, depths)
    layers = _ordered(chains, depths)
    x, y, width = _coordinates(layers, chains)
    boxes = tuple(box_of(name, run, wiring, anchors, alarms or {}, (x[name], y[name])) for name in parents)
    edges = tuple(
        (chain[0].removeprefix(OUTSIDE), chain[-1], _path([(x[node], y[node]) for node in chain])) for chain in chains
    )
    return Drawing(width, 2 * MARGIN + LAYER * (len(layers) - 1) + BOX_HEIGHT, boxes, edges)


def _node(wire: Wire) -> str:
    return wire.source or f"{OUTSIDE}{wire.label}"


def _parents(wiring: Wiring) -> dict[str, list[str]]:
    """Node -> the nodes it reads from, each once."""
    parents: dict[str, list[str]] = {}
    for stage, wires in wiring.wires.items():
        sources = [_node(wire) for wire in wires]
        for source in sources:
            if source not in wiring.wires:
                parents.setdefault(source, [])
        parents[stage] = list(dict.fromkeys(source for source in sources if source != stage))
    return parents


def _depths(parents: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The longest path from a source; a cycle (a run cannot have one) is cut where it closes."""
    depths: dict[str, int] = {}

    def visit(node: str, above: frozenset[str]) -> int:
        if node not in depths:
            inner = above | {node}
            depths[node] = max((visit(p, inner) + 1 for p in parents[node] if p not in inner), default=0)
        return depths[node]

    for node in parents:
        visit(node, frozenset())
    readers: dict[str, list[str]] = {}
    for node, sources in parents.items():
        for source in sources:
            readers.setdefault(source, []).append(node)
    for node in parents:  # a source stands just above its first reader, not at the very top
        if not parents[node] and node in readers:
            depths[node] = max(0, min(depths[reader] for reader in readers[node]) - 1)
    return depths


def _chains(parents: Mapping[str, Sequence[str]], depths: dict[str, int]) -> list[list[str]]:
    """Each edge as source, one bend per layer in between (added to `depths`), target.

    The arrows of one source share their bends, so that they run as one line until they part.
    """
    chains = []
    for target, sources in parents.items():
        for source in sources:
            between = range(depths[source] + 1, depths[target])
            bends = {f"{BEND}{depth} {source}": depth for depth in between}
            depths.update(bends)
            chains.append([source, *bends, target])
    return chains


def _ordered(chains: Sequence[Sequence[str]], depths: Mapping[str, int]) -> list[list[str]]:
    """The nodes of every layer, left to right: barycenter sweeps down and up."""
    layers: list[list[str]] = [[] for _ in range(max(depths.values(), default=-1) + 1)]
    for node, depth in depths.items():
        layers[depth].append(node)
    above, below = _neighbours(chains, depths)
    for sweep in range(8):
        down = sweep % 2 == 0
        neighbours = above if down else below
        for layer in layers if down else reversed(layers):
            place = {node: (i + 0.5) / len(other) for other in layers for i, node in enumerate(other)}
            middle = {node: _mean([place[near] for near in neighbours[node]] or [place[node]]) for node in layer}
            layer.sort(key=middle.__getitem__)
    return layers


def _neighbours(
    chains: Sequence[Sequence[str]], nodes: Iterable[str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What is linked to each node in the layer above it, and in the layer below."""
    above: dict[str, list[str]] = {node: [] for node in nodes}
    below: dict[str, list[str]] = {node: [] for node in above}
    for link in dict.fromkeys(pair for chain in chains for pair in pairwise(chain)):
        below[link[0]].append(link[1])
        above[link[1]].append(link[0])
    return above, below


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _coordinates(
    layers: Sequence[Sequence[str]], chains: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, float], float]:
    """Middle and top of every node, and the drawing's width.

    Nodes start centred in their layer, then move towards their neighbours as far as the order leaves room.
    """
    nodes = [node for layer in layers for node in layer]
    above, below = _neighbours(chains, nodes)
    x: dict[str, float] = {}
    for layer in layers:
        left = -sum(_room(node) for node in layer) / 2
        for node in layer:
            x[node] = left + _room(node) / 2
            left += _room(node)
    for _ in range(12):
        for layer in layers:
            wanted = [_mean([x[near] for near in above[node] + below[node]] or [x[node]]) for node in layer]
            x.update(zip(layer, _spaced(layer, wanted), strict=True))
    shift = MARGIN - min((x[node] - _room(node) / 2 for node in nodes), default=0.0)
    x = {node: value + shift for node, value in x.items()}
    y = {node: float(MARGIN + LAYER * depth) for depth, layer in enumerate(layers) for node in layer}
    return x, y, MARGIN + max((x[node] + _room(node) / 2 for node in nodes), default=0.0)


def _spaced(layer: Sequence[str], wanted: Sequence[float]) -> list[float]:
    """Places nearest to the wanted ones (least squares) that keep the order and everybody's room.

    Subtracting the room before a node leaves "not decreasing" as the only condition: isotonic regression.
    """
    before = [0.0]
    for left, right in pairwise(layer):
        before.append(before[-1] + (_room(left) + _room(right)) / 2)
    blocks: list[tuple[float, int]] = []
    for place, offset in zip(wanted, before, strict=True):
        total, count = place - offset, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            total, count = total + blocks[-1][0], count + blocks[-1][1]
            blocks.pop()
        blocks.append((total, count))
    flat = [total / count for total, count in blocks for _ in range(count)]
    return [place + offset for place, offset in zip(flat, before, strict=True)]


def _room(node: str) -> float:
    return BEND_WIDTH if node.startswith(BEND) else PLACE


def _path(points: Sequence[tuple[float, float]]) -> str:
    """A curve from the bottom of the first box, along the bends, to the top of the last."""
    x, y = points[0][0], points[0][1] + BOX_HEIGHT
    parts = [f"M{x:.1f} {y:.1f}"]
    for index, (middle, top) in enumerate(points[1:], start=1):
        half = (y + top) / 2
        parts.append(f"C{x:.1f} {half:.1f} {middle:.1f} {half:.1f} {middle:.1f} {top:.1f}")
        x, y = middle, top
        if index < len(points) - 1:
            y += BOX_HEIGHT
            parts.append(f"V{y:.1f}")
    return "".join(parts)
