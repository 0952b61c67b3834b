"""The page of a sweep in a real browser: where things are on the screen, what pointing says, light and dark."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.flows.test_report_browser import opened, pytestmark  # noqa: F401  (skipped where there is no browser)
from tests.flows.test_sweep_report import ACCURACY, BETAS, OPTIMIZERS, grid, rendered

DRIVER = """
<script>
const box = (element) => { const {left, right, top, bottom} = element.getBoundingClientRect();
  return [left, right, top, bottom]; };
const all = (query) => [...document.querySelectorAll(query)];
const colour = (query) => getComputedStyle(document.querySelector(query));
const seen = {
  plots: Object.fromEntries(all("svg.setting").map((svg) => [svg.dataset.setting, {svg: box(svg),
    dots: Object.fromEntries([...svg.querySelectorAll(".trial")].map((trial) =>
      [trial.dataset.trial, box(trial.querySelector(".spot"))]))}])),
  cells: all("svg.heat .cell").map((cell) => [cell.dataset.trial, ...box(cell.querySelector("rect"))]),
  widths: all(".trials svg[data-metric=loss] .line path").map((path) =>
    [path.parentNode.dataset.run, parseFloat(getComputedStyle(path).strokeWidth)]),
  page: colour("body").backgroundColor, ink: colour("body").color, text: colour("svg.heat text").fill,
  wide: document.documentElement.scrollWidth <= innerWidth,
};
const chart = document.querySelector(".trials svg[data-metric=loss]");
const [left, right, top_] = box(chart);
chart.dispatchEvent(new PointerEvent("pointermove", {clientX: (left + right) / 2, clientY: top_ + 30}));
seen.tip = document.getElementById("tip").textContent;
const told = document.createElement("pre"); told.id = "seen"; told.textContent = JSON.stringify(seen);
document.body.append(told);
</script>
"""


def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(rendered(grid(tmp_path)), encoding="utf-8")
    dom, console = opened(page, "--dump-dom", hash="#trial-4")
    assert console == []
    assert '<html lang="en" data-ready="yes">' in dom and "<title>mine · small" in dom
    assert re.search(r'<details class="card stage" id="trial-4"[^>]* open=""', dom)


@pytest.mark.parametrize("dark", [False, True])
def test_what_is_on_the_screen(tmp_path: Path, dark: bool) -> None:
    page = tmp_path / "page.html"
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", rendered(grid(tmp_path)))
    page.write_text(html.replace("</body>", f"{DRIVER}</body>"), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dom, console = opened(page, "--dump-dom", "--window-size=1300,2400", scheme)
    assert console == []
    seen = json.loads(re.findall(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)[0])
    combinations = {str(number): key for number, key in enumerate(((b, o) for b in BETAS for o in OPTIMIZERS), 1)}

    assert set(seen["plots"]) == {"dpo.beta", "dpo.optim"}
    for plot in seen["plots"].values():
        left, right, top, bottom = plot["svg"]
        middles = {trial: ((a + b) / 2, (c + d) / 2) for trial, (a, b, c, d) in plot["dots"].items()}
        assert all(left < x < right and top < y < bottom for x, y in middles.values())
        # higher on the screen, better
        assert sorted(middles, key=lambda trial: middles[trial][1]) == sorted(
            middles, key=lambda trial: -ACCURACY[combinations[trial]]
        )
    columns = [x for _, x, *_ in seen["cells"][:3]]
    assert columns == sorted(columns) and len({top for *_, top, _ in seen["cells"]}) == len(OPTIMIZERS)
    assert [trial for trial, *_ in seen["cells"]] == ["1", "3", "5", "2", "4", "6"]

    widths = dict(seen["widths"])
    assert widths.pop("trial 3") > 2 * max(widths.values()) and seen["widths"][-1][0] == "trial 3"  # drawn over them
    # in the middle of steps 1 to 6; losses are trial / step, the best trial first
    assert seen["tip"].split("\n") == ["step 3", *(f"trial {t}: {float(f'{t / 3:.5g}'):g}" for t in (3, 4, 5, 2, 1))]
    assert seen["wide"]
    light = [sum(map(int, re.findall(r"\d+", seen[name])[:3])) for name in ("page", "ink", "text")]
    assert (light[0] < 150 < 500 < light[1]) == dark and (light[0] > 600 > 150 > light[1]) != dark
    assert (light[2] > 500) == dark
