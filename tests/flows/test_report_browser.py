"""The report in a real browser: its script runs, nothing complains, and nothing else may run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flows.report import render_report
from flows.reporting.charts import PLOT
from flows.reporting.samples import MAX_CARDS
from tests.flows.report_run import SmallRun, jsonl, small_run, small_stage
from tests.waiting import LIMIT_SECONDS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("CI") != "true", reason="no chromium is installed (apt-get install chromium)"
)


@pytest.fixture(autouse=True)
def _small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.reporting.sections.load_stage", small_stage)


def opened(page: Path, *flags: str, hash: str = "") -> tuple[str, list[str]]:
    """The page's DOM after its script ran, and what the browser's console said."""
    assert CHROMIUM is not None, "CI=true asks for chromium"
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [CHROMIUM, *quiet, profile, "--enable-logging=stderr", *flags, f"{page.as_uri()}{hash}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True)
    return done.stdout, re.findall(r"CONSOLE[:(].*", done.stderr)


def many_samples(folder: Path) -> SmallRun:
    run = small_run(folder)
    rows = [
        {"row_id": f"m-{index}", "prompt": "p", "completion": str(index), "correct": index % 3 == 0}
        for index in range(MAX_CARDS + 50)
    ]
    files = {"results.json": "{}", "samples.jsonl": jsonl(rows)}
    run.stage("many_eval", "evaluate", {"model": "sft"}, {"evaluation": ("evaluation", files)})
    return run


def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    run, page = many_samples(tmp_path), tmp_path / "page.html"
    page.write_text(render_report(run.store, run.payload()), encoding="utf-8")
    dom, console = opened(page, "--dump-dom", hash="#stage-3")
    assert console == []
    assert '<html lang="en" data-ready="yes">' in dom
    assert "<title>small · run-1" in dom  # the attack in the samples sets another one
    for section in ("result", "graph", "curves", "data", "samples", "stages", "lineage", "recipe"):
        assert f'<section id="{section}"' in dom
    assert re.search(r'<details class="card stage" id="stage-3"[^>]* open=""', dom)  # opened by the link
    cards = re.findall(r'<article class="card sample" data-row="m-\d+"[^>]*>', dom)
    assert len(cards) == MAX_CARDS
    assert len([card for card in cards if "hidden" in card]) == MAX_CARDS - 20  # a page of 20 at a time


def test_the_page_is_not_blank(tmp_path: Path) -> None:
    run, empty = small_run(tmp_path), "<!doctype html><html><body></body></html>"
    sizes = {}
    for name, html in {"report": render_report(run.store, run.payload()), "empty": empty}.items():
        page, picture = tmp_path / f"{name}.html", tmp_path / f"{name}.png"
        page.write_text(html, encoding="utf-8")
        _, console = opened(page, f"--screenshot={picture}", "--window-size=1400,3000")
        assert console == []
        sizes[name] = picture.stat().st_size
    assert sizes["report"] > 5 * sizes["empty"]


def test_the_policy_stops_any_other_script(tmp_path: Path) -> None:
    run, page = small_run(tmp_path), tmp_path / "page.html"
    html = render_report(run.store, run.payload())
    page.write_text(html.replace("</main>", "<script>document.title = 'owned'</script></main>"), encoding="utf-8")
    dom, console = opened(page, "--dump-dom")
    assert "<title>small" in dom
    assert len(console) == 1 and "Content Security Policy" in console[0]


DRIVER = """
<script>
document.querySelector('[data-filter="changed"]').click();
const chart = document.querySelector('svg.chart[data-metric="loss"]');
const box = chart.getBoundingClientRect();
chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + STEP_4 * box.width, clientY: box.top + 20}));
</script>
"""


def test_pointing_shows_values_and_a_filter_chooses_cards(tmp_path: Path) -> None:
    run, page = small_run(tmp_path), tmp_path / "page.html"
    html = render_report(run.store, run.payload())
    # steps 1 to 12 lie between the plot's edges; a little off step 4 is still nearest to it
    step_4 = (PLOT["left"] + (4.2 - 1) / 11 * (PLOT["right"] - PLOT["left"])) / PLOT["width"]
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    page.write_text(html.replace("</body>", DRIVER.replace("STEP_4", str(step_4)) + "</body>"), encoding="utf-8")
    dom, console = opened(page, "--dump-dom", "--window-size=1400,3000")
    assert console == []
    assert re.search(r'<div id="tip"[^>]*>step 4\nsft: 0.5</div>', dom)  # the loss is 2 / step
    assert dom.count('<circle class="cursor c0"') == 1
    cards = re.findall(r'<article class="card sample" data-row="(r-\d)"[^>]*?( hidden="")?>', dom)
    assert [row for row, hidden in cards if not hidden] == ["r-3"]
