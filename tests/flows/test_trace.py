"""`posttrain trace`, `lineage` and `ledger`, against rows whose places are planted and files that are read by hand."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from artifacts import open_store
from artifacts.transfer import export, import_
from flows.costs import Bill, Cost, run_bill
from flows.row_sources import Place, places
from flows.written import named
from stages.evaluation.scores import recomputed
from tests.flows.asked_runs import ROWS, WRONG, Asked, make_asked, row_id
from tests.in_process import run_here
from tests.tiny_recipe import artifact_folder


def test_wrong_samples_are_the_planted_rows_with_file_index_and_steps(asked: Asked, capsys):
    found = asked.ask(capsys, "trace", "@small/judge", "accuracy", "--wrong")
    assert (found["value"], found["recomputed"], found["agrees"]) == (38 / 40, 38 / 40, True)
    planted = {row_id(asked.rows, index): index for index in WRONG}
    assert {sample["row_id"]: sample["source"]["index"] for sample in found["samples"]} == planted
    sha256 = hashlib.sha256(asked.rows.read_bytes()).hexdigest()
    for sample in found["samples"]:
        assert (sample["source"]["file"], sample["source"]["sha256"]) == ("rows.jsonl", sha256)
        assert sample["sample"]["correct"] is False
    # which steps trained them: read from the models, by hand
    for stage in ("sft", "more"):
        folder = artifact_folder(asked.store, asked.runs[0]["stages"][stage]["outputs"]["model"]["id"])
        lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        for sample in found["samples"]:
            steps = [line["step"] for line in lines if sample["row_id"] in line["rows"]]
            assert sample["trained"].get(f"small/{stage}", []) == steps, stage


def test_filters_and_the_rows_behind_the_model(asked: Asked, capsys):
    right = asked.ask(capsys, "trace", "@small/judge", "--right", "--limit", "0")
    assert right["metric"] == "accuracy" and len(right["samples"]) == 38
    one = row_id(asked.rows, 7)
    (only,) = asked.ask(capsys, "trace", "@small/judge", "--row", one[:10])["samples"]
    assert (only["row_id"], only["source"]["index"]) == (one, 7)
    behind = asked.ask(capsys, "trace", "@small/judge", "--rows", "--limit", "0")
    indices = [row["source"]["index"] for row in behind["rows"]]
    trained = {row["row_id"] for row in behind["rows"]}
    assert len(indices) == len(set(indices)) and set(indices) <= set(range(len(ROWS)))
    assert trained == {row_id(asked.rows, index) for index in indices}
    assert [training["steps"] for training in behind["trainings"]] == [2, 4]
    assert len(asked.ask(capsys, "trace", "@small/judge", "--rows", "--limit", "3")["rows"]) == 3
    few = asked.show(capsys, "trace", "@small/judge", "--rows", "--limit", "3")
    assert "3 of 40 samples; --limit 0 shows all" in few and f"3 of {len(indices)} rows; --limit 0 shows all" in few
    assert "--limit" not in asked.show(capsys, "trace", "@small/judge", "--rows", "--limit", "0")
    untrained = [row_id(asked.rows, index) for index in range(len(ROWS)) if index not in indices]
    for row, said in ((untrained[0], True), (one if 7 in indices else min(trained), False)):
        shown = asked.show(capsys, "trace", "@small/judge", "--row", row)
        assert ("stage contamination compares texts" in " ".join(shown.split())) is said
    shown = asked.show(capsys, "trace", "@small/judge", "--wrong")
    assert f"rows.jsonl row {WRONG[0] + 1} " in shown and "its 40 samples give the same number" in shown


def test_wrong_questions_are_refused(asked: Asked, capsys):
    said = asked.show(capsys, "trace", "@small/judge", "accurcy", status=2)
    assert said.startswith(
        "posttrain: the evaluation has no metric 'accurcy'; did you mean 'accuracy'?; it has: accuracy"
    )
    said = asked.show(capsys, "trace", "@small/sft", status=2)
    assert said.endswith("is a model; a score is of an artifact of kind evaluation\n")
    said = asked.show(capsys, "trace", "@small/judge", "completions/mean_length", "--wrong", status=2)
    assert "neither right nor wrong" in said


def by_hand(content: str, position: str) -> str:
    return hashlib.sha256(f"{content}:{position}".encode()).hexdigest()[:24]


def test_places_of_rows_of_several_files_copies_and_functions():
    """Ids as the design defines them: digest of file and index, `:k` for a function's result, `:n` for the n-th file of
    equal content."""
    sources = [
        {"file": "d/a.jsonl", "sha256": "a" * 64, "rows": 3},
        {"file": "d/b.jsonl", "sha256": "b" * 64, "rows": 2},
        {"file": "d/copy.jsonl", "sha256": "a" * 64, "rows": 3},
    ]
    wanted = {
        by_hand("a" * 64, "2"): Place("d/a.jsonl", "a" * 64, 2),
        by_hand("b" * 64, "0"): Place("d/b.jsonl", "b" * 64, 0),
        by_hand("a" * 64, "1:1"): Place("d/copy.jsonl", "a" * 64, 1),
        by_hand("b" * 64, "1:5"): Place("d/b.jsonl", "b" * 64, 1, 5),
    }
    # the second file of equal content: `:1` is its occurrence, and in a the second result of row 1 has the same id
    found = places([*wanted, "f" * 24], [*sources, *sources])
    assert found == wanted
    assert str(wanted[by_hand("b" * 64, "1:5")]) == "d/b.jsonl row 2, result 6"


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy", 2 / 3),  # three answers were judged, one row of two answers and one of one
        ("reward", (0.5 + 1.5) / 2),
        ("completions/mean_length", (2 + 4 + 6 + 1) / 4),
        ("completions/clipped_ratio", 1 / 4),
        ("loss", (0.5 * 10 + 2.0 * 30) / 40),  # a row counts once, by its tokens
        ("perplexity", math.exp((0.5 * 10 + 2.0 * 30) / 40)),
        ("preference/accuracy", 1 / 2),
        ("preference/margin", ((3 - 1) + (1 - 2)) / 2),
        ("unheard_of", None),
    ],
)
def test_numbers_from_samples_by_hand(metric, expected):
    first = {"row_id": "a", "loss": 0.5, "loss_tokens": 10, "chosen_score": 3.0, "rejected_score": 1.0}
    second = {"row_id": "b", "loss": 2.0, "loss_tokens": 30, "chosen_score": 1.0, "rejected_score": 2.0}
    samples = [
        {**first, "completion": "x", "correct": True, "score": 0.5, "tokens": 2, "finished": True},
        {**first, "completion": "x", "correct": False, "score": None, "tokens": 4, "finished": True},
        {**second, "completion": "x", "correct": True, "score": 1.5, "tokens": 6, "finished": False},
        {**second, "completion": "x", "correct": None, "score": None, "tokens": 1, "finished": True},
    ]
    found = recomputed(metric, samples)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_lineage_goes_down_to_files_and_up_to_every_use(asked: Asked, capsys):
    """sft of the first run: made of base and rows; used by more, and through it by judge. The other seed's are not."""
    first = asked.runs[0]["stages"]
    found = asked.ask(capsys, "lineage", first["sft"]["outputs"]["model"]["id"])
    below = {node["role"]: node for node in found["made_of"]["inputs"]}
    assert below["model"]["identifier"] == first["base"]["outputs"]["model"]["id"]
    rows = below["dataset"]
    assert rows["sources"] == [
        {"file": "rows.jsonl", "sha256": hashlib.sha256(asked.rows.read_bytes()).hexdigest(), "rows": 40}
    ]
    (more,) = found["used_by"]
    assert (more["identifier"], more["role"]) == (first["more"]["outputs"]["model"]["id"], "model")
    (judge,) = more["used_by"]
    assert judge["identifier"] == first["judge"]["outputs"]["evaluation"]["id"]
    assert judge["metrics"] == {"accuracy": 0.95}
    dataset = asked.ask(capsys, "lineage", "@small/rows")
    users = {node["identifier"] for node in dataset["used_by"]}
    assert users == {
        output["id"]
        for run in asked.runs[:2]
        for stage in ("base", "sft", "more", "judge")
        for output in run["stages"][stage]["outputs"].values()
    }
    assert "└── rows.jsonl: 40 rows, sha256 " in asked.show(capsys, "lineage", "@small/rows")
    shown = asked.show(capsys, "lineage", "@small/sft")
    assert "rows.jsonl: 40 rows" in shown and "used by" in shown


