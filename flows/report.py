"""`posttrain report`: one run as one self-contained HTML page (`flows.reporting.page`)."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifacts import Store
from artifacts.opening import default_store
from flows.cost_table import cost_rows
from flows.costs import run_bill
from flows.reporting import page
from flows.reporting.boxes import BOX
from flows.reporting.charts import PLOT
from flows.reporting.contamination import read_contamination
from flows.reporting.curves import read_curves
from flows.reporting.graph import draw
from flows.reporting.headline import BARS, read_headline
from flows.reporting.ledgers import read_ledgers
from flows.reporting.lineage import read_lineage
from flows.reporting.outcome import read_outcome
from flows.reporting.reading import Reader
from flows.reporting.samples import read_samples
from flows.reporting.scoreboard import read_scoreboard
from flows.reporting.sections import read_sections
from flows.reporting.wiring import in_order, read_wiring, without_handed_on


def place_of(given: str | None, name: str) -> Path | None:
    """The file that `-o` means: NAME.html, here or in the folder that is given; None: stdout."""
    if given == "-":
        return None
    if given is None or given.endswith(os.sep) or Path(given).is_dir():
        return Path(given or "") / f"{name}.html"
    return Path(given)


def write_report(store: Store, run_id: str, output: Path) -> None:
    """Writes the page of a run to `output`, whole or not at all.

    Raises RequestError for an unknown run or an output that cannot be written. Artifacts that are missing or
    damaged do not stop it: their sections say so.
    """
    page.write(rendered_run(store, run_id), output)


def rendered_run(store: Store, run_id: str) -> str:
    """The page of a run as HTML. Raises RequestError for an unknown run."""
    return render_report(store, store.read_run(run_id))


def render_report(store: Store, run_payload: Mapping[str, Any]) -> str:
    """The page of a run (`store.read_run`) as HTML."""
    run = in_order(run_payload)
    wiring = read_wiring(run)
    anchors = {name: f"stage-{index}" for index, name in enumerate(run["stages"], start=1)}
    made = without_handed_on(run, wiring)
    headline = read_headline(made, wiring, Reader(store))
    curves = read_curves(made, Reader(store))
    comparisons, comparison_notes = read_contamination(run, Reader(store))
    return page.render(
        "page.html.j2",
        run=run,
        wiring=wiring,
        anchors=anchors,
        tally=Counter(str(entry["state"]) for entry in run["stages"].values()),
        headline=headline,
        outcome=read_outcome(run),
        board=read_scoreboard(made, wiring, headline.measurements, store),
        store_option="" if store.url == default_store() else f" --store {shlex.quote(store.url)}",
        drawing=draw(run, wiring, anchors, Counter(stage for stage, _ in curves.notices)),
        sections=read_sections(run, wiring, anchors, Reader(store)),
        curves=curves,
        ledgers=read_ledgers(made, Reader(store)),
        costs=cost_rows(run_bill(run)),
        comparisons=comparisons,
        comparison_notes=comparison_notes,
        samples=read_samples(made, wiring, Reader(store)),
        lineage=read_lineage(run, wiring, headline.measurements, Reader(store)),
        box=BOX,
        plot=PLOT,
        bars=BARS,
    )
