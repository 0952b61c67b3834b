"""`posttrain reproduce` in real processes: the same digest, and after a planted change its name."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from artifacts import Artifact, open_store
from artifacts.errors import RequestError
from flows.file_differences import differing_files
from flows.reproduce import _anywhere, reproduce
from tests.flows.asked_runs import Asked, make_asked

PLANTED = """
from stages import seeds
derive = seeds.derive
seeds.derive = lambda seed, *purpose: derive(seed + 1, *purpose)
"""
"""Another order of the rows, and other draws, under the same configuration: what no manifest shows."""


def test_a_trained_model_is_made_again_bit_for_bit(asked: Asked, capsys, tmp_path: Path):
    """Its inputs are only in the store, and the store is left as it was."""
    store = open_store(str(asked.store))
    before = {artifact.id for artifact in store.artifacts()}, len(store.stage_records("sft"))
    folder = tmp_path / "again"
    found = asked.ask(capsys, "reproduce", "@small/sft", "--folder", str(folder))
    model = store.find("@small/sft")
    assert (found["same"], found["made"], found["files"]) == (True, model.id, {})
    assert (found["metrics"], found["surroundings"]) == ([], [])
    assert open_store(str(folder / "store")).verify(model) == []
    assert ({artifact.id for artifact in store.artifacts()}, len(store.stage_records("sft"))) == before


def test_a_planted_change_is_named(asked: Asked, capsys, tmp_path: Path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "again"
    found = asked.ask(capsys, "reproduce", "@small/more", "--folder", str(folder), status=1)
    assert not found["same"]
    assert set(found["files"]) == {"metrics.jsonl", "model.safetensors", "steps.jsonl"}
    assert found["files"]["metrics.jsonl"].startswith("from line 1: loss ")
    assert found["files"]["steps.jsonl"].startswith("from line 1: rows ")
    assert "tensors differ, by at most" in found["files"]["model.safetensors"]
    metrics = {row["name"]: row for row in found["metrics"]}
    old = asked.runs[0]["stages"]["more"]["metrics"]["loss"]
    last = (folder / "store").glob("artifacts/model/*/files/metrics.jsonl")
    new = json.loads(next(last).read_text().splitlines()[-1])["loss"]
    assert (metrics["loss"]["then"], metrics["loss"]["now"]) == (old, new)
    assert found["surroundings"] == []


def test_data_and_code_are_found_by_content_wherever_they_went(tmp_path: Path, capsys, monkeypatch):
    """The file has moved and has another name; what lies in its old place is another file. Fields that are no part of
    the result are as they were, those of a reward too."""
    (tmp_path / "home").mkdir()
    asked = make_asked(tmp_path / "home")
    asked.run("judge.limit=4", "judge.rewards=[{name: 'code.py:right', cache: false}]")
    away = tmp_path / "archive" / "2026"
    away.mkdir(parents=True)
    shutil.move(asked.rows, away / "old.jsonl")
    asked.rows.write_text('{"prompt": "x", "completion": "y"}\n')
    monkeypatch.chdir(tmp_path / "home")
    said = asked.show(capsys, "reproduce", "@small/rows", status=2)
    sha256 = open_store(str(asked.store)).manifest(open_store(str(asked.store)).find("@small/rows"))
    digest = sha256.producer["config"]["source"]["path"]["sha256"]
    assert said.startswith(f"posttrain: with.source.path: no data with SHA-256 {digest[:12]} (.jsonl) under ")
    assert "--files" in said
    shown = asked.show(capsys, "reproduce", "@small/rows", "--files", str(tmp_path / "archive"))
    assert shown.startswith("normalize made dataset ") and "again, bit for bit" in shown
    assert not list((asked.store / "scratch").glob("reproduce-*"))  # nothing is left of what was the same
    code = tmp_path / "home" / "code.py"
    shutil.move(code, away / "rewards_of_last_year.py")
    code.write_text("def right(prompts, completions, **_):\n    return [0.0] * len(prompts)\n")
    said = asked.show(capsys, "reproduce", "@small/judge", "--files", str(tmp_path / "home"), status=2)
    assert "with.rewards.0" in said and "no code of a function right with SHA-256" in said
    # the name of a file is part of the identity of code, so it has to be as it was
    shutil.move(away / "rewards_of_last_year.py", away / "code.py")
    found: list[dict] = []

    def start(spec, launch):
        found.append(spec)
        raise RequestError("far enough")

    store = open_store(str(asked.store))
    with served(away) as url:
        for name, place in (
            ("rows", f"{url}/old.jsonl"),
            ("rows", f"file://{away.parent}"),
            ("judge", f"{url}/code.py"),
            ("judge", away),
        ):
            with pytest.raises(RequestError, match="far enough"):
                reproduce(store, store.find(f"@small/{name}"), tmp_path / "work", files=[place], start=start)
        with pytest.raises(RequestError, match=r"--files http\S+/nothing: "):
            reproduce(store, store.find("@small/rows"), tmp_path / "work", files=[f"{url}/nothing?key=s3cret"])
    # data is read where it is, code is loaded from a copy
    assert found.pop(0)["config"]["source"]["path"] == f"{url}/old.jsonl"
    assert found.pop(0)["config"]["source"]["path"] == f"file://{away}/old.jsonl"
    assert f"{tmp_path / 'work' / 'fetched' / '0.py' / 'code.py'}:right" in json.dumps(
        found.pop(0)["config"]["rewards"]
    )
    rewards = json.dumps(found[0]["config"]["rewards"])
    assert f"{away / 'code.py'}:right" in rewards
    assert found[0]["config"]["limit"] == 4 and found[0]["config"]["rewards"][0]["cache"] is False
    assert found[0]["inputs"]["model"] == {"artifact": store.find("@small/more").id, "kind": "model"}
    assert found[0]["inputs_store"] == store.url and found[0]["store"] != store.url


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder at an http address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_no_stage_made_is_refused(asked: Asked, capsys, tmp_path: Path):
    store = open_store(str(tmp_path / "store"))
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    made = store.put("model", folder, producer={"stage": "by hand", "version": 1, "config": {}, "inputs": {}})
    with pytest.raises(RequestError, match="was made by no stage of this posttrain, but by 'by hand'"):
        reproduce(store, made, tmp_path / "work")


def test_an_input_that_is_gone_is_named(asked: Asked, tmp_path: Path):
    """A store with the model's manifest and nothing of what it was made from."""
    store, alone = open_store(str(asked.store)), open_store(str(tmp_path / "alone"))
    model = store.find("@small/sft")
    copy = tmp_path / "copy"
    shutil.copytree(store.materialize(model), copy)
    alone.adopt(store.manifest(model), copy)
    dataset = store.find("@small/rows")
    with pytest.raises(RequestError) as refused:
        reproduce(alone, model, tmp_path / "work", files=[tmp_path / "copy"])
    assert str(refused.value).startswith(
        f"input dataset is neither in {alone.url} nor at hand: no folder with the content "
    )
    assert dataset.digest[:12] in str(refused.value)


