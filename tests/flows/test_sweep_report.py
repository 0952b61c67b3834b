"""The page of a sweep: what stands on it and where it is drawn is what its runs' records and models hold."""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from artifacts.errors import RequestError
from flows import cli
from flows.many_runs import compare_many, sweep_named
from flows.standings import Measured, Row, Standings
from flows.standings_table import StandingsTable
from flows.sweep_report import render_sweep_report, write_sweep_report
from stages.training.metrics_log import METRICS
from tests.flows.report_run import ATTACK, jsonl
from tests.flows.sweep_runs import STEPS, SmallSweep, interval
from tests.flows.test_report import Page, series_of

BETAS = (0.01, 0.1, 1.0)
OPTIMIZERS = ("adamw", "muon")
ACCURACY = {
    (0.01, "adamw"): 0.5,
    (0.01, "muon"): 0.52,
    (0.1, "adamw"): 0.71,
    (0.1, "muon"): 0.68,
    (1.0, "adamw"): 0.6,
}
ERROR = f"row 17 of pairs.jsonl: rejected is empty, found {ATTACK}"
HALF = 0.05


def losses(trial: int) -> list[float]:
    return [trial / step for step in range(1, 7)]


def grid(folder: Path) -> SmallSweep:
    """Trials 1 to 6, the last of which failed; three of them in the order of the values' last setting."""
    made = SmallSweep(folder, of=6)
    for beta in BETAS:
        for optimizer in OPTIMIZERS:
            settings = {"dpo.beta": beta, "dpo.optim": optimizer}
            if (beta, optimizer) in ACCURACY:
                made.trial(settings, interval(ACCURACY[beta, optimizer], HALF), losses(len(made.runs) + 1))
            else:
                made.trial(settings, {}, [], state="failed", error=ERROR)
    return made


def rendered(sweep: SmallSweep) -> str:
    named = sweep_named(sweep.store, "mine")
    assert named is not None
    return render_sweep_report(sweep.store, named)


@pytest.fixture
def html(tmp_path: Path) -> str:
    return rendered(grid(tmp_path))


