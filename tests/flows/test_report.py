"""The report: what stands on the page is what the artifacts hold, and nothing on it is code but ours."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from artifacts import Artifact
from artifacts.errors import RequestError
from flows import cli
from flows.report import render_report, write_report
from flows.reporting.boxes import BOX_HEIGHT, BOX_WIDTH
from flows.reporting.charts import MAX_POINTS
from flows.reporting.curves import POINTS
from flows.reporting.samples import MAX_CARDS, MAX_CHARACTERS
from tests.flows.report_run import ATTACK, LEDGER, METRICS, RESULTS, SmallRun, jsonl, small_run, small_stage


class Page(HTMLParser):
    """Every element with its attributes, and the text below it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        kept = {"script": self.scripts, "style": self.styles}.get(self._inside, self.texts)
        kept.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str, name: str) -> list[dict[str, str]]:
        """Attributes of every element of that tag that has a class of that name."""
        return [attrs for found, attrs in self.elements if found == tag and name in attrs.get("class", "").split()]


@pytest.fixture(autouse=True)
def _small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.reporting.declared.load_stage", small_stage)


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    return small_run(tmp_path)


def page_of(run: SmallRun) -> Page:
    return Page(render_report(run.store, run.payload()))


def series_of(page: Page, metric: str) -> dict[str, list[list[float]]]:
    """Run -> points of the charts of one metric."""
    found, inside = {}, False
    for tag, attrs in page.elements:
        if tag == "svg":
            inside = attrs.get("data-metric") == metric
        elif inside and tag == "g" and "data-points" in attrs:
            found[attrs["data-run"]] = json.loads(attrs["data-points"])
    return found


def drawn(value: float) -> float:
    """As a curve has it: six digits."""
    return float(f"{value:.6g}")


def test_bars_hold_the_values_of_results_json(run: SmallRun) -> None:
    shown = {
        (bar["data-stage"], bar["data-metric"]): [float(bar[f"data-{edge}"]) for edge in ("value", "low", "high")]
        for bar in page_of(run).all("g", "bar")
    }
    assert shown == {
        (f"{model}_eval", metric): [result["value"], result["low"], result["high"]]
        for model, results in RESULTS.items()
        for metric, result in results.items()
    }


def test_curves_hold_the_values_of_metrics_jsonl(run: SmallRun) -> None:
    page = page_of(run)
    for metric in ("loss", "grad_norm", "learning_rate"):
        assert series_of(page, metric) == {"sft": [[row["step"], drawn(row[metric])] for row in METRICS]}
    assert series_of(page, "num_tokens") == {}


def test_a_long_curve_is_thinned_and_says_so(tmp_path: Path) -> None:
    run, count = SmallRun(tmp_path), 3_000
    rows = [{"step": step, "loss": math.sin(step / 50)} for step in range(count)]
    rows[1_234]["loss"], rows[2_345]["loss"], rows[100]["loss"] = 99.0, -99.0, math.nan
    run.stage("sft", "sft", {}, {"model": ("model", {"metrics.jsonl": jsonl(rows)})})
    page = page_of(run)
    points = series_of(page, "loss")["sft"]
    assert len(points) <= MAX_POINTS
    for index in (0, 1_234, 2_345, count - 1):
        assert [rows[index]["step"], drawn(rows[index]["loss"])] in points
    assert "curves of more than 1,000 points are thinned to so many" in page.text
    assert "sft: 1 values of loss are not finite numbers" in page.text


def test_the_more_curves_the_fewer_points_each_has(tmp_path: Path) -> None:
    run, metrics = SmallRun(tmp_path), 100
    rows = [{"step": step, **{f"m/{name}": math.sin(step + name) for name in range(metrics)}} for step in range(900)]
    run.stage("sft", "sft", {}, {"model": ("model", {"metrics.jsonl": jsonl(rows)})})
    html = render_report(run.store, run.payload())
    found = [len(json.loads(points)) for points in re.findall(r'data-points="([^"]*)"', html)]
    assert len(found) == metrics and 390 < max(found) <= POINTS // metrics
    assert "curves of more than 400 points are thinned to so many" in html