def put(store, folder: Path, files: dict[str, bytes]) -> Artifact:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return store.put("model", folder, producer={})


def test_differences_of_files_in_words(tmp_path: Path):
    """One value of one tensor differs by 0.5; one number of the second line; a file is new, one is gone."""
    import numpy
    from safetensors.numpy import save

    def weights(value: float) -> bytes:
        return save({"a": numpy.array([1.0, value], dtype="float32"), "b": numpy.zeros(3, dtype="float32")})

    store = open_store(str(tmp_path / "store"))
    lines = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": %s}\n'
    old = put(store, tmp_path / "old", {
        "w.safetensors": weights(1.0), "m.jsonl": lines % b"1.5", "c.json": b'{"x": {"y": 1}}',
        "gone": b"", "same": b"s",
    })  # fmt: skip
    new = put(store, tmp_path / "new", {
        "w.safetensors": weights(1.5), "m.jsonl": lines % b"1.25", "c.json": b'{"x": {"y": 2}}',
        "new": b"", "same": b"s",
    })  # fmt: skip
    assert differing_files(store, store.manifest(old), store, store.manifest(new)) == {
        "w.safetensors": "1 of 2 tensors differ, by at most 0.5",
        "m.jsonl": "from line 2: loss 1.5 -> 1.25",
        "c.json": "x.y 1 -> 2",
        "gone": "is not there any more",
        "new": "is new",
    }


@pytest.mark.parametrize("arguments", [("reproduce",), ("trace",), ("lineage",), ("trace", "x", "--limit", "-1")])
def test_what_is_missing_is_said(arguments, capsys):
    from flows import cli

    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    assert left.value.code == 2
    assert os.linesep in capsys.readouterr().err


def test_places_of_the_run_are_not_looked_for_again() -> None:
    then = {
        "rollouts": {"urls": ["http://gone:1"], "servers": 2},
        "weight_averaging": {"device": "cpu"},
        "devices": "3",
    }
    assert _anywhere(then) == {"rollouts": {"servers": 2}, "weight_averaging": {"device": "cpu"}}
