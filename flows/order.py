"""The order of a recipe's stages, and the circles that leave some without one."""

from __future__ import annotations

from collections.abc import Mapping


def ordered(needs: Mapping[str, set[str]]) -> tuple[list[str], list[list[str]]]:
    """(names, each after those that it needs, else as given; circles). `needs`: stage -> those that it reads from.

    The circles are disjoint, `[a, b]`: b reads from a, and a from b; each begins with the stage given first. What is in
    one, or reads from one, comes last.
    """
    order: list[str] = []
    while ready := [name for name in needs if name not in order and needs[name] <= set(order)]:
        order.append(ready[0])
    left = [name for name in needs if name not in order]
    return order + left, _cycles({name: needs[name] for name in left})


def _cycles(needs: Mapping[str, set[str]]) -> list[list[str]]:
    cycles: list[list[str]] = []
    done: set[str] = set()
    for start in needs:
        path: list[str] = []
        name: str | None = start
        while name is not None and name not in done and name not in path:
            path.append(name)
            name = next((source for source in needs if source in needs[path[-1]] and source not in done), None)
        if name in path:
            circle = path[path.index(name) :][::-1]  # found against the flow of data
            first = min(range(len(circle)), key=lambda index: list(needs).index(circle[index]))
            cycles.append(circle[first:] + circle[:first])
        done.update(path)
    return cycles