def rows_of(html: str) -> list[list[str]]:
    """The cells of the table of trials."""
    body = html.split('<table class="trials">')[1].split("<tbody>")[1].split("</tbody>")[0]
    return [
        [" ".join(re.sub("<[^>]*>", "", cell).split()) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    ]


def drawn(html: str, setting: str) -> Iterator[tuple[dict[str, str], dict[str, str], list[dict[str, str]]]]:
    """Of one plot: each trial with its dot and its paths."""
    svg = html.split(f'data-setting="{setting}"')[1].split("</svg>")[0]
    for part in svg.split('<g class="trial"')[1:]:
        elements = Page(f'<g class="trial"{part}').elements
        (dot,) = [found for tag, found in elements if tag == "circle" and found["class"] == "spot"]
        yield elements[0][1], dot, [found for tag, found in elements if tag == "path"]


def metric_axis(html: str, setting: str) -> tuple[float, float]:
    """(factor, offset): metric = factor * y + offset, by the ticks of the plot."""
    svg = html.split(f'data-setting="{setting}"')[1].split("</svg>")[0]
    found = re.findall(r'<text class="tick" x="48" y="([\d.]+)" text-anchor="end">([\d.]+)</text>', svg)
    (y0, low), (y1, high) = ((float(y) - 3.5, float(label)) for y, label in (found[0], found[-1]))
    factor = (high - low) / (y1 - y0)
    return factor, low - factor * y0


def test_the_table_is_the_standings(html: str) -> None:
    rows = rows_of(html)
    best_first = sorted(ACCURACY.items(), key=lambda item: -item[1])
    assert [row[2:4] for row in rows[:-1]] == [[str(beta), optimizer] for (beta, optimizer), _ in best_first]
    assert [row[4] for row in rows[:-1]] == [
        f"{value:.4g} [{value - HALF:.4g}, {value + HALF:.4g}]" for _, value in best_first
    ]
    assert rows[0][:2] == ["1", "trial 3"] and rows[0][5:] == ["10 s", "0 of 4", "✓ ok"]
    assert rows[-1] == ["6", "trial 6", "1.0", "muon", "–", "10 s", "0 of 3", "✕ failed"]


def test_run_ids_stay_whole_in_a_narrow_terminal(tmp_path: Path) -> None:
    sweep = grid(tmp_path)
    named = sweep_named(sweep.store, "mine")
    assert named is not None
    found = compare_many(sweep.store, named)
    rows = tuple(replace(row, run=f"20261129-134045-a4b5b{row.trial}") for row in found.rows)
    shown = {}
    for width, most in ((80, None), (300, None), (80, 5)):
        text = io.StringIO()
        Console(file=text, width=width).print(StandingsTable(replace(found, rows=rows), "mine", most))
        shown[width, most] = text.getvalue()
    for trial in range(1, 7):
        for width in (80, 300):
            assert f" 20261129-134045-a4b5b{trial} " in shown[width, None]
    assert "[0.66, 0.76]" in shown[80, None]  # below its number, in one piece
    assert "cached" in shown[300, None] and "cached" not in shown[80, None]
    assert "20261129" not in shown[80, 5] and "and 1 more" in shown[80, 5]  # while others are to come


@pytest.mark.parametrize("width", [40, 60, 80, 100])
@pytest.mark.parametrize("settings", [2, 4, 6])
def test_a_narrow_terminal_has_every_value_whole(width: int, settings: int) -> None:
    names = tuple(f"dpo.setting_number_{index}" for index in range(settings))
    of = {name: float(f"{index + 1}e-5") for index, name in enumerate(names)}
    metrics = {"judge.accuracy": Measured(0.7125, 0.6612, 0.7638)}
    ids = [f"20261129-134045-a4b5b{trial}" for trial in (1, 2)]
    rows = (
        Row("ok", of, metrics, 1, ids[0], 75.0, 1, 4),
        Row("interrupted", of, {}, 2, ids[1], 75.0, 1, 4, error="dpo: stopped because the run ended"),
    )
    text = io.StringIO()
    Console(file=text, width=width).print(StandingsTable(Standings(names, tuple(metrics), rows, "highest"), "mine"))
    shown = text.getvalue()
    words = re.split(r"[\s=,]+", shown)
    for value in (*ids, "ok", "interrupted", "0.7125", *(f"{index + 1}e-5" for index in range(settings))):
        assert value in words, shown
    assert "[0.6612, 0.7638]" in shown.replace("\n", " ") or width == 40
    assert "dpo: stopped because the run ended" in " ".join(shown.split())
    assert all(len(line.rstrip()) <= width for line in shown.splitlines())
    assert not re.search(r"^ *\S( {2,}\S)* *$", shown, re.MULTILINE), shown  # a column of single letters


def test_the_first_words_say_which_is_best_and_what_may_be_as_good(html: str) -> None:
    """0.71 less 0.05 is 0.66, which 0.68 and its 0.05 reach, and 0.6 does not."""
    text = Page(html).text
    assert "Best: trial 3 , dpo.beta 0.1 , dpo.optim adamw ; judge.accuracy 0.71 [0.66, 0.76]" in text
    assert "5 of 6 trials have ended well. Failed: trial 6 ." in text
    assert (
        "interval of 1 more reaches into that of the best, so these rows may not tell the two apart: trial 4 ." in text
    )
    assert "posttrain run small --set trial=3" in text[: text.index("place trial")]


def test_trials_with_the_same_number_are_as_good(tmp_path: Path) -> None:
    """Also where no interval says so."""
    made = SmallSweep(tmp_path, of=4)
    for beta, accuracy in ((0.01, 0.5), (0.1, 0.7), (1.0, 0.7)):
        made.trial({"dpo.beta": beta}, {"accuracy": accuracy}, [1.0])
    made.trial({"dpo.beta": 2.0}, {}, [], state="failed", error=ERROR)
    text = Page(rendered(made)).text
    assert "Best: trial 2 , dpo.beta 0.1 ; judge.accuracy 0.7 . The same has trial 3 ." in text
    assert "The 95 % interval" not in text


def test_a_sentence_after_the_failed_ones_has_a_blank_before_it(html: str) -> None:
    assert re.search(r"trial 6</a>\.\s+The 95 % interval", html)


def test_a_numeric_setting_is_drawn_to_its_logarithm_with_intervals(html: str) -> None:
    assert '<svg class="setting"' in html and 'data-setting="dpo.beta" data-scale="log"' in html
    factor, offset = metric_axis(html, "dpo.beta")
    places: dict[tuple[float, str], float] = {}
    for trial, dot, (whisker, *_) in drawn(html, "dpo.beta"):
        number = int(trial["data-trial"])
        beta, optimizer = [(beta, name) for beta in BETAS for name in OPTIMIZERS][number - 1]
        accuracy = ACCURACY[beta, optimizer]
        assert float(trial["data-value"]) == accuracy
        assert factor * float(dot["cy"]) + offset == pytest.approx(accuracy, abs=0.003)
        low, high = re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)M", whisker["d"]).groups()  # type: ignore[union-attr]
        assert factor * float(low) + offset == pytest.approx(accuracy - HALF, abs=0.003)
        assert factor * float(high) + offset == pytest.approx(accuracy + HALF, abs=0.003)
        places[beta, optimizer] = float(dot["cx"])
    assert set(places) == set(ACCURACY)
    # of each optimizer the three betas are a decade apart, and the two stand beside each other
    adamw = [places[beta, "adamw"] for beta in BETAS]
    assert adamw[1] - adamw[0] == pytest.approx(adamw[2] - adamw[1], abs=0.2)
    assert adamw[1] - adamw[0] > 50 and places[0.1, "muon"] - adamw[1] == pytest.approx(6.0, abs=0.2)


