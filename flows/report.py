"""`posttrain report`: one run as one self-contained HTML page that needs no network and no server.

Its Content-Security-Policy allows nothing but the page's own style and script, which are named by hash; whatever
comes from data or models is text (Jinja2 escapes it).
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from artifacts import RequestError, Store, scrub
from artifacts.sealed import SHORTEST_SECRET
from flows.cost_table import cost_rows
from flows.costs import run_bill
from flows.reporting import text
from flows.reporting.charts import PLOT
from flows.reporting.contamination import read_contamination
from flows.reporting.curves import read_curves
from flows.reporting.graph import BOX, draw
from flows.reporting.headline import BARS, read_headline
from flows.reporting.ledgers import read_ledgers
from flows.reporting.lineage import read_lineage
from flows.reporting.reading import Reader
from flows.reporting.samples import read_samples
from flows.reporting.sections import read_sections
from flows.reporting.wiring import in_order, read_wiring
from stages.visible import visible


def place_of(given: str | None, run_id: str) -> Path | None:
    """The file that `-o` means: RUN.html, here or in the folder that is given; None: stdout."""
    if given == "-":
        return None
    if given is None or given.endswith(os.sep) or Path(given).is_dir():
        return Path(given or "") / f"{run_id}.html"
    return Path(given)


def write_report(store: Store, run_id: str, output: Path) -> None:
    """Writes the page of a run to `output`, whole or not at all.

    Raises RequestError for an unknown run or an output that cannot be written. Artifacts that are missing or
    damaged do not stop it: their sections say so.
    """
    page = render_report(store, store.read_run(run_id))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(page)
            os.chmod(temporary, 0o644)
            os.replace(temporary, output)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise RequestError(f"the report cannot be written to {output}: {error.strerror}") from error


def render_report(store: Store, run_payload: Mapping[str, Any]) -> str:
    """The page of a run (`store.read_run`) as HTML."""
    run = in_order(run_payload)
    wiring = read_wiring(run)
    anchors = {name: f"stage-{index}" for index, name in enumerate(run["stages"], start=1)}
    headline = read_headline(run, wiring, Reader(store))
    comparisons, comparison_notes = read_contamination(run, Reader(store))
    style, script = _asset("style.css"), _asset("script.js")
    template = _environment().get_template("page.html.j2")
    return template.render(
        run=run,
        wiring=wiring,
        anchors=anchors,
        tally=Counter(str(entry["state"]) for entry in run["stages"].values()),
        headline=headline,
        drawing=draw(run, wiring, anchors),
        sections=read_sections(run, wiring, anchors, Reader(store)),
        curves=read_curves(run, Reader(store)),
        ledgers=read_ledgers(run, Reader(store)),
        costs=cost_rows(run_bill(run)),
        comparisons=comparisons,
        comparison_notes=comparison_notes,
        samples=read_samples(run, wiring, Reader(store)),
        lineage=read_lineage(run, wiring, headline.measurements, Reader(store)),
        box=BOX,
        plot=PLOT,
        bars=BARS,
        style=style,
        script=script,
        policy=_policy(style, script),
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("flows", "report_assets"),
        autoescape=True,
        finalize=_as_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=text.number, duration=text.duration, short=text.short)
    return environment


def _as_shown(value: Any) -> Any:
    """Every text that the page shows, before it is escaped; Markup is what templates made of such texts.

    Shorter ones hold neither a secret nor a URL with a password.
    """
    if type(value) is not str:
        return value
    return visible(scrub(value) if len(value) >= SHORTEST_SECRET else value)


def _asset(name: str) -> str:
    return resources.files("flows").joinpath("report_assets", name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Only this style and this script; no connection, image, frame, form or base address."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