def test_the_source_has_its_name_where_the_run_is_not(tmp_path: Path, capsys):
    """A run that was killed leaves no account of itself, and an export takes none along: the record has the name, as
    the recipe writes it, and the artifact, whose digest it would change, has not."""
    asked = make_asked(tmp_path)
    payload = run_here(asked.recipe, asked.store, only=["rows"])
    store = open_store(str(asked.store))
    (artifact,) = store.artifacts()
    assert store.lineage(artifact)["artifact"] == payload["stages"]["rows"]["outputs"]["train"]["id"]
    export(store, [artifact], tmp_path / "out", lineage=True)
    other = Asked(tmp_path / "other")
    import_(open_store(str(other.store)), tmp_path / "out")
    shutil.rmtree(asked.store / "runs")
    sha256 = hashlib.sha256(asked.rows.read_bytes()).hexdigest()
    for place in (asked, other):
        found = place.ask(capsys, "lineage", "@small/rows")["made_of"]
        assert found["sources"] == [{"file": "rows.jsonl", "sha256": sha256, "rows": 40}]
    (record,) = store.stage_records("normalize")
    assert record.provenance["source"] == "rows.jsonl"
    assert "rows.jsonl" not in store.files.read(f"{artifact.key}/manifest.json").decode()
    # as it was written before records had the name
    (path,) = store.files.tree("index")
    older = {name: value for name, value in record.provenance.items() if name != "source"}
    store.files.write(f"index/{path}", replace(record, provenance=older).to_bytes())
    assert f"a source: 40 rows, sha256 {sha256[:12]}" in asked.show(capsys, "lineage", "@small/rows")