def test_categories_are_in_the_order_given_and_the_best_has_a_ring(html: str) -> None:
    assert 'data-setting="dpo.optim" data-scale="in order"' in html
    places: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for trial, dot, _ in drawn(html, "dpo.optim"):
        places[OPTIMIZERS[(int(trial["data-trial"]) - 1) % 2]].append(float(dot["cx"]))
    assert max(places["adamw"]) < min(places["muon"])
    for setting in ("dpo.beta", "dpo.optim"):
        svg = html.split(f'data-setting="{setting}"')[1].split("</svg>")[0]
        (best,) = [part for part in svg.split('<g class="trial"')[1:] if 'class="ring"' in part]
        assert 'data-trial="3"' in best and "judge.accuracy 0.71 [0.66, 0.76] (the best)</title>" in best


def test_the_heat_map(html: str) -> None:
    svg = html.split('<svg class="heat"')[1].split("</svg>")[0]
    cells = svg.split('<g class="cell')[1:]
    texts = [re.findall(r"<text[^>]*>([^<]*)</text>", cell)[0] for cell in cells]
    # a row an optimizer, a column a beta
    expected = [ACCURACY.get((beta, name)) for name in OPTIMIZERS for beta in BETAS]
    assert texts == ["failed" if value is None else f"{value:.4g}" for value in expected]
    strengths = [float(found[0]) if (found := re.findall('fill-opacity="([^"]+)"', cell)) else None for cell in cells]
    known = [(value, strength) for value, strength in zip(expected, strengths, strict=True) if value is not None]
    assert strengths[-1] is None and sorted(known) == sorted(known, key=lambda pair: pair[1])
    assert [cell.startswith(" best") for cell in cells] == [value == 0.71 for value in expected]


def test_curves_are_those_of_the_models_that_differ(html: str) -> None:
    series = series_of(Page(html), "loss")
    assert series == {
        f"trial {trial}": [[float(step), float(f"{trial / step:.6g}")] for step in range(1, 7)] for trial in range(1, 6)
    }
    assert re.findall(r'<g class="line c(\d)[^"]* best" data-run="([^"]+)"', html)[0] == ("0", "trial 3")
    assert "One model for all trials: sft." in Page(html).text and len(losses(1)) != STEPS


def test_a_trial_is_told_in_whole_and_text_is_text(html: str) -> None:
    page = Page(html)
    (failed,) = [attrs for attrs in page.all("details", "stage") if attrs["data-trial"] == "6"]
    assert failed["id"] == "trial-6" and "open" in failed
    assert f"dpo: {ERROR}" in "".join(page.texts) and ATTACK not in html
    assert len(page.scripts) == 1 and "Without a number: trial 6 (failed)" in page.text
    assert "posttrain run small --set trial=3" in page.text
    assert not re.search(r'(?:src|href)="(?!#)', html) and "style=" not in html
    for tag, attrs in page.elements:
        assert tag != "svg" or (attrs["role"] == "img" and attrs["aria-label"])


