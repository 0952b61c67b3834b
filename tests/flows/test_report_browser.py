"""The report in a real browser: its script runs, nothing complains, and nothing else may run."""

from __future__ import annotations

import json
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
    monkeypatch.setattr("flows.reporting.declared.load_stage", small_stage)


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
    assert len([card for card in cards if "hidden" in card]) == MAX_CARDS - 6  # a page of 6 at first


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


SEEN = """
// every text with its contrast to what is behind it (WCAG 2.2, 1.4.3), of what can be seen
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const luminance = (colour) => {
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = numbers(colour).map((v) => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (numbers(colour)[3] !== 0) return colour;
  }
};
const pale = () => [...document.querySelectorAll("body *")].filter((e) => {
  if (!e.getClientRects().length || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) return false;
  if (e.ownerSVGElement || ["SCRIPT", "STYLE"].includes(e.tagName)) return false;
  const [a, b] = [luminance(getComputedStyle(e).color), luminance(behind(e))].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05) < 4.5;
}).map((e) => `${e.tagName}.${e.className}: ${e.textContent.slice(0, 40)}`);
const cut = () => [...document.querySelectorAll("body *")].filter((e) => {
  if (e.getBoundingClientRect().right <= WIDTH + 1) return false;
  for (let p = e; p; p = p.parentElement) if (getComputedStyle(p).overflowX !== "visible") return false;
  return true;
}).map((e) => `${e.tagName}.${e.className}`);
"""
"""JavaScript: texts that are too pale, and elements that reach over the side of the page."""

DRIVER = """
<script>
SEEN
document.querySelectorAll("details").forEach((e) => { e.open = true; });
document.documentElement.style.width = "WIDTHpx"; // a window is of 500 at least, which has a telephone's style
const seen = { pale: pale(), cut: cut() };
const topsOf = (row) => [...row.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().top);
seen.tops = [...document.querySelectorAll(".kind .panels")].map(topsOf);
document.querySelector('[data-filter="changed"]').click();
const chart = document.querySelector('svg.chart[data-metric="loss"]');
const box = chart.getBoundingClientRect();
chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + STEP_4 * box.width, clientY: box.top + 20}));
const tip = document.getElementById("tip");
seen.pointed = tip.textContent;
seen.dots = chart.querySelectorAll("circle.cursor.c0").length;
const press = (key) => chart.dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true}));
const pressed = (key) => (press(key), tip.textContent.split("\\n")[0]);
seen.keys = ["ArrowRight", "End", "ArrowRight", "Home", "ArrowLeft"].map(pressed);
press("Escape");
seen.hidden = tip.hidden;
const told = document.createElement("pre"); told.id = "seen"; told.textContent = JSON.stringify(seen);
document.body.append(told);
</script>
"""


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (375, True)])
def test_what_is_on_the_screen(tmp_path: Path, width: int, dark: bool) -> None:
    """Pointing and keys show values, a filter chooses cards, every text is readable, and nothing is cut off."""
    run, page = small_run(tmp_path), tmp_path / "page.html"
    html = render_report(run.store, run.payload())
    # steps 1 to 12 lie between the plot's edges; a little off step 4 is still nearest to it
    step_4 = (PLOT["left"] + (4.2 - 1) / 11 * (PLOT["right"] - PLOT["left"])) / PLOT["width"]
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    driver = DRIVER.replace("SEEN", SEEN).replace("WIDTH", str(width)).replace("STEP_4", str(step_4))
    page.write_text(html.replace("</body>", driver + "</body>"), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dom, console = opened(page, "--dump-dom", f"--window-size={width},3000", scheme)
    assert console == []
    seen = json.loads(re.findall(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)[0])
    assert seen["pale"] == [] and seen["cut"] == []
    assert seen["pointed"] == "step 4\nsft: 0.5" and seen["dots"] == 1  # the loss is 2 / step
    assert seen["keys"] == ["step 5", "step 12", "step 12", "step 1", "step 1"] and seen["hidden"]
    assert all(len(set(tops)) == 1 for tops in seen["tops"])  # three charts stand level in a row, without a hole
    cards = re.findall(r'<article class="card sample" data-row="(r-\d)"[^>]*?( hidden="")?>', dom)
    assert [row for row, hidden in cards if not hidden] == ["r-3"]
