"""The boxes of the graph: a stage with what it is, how long it took, and what came out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.closing import main_name
from flows.reporting.text import duration, number, short
from flows.reporting.wiring import Wiring
from stages.stage import STAGES

BOX_WIDTH, BOX_HEIGHT = 176, 60
BOX = {"width": BOX_WIDTH, "height": BOX_HEIGHT}
OUTSIDE = "outside "
"""Before the names of nodes that are no stage of the run; a stage's name holds no space."""
CHARACTERS = 24
"""Of a caption in a box."""


@dataclass(frozen=True)
class Box:
    """A stage, or something from outside the run (`state` is `external`, no link)."""

    name: str
    caption: str
    measure: str
    """What stands for it, with its value."""
    state: str
    alarms: int
    x: float
    y: float
    hover: str
    anchor: str | None


def box_of(
    name: str,
    run: Mapping[str, Any],
    wiring: Wiring,
    anchors: Mapping[str, str],
    alarms: Mapping[str, int],
    place: tuple[float, float],
) -> Box:
    """A stage or something from outside, its middle and top at `place`."""
    left, top = place[0] - BOX_WIDTH / 2, place[1]
    if name not in wiring.wires:
        label = name.removeprefix(OUTSIDE)
        hover = f"{label}\nread from outside this run"
        return Box(label, "from outside", "", "external", 0, left, top, hover, None)
    entry = run["stages"][name]
    lines = [f"{name} ({entry['uses']}): {entry['state']}, {duration(entry.get('seconds'))}"]
    if entry.get("reason"):
        lines.append(str(entry["reason"]))
    if entry.get("fingerprint"):
        lines.append(f"fingerprint {short(str(entry['fingerprint']))}")
    lines += [
        f"{output}: {value['kind']} {short(str(value['id']))}" for output, value in (entry.get("outputs") or {}).items()
    ]
    time = "" if entry["state"] in ("cached", "skipped", "waiting") else f" · {duration(entry.get('seconds'))}"
    measured, state, anchor = _measure(entry), str(entry["state"]), anchors[name]
    hover = "\n".join(lines)
    return Box(name, f"{entry['uses']}{time}", measured, state, alarms.get(name, 0), left, top, hover, anchor)


def _measure(entry: Mapping[str, Any]) -> str:
    """Of a long name the last part, or what there is room for."""
    metrics = entry.get("metrics") or {}
    name = main_name(entry) if metrics and entry["uses"] in STAGES else None
    if name is None:
        return ""
    value = number(metrics[name])
    room = CHARACTERS - len(value) - 1
    return f"{name if len(name) <= room else name[: room - 1] + '…'} {value}"