def test_many_combinations_keep_colour_for_the_best_and_less_is_better_of_a_loss(tmp_path: Path) -> None:
    made = SmallSweep(tmp_path, of=12, metric="judge.loss")
    for size in (1, 2, 3):
        for seed in (1, 2, 3, 4):
            made.trial({"dpo.size": size, "dpo.kind": "x" * seed, "dpo.flag": seed > 2}, {"loss": size + seed}, [1.0])
    html = rendered(made)
    assert [row[1] for row in rows_of(html)][:2] == ["trial 1", "trial 2"]
    svg = html.split('data-setting="dpo.kind"')[1].split("</svg>")[0]
    assert re.findall(r'class="group-line c(\d)"', svg) == ["0", "1", "2", "3", "4", "5"][::-1]
    assert '<svg class="heat"' not in html


def test_a_stage_that_failed_is_drawn_as_far_as_it_came(tmp_path: Path) -> None:
    made = SmallSweep(tmp_path, of=2)
    made.trial({"dpo.beta": 0.1}, interval(0.5, 0.1), losses(1))
    run = made.trial({"dpo.beta": 0.2}, {}, [], state="failed", error="loss is nan at step 3")["run"]
    job = made.store.scratch / run / "dpo"
    job.mkdir(parents=True)
    (job / METRICS).write_text(jsonl([{"step": step, "loss": 2.0 * step} for step in (1, 2)]))
    html = rendered(made)
    assert series_of(Page(html), "loss")["trial 2"] == [[1.0, 2.0], [2.0, 4.0]]
    assert re.findall(r'<g class="line c\d partial" data-run="([^"]+)"', html) == ["trial 2"]
    assert "trial 2 (unfinished)" in Page(html).text


def test_a_model_that_trials_share_is_one_line(tmp_path: Path) -> None:
    made = SmallSweep(tmp_path, of=3)
    made.trial({"judge.k": 1}, interval(0.5, 0.1), losses(1))
    made.trial({"judge.k": 2}, interval(0.6, 0.1), losses(2))
    shared = {**made.runs[0]["stages"], "judge": made.runs[1]["stages"]["judge"]}
    made.made.stages = shared
    made.keep(3, {"judge.k": 3}, "ok", 1.0)
    series = series_of(Page(rendered(made)), "loss")
    assert set(series) == {"trials 1, 3", "trial 2"}


def test_time_is_of_all_starts_and_an_unfinished_sweep_says_so(tmp_path: Path) -> None:
    made = SmallSweep(tmp_path, of=4)
    made.trial({"dpo.beta": 0.1}, interval(0.5, 0.1), losses(1), seconds=30.0)
    again = dict(made.runs[0]["stages"])
    made.made.stages = dict(again)
    made.keep(1, {"dpo.beta": 0.1}, "interrupted", 12.5)
    made.trial({"dpo.beta": 0.2}, {}, losses(2), seconds=5.0)
    html = rendered(made)
    assert [row[4] for row in rows_of(html)] == ["42 s", "5.0 s"]
    assert "<div><dt>trials</dt><dd>2 of 4</dd></div>" in html and "unfinished" in html


def test_no_number_at_all_is_a_page_too(tmp_path: Path) -> None:
    made = SmallSweep(tmp_path, of=1)
    made.trial({"dpo.beta": 0.1}, {"accuracy": math.nan}, losses(1))
    html = rendered(made)
    assert "No trial has a number to judge it by yet." in html and "No trial has ended well" in html


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the sweep's name; `latest` is it where the newest run is a trial; a trial by its id is a run."""
    made, store = grid(tmp_path), ["--store", str(tmp_path / "store")]
    for index, run in enumerate(reversed(made.store.runs())):
        os.utime(tmp_path / "store" / "runs" / f"{run}.json", (1e9 + index, 1e9 + index))
    for reference in ("mine", "latest"):
        output = tmp_path / f"{reference}.html"
        assert cli.main(["report", reference, "-o", str(output), "--json", *store]) == 0
        assert json.loads(capsys.readouterr().out) == {"sweep": "mine", "report": str(output)}
        assert "<title>mine · small · posttrain sweep</title>" in output.read_text()
    run = made.runs[0]["run"]
    assert cli.main(["report", run, "-o", str(tmp_path / "run.html"), "--json", *store]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == run
    with pytest.raises(RequestError, match="there is no sweep 'other'"):
        write_sweep_report(made.store, "other", tmp_path / "other.html")