def test_files_of_a_pattern_are_named_one_by_one(tmp_path: Path, capsys):
    asked = make_asked(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"data/{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": "x"}) + "\n")
    run_here(asked.recipe, asked.store, ["rows.source.path=data/*.jsonl"], only=["rows"])
    found = asked.ask(capsys, "lineage", "@small/rows")["made_of"]["sources"]
    assert {(one["file"], one["rows"]) for one in found} == {("data/a.jsonl", 1), ("data/b.jsonl", 1)}


def test_every_output_has_its_own_number_of_rows(tmp_path: Path, capsys):
    """Of 40 rows 5 are held out; the stage's metric `rows` is of the other 35."""
    asked = make_asked(tmp_path)
    run_here(asked.recipe, asked.store, ["rows.test_size=5"], only=["rows"])
    for output, rows in (("train", 35), ("test", 5)):
        found = asked.ask(capsys, "lineage", f"@small/rows.{output}")["made_of"]
        assert found["metrics"] == {"rows": rows}, output
    assert "rows 5\n" in asked.show(capsys, "lineage", "@small/rows.test")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"path": "chats.jsonl", "function": "code.py:change"}, "chats.jsonl"),
        ({"function": "arithmetic.py:problems"}, "arithmetic.py:problems"),
        ({"path": "s3://bucket/part-?.jsonl"}, "s3://bucket/part-?.jsonl"),
        ({"path": "https://host/chats.jsonl?sig=abc&se=1"}, "https://host/chats.jsonl"),
        ({"path": "s3://me:word@bucket/chats.jsonl"}, "s3://***@bucket/chats.jsonl"),
        (None, ""),
    ],
)
def test_a_source_is_named_as_it_was_written_but_for_secrets(source, name):
    assert named({"source": source}) == name


def test_lineage_of_what_loops_back_many_ways_is_short(tmp_path: Path):
    """30 stages that each read the one before twice: 2**30 ways, 30 artifacts."""
    from artifacts import Record
    from flows.ancestry import Ancestry

    store = open_store(str(tmp_path / "store"))
    digests: list[str] = []
    for number in range(30):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "x").write_text(str(number))
        inputs = {"model": digests[-1], "reference": digests[-1]} if digests else {}
        identity = {"stage": "sft", "version": 1, "config": {}, "inputs": inputs}
        made = store.put("model", folder, producer=identity)
        store.append_record(Record("sft", f"{number:064x}", identity, {"model": made}))
        digests.append(made.digest)
    ancestry = Ancestry(store)
    last, first = (store.find(digest) for digest in (digests[-1], digests[0]))
    assert len(list(ancestry.down(last).walk())) == 1 + 2 * 29
    assert len(list(ancestry.up(first).walk())) == 1 + 2 * 29


