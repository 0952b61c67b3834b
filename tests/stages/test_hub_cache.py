"""What a name of the Hub means where the Hub cannot be asked: never another commit than the one it meant."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from artifacts import open_store
from artifacts.errors import RequestError
from flows.plan import plan
from flows.recipe import Recipe
from stages.hub import hub_folder, hub_revision
from stages.hub_cache import noted
from tests.stages.fake_hub import TOKEN, FakeHub, Held
from tests.stages.small_models import save_dataset

MAIN, PINNED = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a cache in which a commit was fetched after the one that `main` is."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    for kind in ("model", "dataset"):
        for commit in (MAIN, PINNED):
            keep(tmp_path / "hub" / f"{kind}s--owner--name", commit)


def keep(repository: Path, commit: str) -> None:
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    (repository / "blobs" / commit).write_text("{}")
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").symlink_to(f"../../blobs/{commit}")


def name_main(folder: Path, kind: str) -> None:
    refs = folder / "hub" / f"{kind}s--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text(MAIN)


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_the_branch_counts_and_not_what_was_fetched_last(tmp_path: Path, kind: str) -> None:
    name_main(tmp_path, kind)
    with noted() as notes:
        assert hub_revision("owner/name", kind) == MAIN
    assert notes == [
        f"the Hub cannot be reached (ConnectError): {kind} 'owner/name' is taken at commit {MAIN}, its main branch "
        "when the local cache last saw it"
    ]


def test_commits_that_no_branch_is_known_to_be_are_named(tmp_path: Path) -> None:
    said = (
        rf"does not answer for model 'owner/name' .*none is known to be its branch main: {MAIN}, {PINNED}; name one: "
    )
    with pytest.raises(RequestError, match=said):
        hub_revision("owner/name", "model")


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_a_hub_that_answers_is_not_passed_over(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    name_main(tmp_path, "model")
    hub.status = {"owner/name": status}
    with pytest.raises(RequestError):
        hub_revision("owner/name", "model")


def test_what_was_fetched_is_found_again(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage fetches by the commit, of which the client does not note what branch it was."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.repositories["models/owner/other"] = Held(True, {"main": {"config.json": b"{}"}})
    commit = hub_revision("owner/other", "model")
    assert (hub_folder("owner/other", commit, "main") / "config.json").read_bytes() == b"{}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert hub_revision("owner/other", "model") == commit


def test_the_plan_says_it(tmp_path: Path) -> None:
    """Of inputs and of rows."""
    name_main(tmp_path, "model")
    name_main(tmp_path, "dataset")
    save_dataset(tmp_path / "rows", "prompt_completion", [{"prompt": "a", "completion": "b"}])
    stages = {
        "rows": {"uses": "normalize", "with": {"source": {"path": "hub:owner/name"}, "type": "prompt"}},
        "tuned": {"uses": "sft", "inputs": {"model": "owner/name", "dataset": "./rows"}, "with": {"max_steps": 1}},
        "after": {"uses": "sft", "inputs": {"model": "tuned", "dataset": "./rows"}, "with": {"max_steps": 1}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "r", "stages": stages}))
    made = plan(Recipe.load(str(tmp_path / "recipe.yaml")), open_store(str(tmp_path / "store")))
    told = {name: "; ".join(decision.reasons) for name, decision in made.decisions.items()}
    assert f"dataset 'owner/name' is taken at commit {MAIN}" in told["rows"]
    assert f"model 'owner/name' is taken at commit {MAIN}" in told["tuned"]
    assert "is taken at commit" not in told["after"]
    again = made.decide("tuned", {})
    assert f"model 'owner/name' is taken at commit {MAIN}" in "; ".join(again.reasons)
    assert TOKEN not in str(told)
