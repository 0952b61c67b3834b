"""Datasets on a Hub of this machine, read as people read them: by `datasets.load_dataset`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from artifacts.errors import RequestError
from flows.recipe import Recipe
from stages.push_to_hub import Config
from tests.in_process import run_here, states
from tests.stages.fake_hub import FakeHub, Held
from tests.stages.hub_pushes import ROWS, push, snapshot
from tests.stages.small_models import save_dataset


def rows(folder: Path, *prompts: str) -> Path:
    return save_dataset(folder, "prompt", [{"prompt": prompt} for prompt in prompts])


def loaded(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Split -> prompts."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
    files = hub.repositories[ROWS].branches["main"]
    found = datasets.load_dataset(str(snapshot(files, folder / "down")), cache_dir=str(folder / "cache"))
    return {str(split): list(table["prompt"]) for split, table in found.items()}


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("page", [None, b"# by hand\n"], ids=["our page", "a page by hand"])
def test_rows_load(
    hub: FakeHub, tmp_path: Path, records: bool, page: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what the artifact has of how it was made."""
    made = rows(tmp_path / "rows", "a", "b")
    (made / "samples.jsonl").write_text('{"prompt": "a"}\n')
    (made / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    if page is not None:
        hub.repositories[ROWS] = Held(False, {"main": {"README.md": page}})
    said = push(tmp_path / "run", {"dataset": made}, private=False, records=records)
    held = hub.repositories[ROWS].branches["main"]
    assert said["kind"] == "dataset" and not hub.repositories[ROWS].private
    assert ("samples.jsonl" in str(sorted(held))) is records and ("ledger.json" in str(sorted(held))) is records
    assert page is None or held["README.md"] == page
    assert loaded(hub, tmp_path, monkeypatch) == {"train": ["a", "b"]}


def test_splits_of_one_repository(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A push replaces its own; the page names all."""
    first = push(tmp_path / "1", {"dataset": rows(tmp_path / "train", "a")}, records=True)
    second = push(tmp_path / "2", {"dataset": rows(tmp_path / "test", "b")}, split="test")
    assert not set(first["files"]) & set(second["files"])
    assert loaded(hub, tmp_path / "both", monkeypatch) == {"train": ["a"], "test": ["b"]}
    page = hub.repositories[ROWS].branches["main"]["README.md"].decode()
    assert "  - split: test\n    path: data/test-*\n  - split: train\n    path: data/train-*\n---" in page
    push(tmp_path / "3", {"dataset": rows(tmp_path / "more", "c", "d")})
    assert loaded(hub, tmp_path / "again", monkeypatch) == {"train": ["c", "d"], "test": ["b"]}
    assert ".posttrain/train/ledger.json" not in hub.repositories[ROWS].branches["main"]


def test_rows_in_several_files(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, and where there are fewer of them the next time, none is left."""
    made, second = rows(tmp_path / "rows", "a"), rows(tmp_path / "second", "b")
    (made / "rows-b.parquet").write_bytes((made / "data.parquet").read_bytes())
    (made / "rows-a.parquet").write_bytes((second / "data.parquet").read_bytes())
    (made / "data.parquet").unlink()
    described = json.loads((made / "dataset.json").read_text())
    (made / "dataset.json").write_text(
        json.dumps({**described, "rows": 2, "files": ["rows-b.parquet", "rows-a.parquet"]})
    )
    push(tmp_path / "1", {"dataset": made})
    assert loaded(hub, tmp_path / "1", monkeypatch) == {"train": ["a", "b"]}
    push(tmp_path / "2", {"dataset": second})
    assert loaded(hub, tmp_path / "2", monkeypatch) == {"train": ["b"]}


def test_what_version_1_left_goes(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"data.parquet": b"1", "dataset.json": b"{}", "pictures/data.parquet": b"2"}
    hub.repositories[ROWS] = Held(True, {"main": dict(old)})
    push(tmp_path / "1", {"dataset": rows(tmp_path / "rows", "a")})
    assert set(old) & set(hub.repositories[ROWS].branches["main"]) == {"pictures/data.parquet"}


def test_both_splits_of_a_recipe(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pushed once, and each stays cached whatever the other one did after it."""
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{letter}"}}\n' for letter in "abc"))
    stages: dict[str, Any] = {
        "rows": {"uses": "normalize", "with": {"source": {"path": "rows.jsonl"}, "type": "prompt", "test_size": 1}}
    }
    for split in ("train", "test"):
        to = {"repo": "owner/name", "split": split, "records": True}
        stages[split] = {"uses": "push_to_hub", "inputs": {"dataset": f"rows.{split}"}, "with": to}
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "r", "stages": stages}))
    assert states(run_here(tmp_path / "r.yaml", tmp_path / "store")) == dict.fromkeys(stages, "ran")
    assert states(run_here(tmp_path / "r.yaml", tmp_path / "store")) == dict.fromkeys(stages, "cached")
    found = loaded(hub, tmp_path, monkeypatch)
    assert (len(found["train"]), len(found["test"])) == (2, 1) and sorted(found["train"] + found["test"]) == [
        "a",
        "b",
        "c",
    ]


@pytest.mark.parametrize("split", ["a-b", "", "1", "a/b"])
def test_names_that_are_no_split(split: str) -> None:
    with pytest.raises(ValueError, match="split"):
        Config(repo="a/b", split=split)


def test_two_stages_that_write_the_same_are_refused(tmp_path: Path) -> None:
    """Both would be the same split of the same branch, and the last one would be left."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')

    def recipe(**settings: str) -> Recipe:
        rows = {"uses": "normalize", "with": {"source": {"path": "rows.jsonl"}, "type": "prompt", "test_size": 1}}
        stages = {
            "rows": rows,
            "first": {"uses": "push_to_hub", "inputs": {"dataset": "rows.train"}, "with": {"repo": "me/x"}},
            "second": {"uses": "push_to_hub", "inputs": {"dataset": "rows.test"}, "with": {"repo": "me/x", **settings}},
        }
        return Recipe.from_dict({"name": "r", "stages": stages}, base=tmp_path)

    said = r"stages.second.with: writes dataset 'me/x' of \S+, branch 'main', split train, as first does: the last"
    with pytest.raises(RequestError, match=said):
        recipe()
    with pytest.raises(RequestError, match=said):
        recipe(split="train")
    assert list(recipe(split="test").stages) == ["rows", "first", "second"]
    assert list(recipe(branch="other").stages) == ["rows", "first", "second"]