def test_what_a_gate_hands_on_was_made_by_the_stage_before_it(tmp_path: Path):
    """The gate's kind of stage comes after `preference` in every listing, and its record is the newer one too."""
    from artifacts import Record
    from flows.ancestry import Ancestry

    store = open_store(str(tmp_path / "store"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x").write_text("weights")
    identity = {"stage": "preference", "version": 1, "config": {}, "inputs": {}}
    model = store.put("model", tmp_path / "model", producer=identity)
    gated = {"stage": "gate", "version": 1, "config": {}, "inputs": {"model": [model.digest]}}
    for uses, its in (("gate", gated), ("preference", identity)):
        provenance = {"stage_name": uses}
        store.append_record(Record(uses, f"{len(uses):064x}", its, {"model": model}, provenance=provenance))
        ancestry = Ancestry(store)
        assert ancestry.down(model).uses == uses, "whoever is known; of both, the one that made it"


def test_the_ledger_sums_what_ran_and_what_the_cache_saved(asked: Asked, capsys):
    """The second run made sft, more and judge, and had rows and base from the first."""
    first, second = asked.runs[0], asked.runs[1]
    found = asked.ask(capsys, "ledger", second["run"])
    assert {cost["stage"]: cost["state"] for cost in found["stages"]} == {
        "rows": "cached", "base": "cached", "sft": "ran", "more": "ran", "judge": "ran",
    }  # fmt: skip
    for name, cost in ((cost["stage"], cost) for cost in found["stages"]):
        timings = second["stages"][name]["timings"]
        assert cost["cpu_seconds"] == timings["cpu_seconds"]
        assert cost.get("tokens") == timings.get("tokens")
    made = [first["stages"][name]["timings"] for name in ("rows", "base")]
    assert found["saved"]["seconds"] == pytest.approx(sum(timings["seconds"] for timings in made))
    assert found["saved"]["cpu_seconds"] == pytest.approx(sum(timings["cpu_seconds"] for timings in made))
    ran = [second["stages"][name]["timings"] for name in ("sft", "more", "judge")]
    assert found["spent"]["tokens"] == sum(timings["tokens"] for timings in ran)
    # as the models say themselves: tokens of all steps
    trained = second["stages"]["sft"]["metrics"]["num_tokens"] + second["stages"]["more"]["metrics"]["num_tokens"]
    judged = second["stages"]["judge"]["timings"]["tokens"]
    assert found["spent"]["tokens"] == trained + judged


def test_the_ledger_of_an_artifact_counts_every_stage_behind_it_once(asked: Asked, capsys):
    found = asked.ask(capsys, "ledger", "@small/judge")
    assert [cost["stage"] for cost in found["stages"]] == ["rows", "base", "sft", "more", "judge"]
    expected = sum(entry["timings"]["cpu_seconds"] for entry in asked.runs[0]["stages"].values())
    assert found["spent"]["cpu_seconds"] == pytest.approx(expected)
    assert found["saved"] == {}
    assert "saved by the cache" in asked.show(capsys, "ledger")
    said = asked.show(capsys, "ledger", "nothing", status=2)
    assert said.startswith("posttrain: 'nothing' is neither a run nor an artifact: ")


def test_tokens_of_an_evaluation_are_those_of_prompts_and_completions(asked: Asked):
    """One token a character, one for the end of a completion: counted from the samples."""
    entry = asked.runs[0]["stages"]["judge"]
    folder = artifact_folder(asked.store, entry["outputs"]["evaluation"]["id"])
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    written = sum(sample["tokens"] for sample in samples)
    prompts = entry["timings"]["tokens"] - written
    assert prompts == sum(len(sample["prompt"]) for sample in samples) or prompts == sum(
        len(sample["prompt"]) + 1 for sample in samples
    )


def test_sums_leave_out_what_nobody_measured():
    bill = Bill.of(
        "x",
        [
            Cost("a", "ran", seconds=1.0, gpu_seconds=2.0),
            Cost("b", "failed", seconds=3.0),
            Cost("c", "cached", tokens=5),
        ],
    )
    assert bill.spent == {"seconds": 4.0, "gpu_seconds": 2.0}
    assert bill.saved == {"tokens": 5}
    assert "mfu" not in bill.to_json()["stages"][0]


def test_failed_stages_cost_what_they_took_and_skipped_ones_nothing():
    entry = {"timings": {}, "state": "failed", "seconds": 7.0}
    run = {
        "run": "r",
        "recipe": "small",
        "stages": {"a": entry, "b": {"timings": {"seconds": 9.0}, "state": "skipped", "seconds": 0.0}},
    }
    assert run_bill(run).spent == {"seconds": 7.0}


def test_the_report_shows_the_ledger(asked: Asked, capsys, tmp_path: Path):
    """Each stage's row and the sums, in the words of the command."""
    page = tmp_path / "page.html"
    assert asked.ask(capsys, "report", asked.runs[1]["run"], "-o", str(page))["report"] == str(page)
    section = page.read_text().split('<section id="costs">')[1].split("</section>")[0]
    bill = asked.ask(capsys, "ledger", asked.runs[1]["run"])
    tokens = {cost["stage"]: f"{cost['tokens']:,}" for cost in bill["stages"] if "tokens" in cost}
    for stage, count in tokens.items():
        row = section.split(f'data-stage="{stage}"')[1].split("</tr>")[0]
        assert f">{count}<" in row
    saved = section.split('data-sum="saved by the cache"')[1].split("</tr>")[0]
    assert f"{bill['saved']['cpu_seconds'] / 3600:.4f}" in saved