def test_monitors_speak_in_the_report(tmp_path: Path) -> None:
    """A row without a number is no spike."""
    run = SmallRun(tmp_path)
    rows: list[dict[str, float | None]] = [{"step": step, "loss": 1.0 + step % 2 / 100} for step in range(1, 60)]
    rows[30]["loss"], rows[45]["loss"] = None, 7.0
    ledger = json.dumps({"input": 9, "states": {"used": 7, "masked": 2}})
    run.stage("sft", "sft", {}, {"model": ("model", {"metrics.jsonl": jsonl(rows), "ledger.json": ledger})})
    text = page_of(run).text
    assert re.search(r"loss_spike in sft , step 46 loss 7 after 1", text) and text.count("loss_spike") == 1
    assert "masked_rows in sft , step 0 2 masked of 9 rows: nothing of them is trained" in text
    # said at once, before any number
    assert text.index("⚠ 2") < text.index("⚠ 2 alarms") < text.index("loss_spike") < text.index("Graph Every stage")


def test_user_text_is_text(run: SmallRun) -> None:
    run.stages["sft"]["reason"] = run.stages["sft"]["uses"] = ATTACK
    run.stages["sft"]["error"] = run.stages["sft"]["inputs"]["model"][0] = ATTACK
    page = page_of(run)
    assert len(page.scripts) == 1 and "owned" not in page.scripts[0]
    assert not [attrs for tag, attrs in page.elements if tag == "img" or any(n.startswith("on") for n in attrs)]
    assert page.text.count(ATTACK) >= 5  # prompts, a completion, an example of the ledger, a rollout, the reason


def test_the_page_refers_to_nothing_outside(run: SmallRun) -> None:
    page = page_of(run)
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    for _, attrs in page.elements:
        for name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "style"):
            if name in attrs:
                assert name == "href" and attrs[name].removeprefix("#") in ids
    assert not [word for word in ("url(", "@import", "http:", "https:", "fetch", "import(") if word in page.styles[0]]
    assert not [word for word in ("http:", "https:", "fetch(", "import(", "innerHTML") if word in page.scripts[0]]


