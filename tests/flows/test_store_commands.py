"""The commands that look after a store: what they print, what they change, and the exit status."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from artifacts import Artifact, Record, Store, open_store
from flows import cli
from flows.tables import plain_table, show


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store that POSTTRAIN_STORE names."""
    monkeypatch.setenv("POSTTRAIN_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    return open_store(None)


def put(store: Store, content: str, days_old: float = 0, *inputs: Artifact) -> Artifact:
    folder = store.scratch / "job" / content
    folder.mkdir(parents=True)
    (folder / "a").write_text(content)
    producer = {"stage": "train", "inputs": {str(index): found.digest for index, found in enumerate(inputs)}}
    artifact = store.put("model", folder, producer=producer)
    past = store.files.now() - days_old * 86400
    for path in (f"{artifact.key}/manifest.json", artifact.key):
        os.utime(store.files.path(path), (past, past))
    return artifact


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_gc_says_what_and_why_and_deletes_only_when_told(store, capsys):
    base = put(store, "base", 50)
    kept, lost = put(store, "kept", 50, base), put(store, "lost", 50)
    store.set_alias("best", kept)
    young = put(store, "young")
    assert run("gc") == 0
    out = capsys.readouterr().out
    assert f"{lost.digest[:12]}" in out and "nothing that is kept needs it" in out
    assert "would go, nothing was changed; --delete deletes it" in out
    assert set(store.artifacts()) == {base, kept, lost, young}
    found = answer(capsys, "gc")
    reasons = {item["name"]: item["why"] for item in found["stays"] if item["what"] == "artifact"}
    assert reasons == {
        kept.key: "named @best",
        base.key: f"needed to make model {kept.digest[:12]}",
        young.key: "stored or used in the last 24 h",
    }
    assert [item["name"] for item in found["goes"]] == [lost.key] and "deleted" not in found
    found = answer(capsys, "gc", "--delete", "--grace-hours", "0")
    assert {item["name"] for item in found["deleted"]} >= {lost.key, young.key} and found["spared"] == []
    assert set(store.artifacts()) == {base, kept}
    with pytest.raises(SystemExit):
        run("gc", "--grace-hours", "-1")
    assert "expected a number of 0 or more" in capsys.readouterr().err


def test_gc_names_the_stage_of_a_checkpoint(store, capsys, tmp_path):
    for fingerprint in ("ab" * 32, "cd" * 32):
        (tmp_path / fingerprint).mkdir()
        (tmp_path / fingerprint / "state").write_text("x")
        store.checkpoints(fingerprint).save(1, tmp_path / fingerprint)
    store.write_run("run-1", {"recipe": "mine", "stages": {"sft": {"fingerprint": "ab" * 32, "state": "failed"}}})
    young = ("--grace-hours", "0", "--keep-days", "0")
    assert run("gc", *young) == 0
    out = capsys.readouterr().out
    assert "mine/sft work/abababababab " in out and f"work/{'cd' * 32}" in out
    found = answer(capsys, "gc", *young)["goes"]
    assert {item["name"]: item["of"] for item in found} == {f"work/{'ab' * 32}": "mine/sft", f"work/{'cd' * 32}": ""}


def test_ls_shows_the_newest(store, capsys):
    made = [put(store, str(number), days_old=number) for number in range(5)]
    found = answer(capsys, "ls", "--limit", "2")
    assert [entry["id"] for entry in found["artifacts"]] == [made[0].id, made[1].id] and found["total"] == 5
    assert len(answer(capsys, "ls", "--limit", "0")["artifacts"]) == 5
    assert answer(capsys, "ls", "--kind", "dataset")["artifacts"] == []
    assert run("ls", "--limit", "2") == 0
    assert "2 of 5 artifacts, newest first; --limit 0 shows all" in capsys.readouterr().out


def test_export_says_whose_record_lacks_an_output(store, capsys, tmp_path):
    model, rollouts = put(store, "model"), put(store, "rollouts")
    outputs = {"model": model, "rollouts": rollouts}
    store.append_record(Record("rl", "ab" * 32, {}, outputs, provenance={"stage_name": "grpo"}))
    assert run("export", model.id, str(tmp_path / "one")) == 0
    assert capsys.readouterr().out.endswith(
        "1 copied, 0 there already, 0 records\nno record of grpo: its output rollouts was not exported\n"
    )
    assert answer(capsys, "export", model.id, str(tmp_path / "two"), "--lineage")["left_out"] == []


def test_ls_of_a_kind_that_there_is_not(store, capsys):
    put(store, "a")
    assert run("ls", "--kind", "models") == 2
    assert "there is no kind 'models'; did you mean 'model'?; there are: adapter, " in capsys.readouterr().err
    assert answer(capsys, "ls", "--kind", "adapter")["artifacts"] == []  # a kind of which there is none yet


def test_du_export_import_and_verify(store, capsys, tmp_path):
    base = put(store, "base")
    model = put(store, "model", 0, base)
    store.set_alias("best", model)
    found = answer(capsys, "du")
    assert found["artifacts"] == 2 and found["tables"]["alias"][0]["name"] == "@best"
    assert found["tables"]["alias"][0]["size"] == found["size"]
    assert run("du") == 0 and "2 artifacts" in capsys.readouterr().out
    moved = answer(capsys, "export", "@best", str(tmp_path / "out"), "--lineage")
    assert moved["copied"] == [base.id, model.id]
    elsewhere = str(tmp_path / "elsewhere")
    assert run("import", str(tmp_path / "out"), "--store", elsewhere) == 0
    assert capsys.readouterr().out.endswith("2 copied, 0 there already, 0 records\nnamed: @best\n")
    assert open_store(elsewhere).aliases() == {"best": model}
    open_store(elsewhere).set_alias("best", base)  # somebody's own name is not taken from them
    assert run("import", str(tmp_path / "out"), "--store", elsewhere) == 0
    assert capsys.readouterr().out == (
        "0 copied, 2 there already, 0 records\nnamed otherwise there, and left so: @best\n"
    )
    assert open_store(elsewhere).aliases() == {"best": base}
    assert set(open_store(elsewhere).artifacts()) == {base, model}
    assert run("verify", "--store", elsewhere) == 0
    assert "2 artifacts, 1 alias checked, 0 damaged" in capsys.readouterr().out
    open_store(elsewhere).set_alias("base", base)
    assert run("verify", "--store", elsewhere) == 0
    assert "2 artifacts, 2 aliases checked, 0 damaged" in capsys.readouterr().out
    path = store.files.path("aliases/best.json")
    path.write_bytes(path.read_bytes().replace(b"best", b"bEst"))
    assert run("verify", "--json") == 1
    streams = capsys.readouterr()
    assert json.loads(streams.out)["by_kind"] == {"artifact": 2, "alias": 1}
    assert list(json.loads(streams.out)["damaged"]) == ["aliases/best.json"] and "is damaged" in streams.err
    assert run("import", str(tmp_path)) == 2 and "no exported folder" in capsys.readouterr().err


def test_names_as_commands_take_them_each_once(store, capsys):
    model, rollouts = put(store, "model"), put(store, "rollouts")
    for name, artifact in {"mine/dpo": model, "mine/dpo.model": model, "mine/dpo.rollouts": rollouts}.items():
        store.set_alias(name, artifact)
    assert run("ls") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if model.digest[:12] in line] == ["@mine/dpo"]
    assert [line.split()[-1] for line in lines if rollouts.digest[:12] in line] == ["@mine/dpo.rollouts"]
    assert not [line for line in lines if "mine/dpo.model" in line]
    assert run("show", "@mine/dpo") == 0
    assert ["aliases", "@mine/dpo"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert run("lineage", "@mine/dpo.rollouts") == 0
    assert capsys.readouterr().out.startswith("@mine/dpo.rollouts ")


@pytest.mark.parametrize(("columns", "width"), [("60", 60), ("130", 130), (None, 200), ("many", 200)])
def test_a_pipe_is_as_wide_as_columns_says_and_its_lines_end_with_their_text(
    capsys, monkeypatch: pytest.MonkeyPatch, columns: str | None, width: int
):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    table = plain_table("name", "words")
    table.add_row("a", "x" * 300)
    table.add_row("b", "short")
    show(table)
    lines = capsys.readouterr().out.splitlines()
    first = lines[1].count("x")
    assert len(lines[1]) == width and sum(line.count("x") for line in lines) == 300
    assert lines[0] == "name" + " " * (width - first - 4) + "words" and lines[-1].split() == ["b", "short"]
    assert all(line == line.rstrip() for line in lines)