def test_the_policy_allows_only_our_style_and_script(run: SmallRun) -> None:
    page = page_of(run)
    policy = next(attrs["content"] for _, attrs in page.elements if "Policy" in attrs.get("http-equiv", ""))

    def digest(content: str) -> str:
        return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()

    assert policy.split("; ") == [
        "default-src 'none'",
        f"style-src 'sha256-{digest(page.styles[0])}'",
        f"script-src 'sha256-{digest(page.scripts[0])}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]


def test_ledgers_are_whole(run: SmallRun) -> None:
    page = page_of(run)
    pieces = [attrs for tag, attrs in page.elements if tag == "rect" and "data-state" in attrs]
    assert {piece["data-state"]: int(piece["data-count"]) for piece in pieces} == LEDGER["states"]
    # shares of 100 rows are the widths in percent, one after the other
    assert [(piece["data-state"], float(piece["x"]), float(piece["width"])) for piece in pieces] == [
        ("used", 0, 90),
        ("duplicate", 90, 7),
        ("filtered: too long", 97, 3),
    ]
    assert "41 tokens cut off" in page.text


def test_a_ledger_that_does_not_add_up_is_named(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    ledger = {"input": 10, "states": {"used": 8, "duplicate": 1}}
    run.stage("data", "normalize", {}, {"out": ("dataset", {"ledger.json": json.dumps(ledger)})})
    assert "data: its ledger does not add up: the states sum to 9, the input was 10 rows" in page_of(run).text


def test_tokens_stand_beside_rows(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    tokens = {"rows": 3, "input": 14, "states": {"used": 7, "truncated": 1, "masked": 6}}
    states = {"used": 1, "truncated": 1, "masked": 1}
    ledgers = {"whole": tokens, "wrong": {**tokens, "input": 15}}
    for name, counted in ledgers.items():
        ledger = {"input": 3, "states": states, "truncated_tokens": 1, "tokens": counted}
        run.stage(name, "sft", {}, {"out": ("dataset", {"ledger.json": json.dumps(ledger)})})
    page = page_of(run)
    assert "3 rows · 14 tokens · 1 tokens cut off" in " ".join(page.text.split())
    cells = [attrs["data-tokens"] for tag, attrs in page.elements if tag == "td" and "data-tokens" in attrs]
    assert cells[:3] == ["7", "6", "1"]  # used, then by rows and name: masked, truncated
    assert "wrong: its ledger does not add up: the states sum to 14 tokens, the input had 15" in page.text


def test_contamination_is_shown_with_what_is_shared(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    pair = {"kind": "near", "row": "e7", "train_row": "t3", "score": 0.5238, "text": f"how many {ATTACK}"}
    content = {
        "train_rows": 2000,
        "evaluation_rows": 40,
        "contaminated_rows": 3,
        "train_rows_found": 5,
        "rows_by_kind": {"equal": 2, "near": 1},
        "pairs": [pair],
    }
    files = {"contamination.json": json.dumps(content), "pairs.jsonl": ""}
    run.stage("leaks", "contamination", {}, {"contamination": ("contamination", files)})
    page = page_of(run)
    text = " ".join(page.text.split())
    assert "3 of 40 evaluation rows (7.5 %) stand in the 2,000 training rows; 5 of these were found" in text
    assert "nearly equal e7 t3 0.5238" in text and f"how many {ATTACK}" in page.text


def test_samples_are_joined_by_row_id(run: SmallRun) -> None:
    cards = page_of(run).all("article", "sample")
    assert [(card["data-row"], card.get("data-wrong", ""), "data-changed" in card) for card in cards] == [
        ("r-1", "", False),  # right, right
        ("r-2", "0 1", False),  # wrong, wrong with another completion
        ("r-3", "0", True),  # wrong, right
        ("r-4", "", False),  # right, no record of the second model
    ]


def test_equal_answers_stand_once_and_what_is_of_the_row_too(tmp_path: Path) -> None:
    """Three answers of one row, two of them equal. Its loss is the same under all; a reward that says what the verdict
    says is left out, another one is not."""
    run = SmallRun(tmp_path)
    said = [("7", True, 1.0), ("8", False, 0.25), ("7", True, 1.0)]
    rows = [
        {"row_id": "r", "prompt": "3+4", "completion": text, "correct": right, "loss": 0.125, "reward": reward}
        for text, right, reward in said
    ]
    run.stage("judge", "evaluate", {}, {"evaluation": ("evaluation", {"samples.jsonl": jsonl(rows)})})
    html = render_report(run.store, run.payload())
    card = Page(html[html.index("<article") : html.index("</article>")])
    assert " ".join(card.text.split()) == "3+4 row r judge 2 of 3 right loss 0.125 ✓ 7 × 2 ✕ 8 reward 0.25"
    assert "not all right under judge 1" in Page(html).text


def test_long_texts_are_folded_and_bound_the_number_of_rows(tmp_path: Path) -> None:
    run, text = SmallRun(tmp_path), "word " * 700
    rows = [{"row_id": f"r-{i}", "prompt": text, "completion": text} for i in range(MAX_CARDS)]
    run.stage("judge", "evaluate", {}, {"evaluation": ("evaluation", {"samples.jsonl": jsonl(rows)})})
    page = page_of(run)
    shown = len(page.all("article", "sample"))
    assert shown == MAX_CHARACTERS // (2 * len(text)) and f"the first {shown} rows" in page.text
    assert len(page.all("details", "long")) == 2 * shown


def test_stages_stand_in_the_order_of_the_recipe(run: SmallRun, tmp_path: Path) -> None:
    run.store.write_run("run-1", run.payload())
    write_report(run.store, "run-1", tmp_path / "new" / "page.html")
    page = Page((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    assert [stage["data-stage"] for stage in page.all("details", "stage")] == list(run.recipe)
    assert os.listdir(tmp_path / "new") == ["page.html"]


def test_settings_are_told_from_defaults(run: SmallRun) -> None:
    html = render_report(run.store, run.payload())
    section = html[html.index('data-stage="sft"', html.index('id="stages"')) :]
    section = section[: section.index("Command")]
    settings = Page(section[section.index('<dl class="settings">') :])
    shown = " ".join(settings.text.split())
    assert shown == (
        "learning_rate 0.0002 sampling.temperature 0.5 "  # set
        "num_train_epochs 1 sampling.top_p 1.0 logging_steps op 10"  # defaults
    )
    assert ["default" in attrs.get("class", "") for tag, attrs in settings.elements if tag == "div"] == [
        *(False, False),
        *(True, True, True),
    ]
    assert "Resumed at step 7" in html and "With the attempts before: 1 min 5 s" in html
    assert "python -m stages &#39;a spec.json&#39;" in html


def test_lineage_leads_to_the_source(run: SmallRun) -> None:
    html = render_report(run.store, run.payload())
    lineage = html[html.index('id="lineage"') : html.index('id="recipe"')]
    trail = lineage[lineage.index("<strong>sft_eval</strong>") :]
    places = [trail.index(f'title="{run.output(name)}"') for name in ("sft_eval", "zebra_data", "sft", "base")]
    assert places == sorted(places)  # inputs by name: dataset, then model, below it what that was made of
    assert "rows.jsonl" in trail


def test_the_graph_has_every_wire_and_no_box_on_another(run: SmallRun) -> None:
    run.stage("dpo", "preference", {"model": "sft", "dataset": "@pairs"}, {})
    page = page_of(run)
    edges = {(edge["data-source"], edge["data-target"]) for edge in page.all("path", "edge")}
    assert edges == {
        ("zebra_data", "base"),
        *(("base", "sft"), ("zebra_data", "sft")),
        *(("base", "base_eval"), ("zebra_data", "base_eval"), ("sft", "sft_eval"), ("zebra_data", "sft_eval")),
        *(("sft", "dpo"), ("@pairs", "dpo")),
    }
    names = [attrs["data-stage"] for attrs in page.all("a", "node")]
    inside = [attrs for tag, attrs in page.elements if tag == "rect" and attrs.get("rx") == "8"]
    place = dict(zip(names, ((float(rect["x"]), float(rect["y"])) for rect in inside), strict=True))
    for source, target in edges:
        assert place[source][1] + BOX_HEIGHT < place[target][1]
    for a, (ax, ay) in place.items():
        assert not [b for b, (bx, by) in place.items() if b != a and abs(ax - bx) < BOX_WIDTH and ay == by]


def test_what_is_missing_or_damaged_is_named(run: SmallRun) -> None:
    root = run.store.files.local_root
    evaluation = Artifact("evaluation", run.output("sft_eval").removeprefix("sha256:"))
    (root / evaluation.key / "manifest.json").unlink()
    metrics = root / Artifact("model", run.output("sft").removeprefix("sha256:")).key / "files" / "metrics.jsonl"
    metrics.chmod(0o644)
    metrics.write_bytes(metrics.read_bytes().replace(b"2.0", b"3.0", 1))
    page = page_of(run)
    assert f"sft_eval: evaluation {evaluation.digest[:10]} cannot be read: {evaluation.id}" in page.text
    assert "sft: metrics.jsonl of model" in page.text and "its content is not what was stored" in page.text
    assert series_of(page, "loss") == {}
    assert {bar["data-stage"] for bar in page.all("g", "bar")} == {"base_eval"}


def test_bad_lines_are_named_and_the_others_shown(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    lines = '{"step": 1, "loss": 0.5}\nno json\n[1]\n{"step": 4, "loss": 0.25}\n'
    run.stage("sft", "sft", {}, {"model": ("model", {"metrics.jsonl": lines})})
    page = page_of(run)
    assert series_of(page, "loss") == {"sft": [[1, 0.5], [4, 0.25]]}
    assert "sft: metrics.jsonl line 2 is not JSON and was left out" in page.text
    assert "sft: metrics.jsonl line 3 is not a JSON object and was left out" in page.text


def test_a_run_that_made_nothing_still_has_a_page(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    run.stage("sft", "sft", {"model": "hub:owner/name"}, {}, state="failed", error="DataError: row 3 has no text")
    page = page_of(run)
    assert "DataError: row 3 has no text" in page.text
    for sentence in ("no evaluation with numbers", "No model of this run has training metrics", "has a ledger"):
        assert sentence in page.text


def test_what_was_held_out_stands_for_an_evaluation(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    run.stage("sft", "sft", {}, {}, metrics={"loss": 0.25, "eval/loss": 1.75})
    page = page_of(run)
    assert "no evaluation with numbers. While sft trained, eval/loss 1.75 was measured." in page.text


def test_secrets_do_not_reach_the_page(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "k3yk3yk3yk3yk3yk3y")
    run.stages["sft"]["command"] = ["train", "--key", "k3yk3yk3yk3yk3yk3y", "s3://me:hunter2@host/bucket"]
    html = render_report(run.store, run.payload())
    assert "k3yk3yk3y" not in html and "hunter2" not in html


def test_an_unknown_run_or_a_folder_as_output_is_refused(run: SmallRun, tmp_path: Path) -> None:
    run.store.write_run("run-1", run.payload())
    with pytest.raises(RequestError, match=r"run-2.*did you mean 'run-1'"):
        write_report(run.store, "run-2", tmp_path / "page.html")
    with pytest.raises(RequestError, match="cannot be written"):
        write_report(run.store, "run-1", tmp_path)


def test_where_the_page_goes(
    run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file, whose folder is made and said; RUN.html in a folder, or here; stdout."""
    run.store.write_run("run-1", run.payload())
    monkeypatch.chdir(tmp_path)

    def said(*options: str) -> tuple[str, str]:
        assert cli.main(["report", "run-1", "--store", run.store.url, *options]) == 0
        shown = capsys.readouterr()
        return shown.out, shown.err

    assert said() == ("run-1.html\n", "")
    assert said("-o", "new/deep/page.html") == ("new/deep/page.html\n", "made the folder new/deep\n")
    assert said("-o", "new") == ("new/run-1.html\n", "")
    assert said("-o", "other/") == ("other/run-1.html\n", "made the folder other\n")
    page, err = said("-o", "-")
    assert err == "" and page == (tmp_path / "run-1.html").read_text() + "\n"
    assert sorted(os.listdir(tmp_path / "new")) == ["deep", "run-1.html"]
    assert cli.main(["report", "run-1", "--store", run.store.url, "-o", "-", "--json"]) == 2
    assert "-o - writes the page to stdout, where --json writes its object" in capsys.readouterr().err


def test_a_ledger_with_nothing_to_tell_is_one_line(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    ledgers = {"full": {"input": 5, "states": {"used": 5}}, "cut": {"input": 5, "states": {"used": 5}}}
    ledgers["cut"]["truncated_tokens"] = 3
    for name, ledger in ledgers.items():
        run.stage(name, "normalize", {}, {"out": ("dataset", {"ledger.json": json.dumps(ledger)})})
    rows = {tag: a["data-stage"] for tag, a in page_of(run).elements if a.get("data-rows") == "5"}
    assert rows == {"tr": "full", "article": "cut"}


def test_rows_that_no_step_came_to_are_not_said_to_be_used(tmp_path: Path) -> None:
    """Two steps of two of five rows. A long row's pieces and a pair's sides are one row; steps on `rollouts` name
    prompts, of which each stands for several rows of it."""
    run, ledger = SmallRun(tmp_path), json.dumps({"input": 5, "states": {"used": 4, "truncated": 1}})
    run.stage("data", "normalize", {}, {"train": ("dataset", {"ledger.json": ledger})})
    steps = {
        "short": [["a", "b"], ["c", "a"]],
        "pieces": [["a#0", "a#1"], ["b/chosen", "b/rejected"]],
        "whole": [["a", "b"], ["c", "d", "e"]],
        "replay": [["a", "b"]],
    }
    for name, rows in steps.items():
        lines = jsonl([{"step": step, "rows": found} for step, found in enumerate(rows, 1)])
        files = {"ledger.json": ledger, "steps.jsonl": lines}
        inputs = {"rollouts" if name == "replay" else "dataset": "data"}
        run.stage(name, "sft", inputs, {"model": ("model", files)})
    text = page_of(run).text
    assert re.findall(r"seen (\d) of (\d)", text) == [("3", "5"), ("2", "5")]


def test_reasons_are_listed_once(run: SmallRun) -> None:
    run.stages["sft"] |= {"reason": "learning_rate: 1 -> 2; input model changed", "reasons": ["", ""]}
    run.stages["sft"]["reasons"] = ["learning_rate: 1 -> 2", "input model changed"]
    run.stages["base_eval"] |= {"state": "skipped", "reason": "base failed", "reasons": ["never ran"]}
    html = render_report(run.store, run.payload())
    for reason, times in (("<li>learning_rate: 1 -&gt; 2</li>", 1), ("<li>base failed</li>", 1), ("never ran<", 0)):
        assert html.count(reason) == times


def test_what_a_gate_hands_on_is_shown_where_it_was_made(run: SmallRun) -> None:
    """The page with a gate has its box and its section, and no chart, ledger or sample more than without."""
    without = page_of(run)
    run.gate("passed", model="sft", candidate="sft_eval")
    run.stages = {"passed": run.stages.pop("passed"), **run.stages}  # as the recipe may list it first
    run.recipe = {"passed": run.recipe.pop("passed"), **run.recipe}
    page = page_of(run)
    assert series_of(page, "loss") == series_of(without, "loss") != {}
    for tag in ("svg", "article"):
        assert [found for found, _ in page.elements].count(tag) == [found for found, _ in without.elements].count(tag)
    assert page.text.count("r-1") == without.text.count("r-1") > 0
    assert "no dataset" not in page.text and "passed" in page.text
