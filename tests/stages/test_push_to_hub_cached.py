"""When a recipe uploads again: what an earlier run put on the Hub counts as long as it is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from artifacts import open_store
from flows.decision import Decision
from flows.plan import plan
from flows.recipe import Recipe
from flows.why import why_in_plan
from tests.in_process import failures, run_here
from tests.stages.fake_hub import TOKEN, FakeHub, fake_hub
from tests.stages.hub_pushes import MODEL, use
from tests.stages.small_models import save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate("AB"):
        save_model(tmp_path / name, seed)
    return tmp_path


def recipe(folder: Path, model: str = "A") -> Path:
    up = {"uses": "push_to_hub", "inputs": {"model": f"./{model}"}, "with": {"repo": "owner/name"}}
    (folder / "recipe.yaml").write_text(json.dumps({"name": "r", "stages": {"up": up}}))
    return folder / "recipe.yaml"


def pushed(folder: Path, model: str = "A") -> str:
    payload = run_here(recipe(folder, model), folder / "store")
    assert payload["state"] == "ok", payload
    return str(payload["stages"]["up"]["state"])


def decided(folder: Path, model: str = "A") -> Decision:
    return plan(Recipe.load(str(recipe(folder, model))), open_store(str(folder / "store"))).decisions["up"]


def has(hub: FakeHub, folder: Path, model: str) -> bool:
    return hub.repositories[MODEL].branches["main"]["model.safetensors"] == (
        (folder / model / "model.safetensors").read_bytes()
    )


def test_what_is_there_is_not_sent_again(hub: FakeHub, folder: Path) -> None:
    """The token is written nowhere, the commit is."""
    assert pushed(folder) == "ran"
    sent, commit = len(hub.uploads), hub.repositories[MODEL].head("main")
    assert decided(folder).state == "cached"
    hub.repositories[MODEL].branches["main"] |= {"README.md": b"by hand", "picture.png": b"1"}
    assert pushed(folder) == "cached" and len(hub.uploads) == sent
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert any(commit.encode() in content for content in files)
    assert not any(TOKEN.encode() in content for content in files)


def test_back_to_what_was_there_before(hub: FakeHub, folder: Path) -> None:
    """A, B and A again, each of which the store has."""
    for model in "ABAB":
        decision = decided(folder, model)
        assert decision.state == "run"
        assert pushed(folder, model) == "ran" and has(hub, folder, model)
        assert pushed(folder, model) == "cached" and has(hub, folder, model)
    found = why_in_plan(plan(Recipe.load(str(recipe(folder, "A"))), open_store(str(folder / "store"))), "up")
    assert [cause.text for cause in found.causes] == [
        f"branch 'main' of model 'owner/name' at {hub.url} does not have what was pushed: other content or none in "
        "model.safetensors, .posttrain/model/pushed.json"
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model-00001-of-00002.safetensors": b"1"}, "model-00001-of-00002.safetensors beside it"),
        ({"adapter_config.json": b"{}"}, "adapter_config.json beside it"),
        ({"config.json": b"{}"}, "other content or none in config.json"),
    ],
)
def test_what_others_did_to_it_is_seen(hub: FakeHub, folder: Path, change: dict[str, bytes], said: str) -> None:
    pushed(folder)
    before = dict(hub.repositories[MODEL].branches["main"])
    hub.repositories[MODEL].branches["main"] |= change
    assert said in decided(folder).reasons[0]
    assert pushed(folder) == "ran" and hub.repositories[MODEL].branches["main"] == before


def test_a_repository_that_is_gone(hub: FakeHub, folder: Path) -> None:
    pushed(folder)
    del hub.repositories[MODEL]
    assert decided(folder).reasons == (
        f"branch 'main' of model 'owner/name' at {hub.url} is not there, or not for this token",
    )
    assert pushed(folder) == "ran" and has(hub, folder, "A")


def test_another_hub_has_nothing_of_it(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(folder)
    with fake_hub() as second:
        use(monkeypatch, second.url)
        assert decided(folder).reasons == (f"with.endpoint: {hub.url} -> {second.url}",)
        assert pushed(folder) == "ran" and has(second, folder, "A")
    use(monkeypatch, hub.url)
    assert pushed(folder) == "cached"


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_cannot_be_asked(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    """Nothing is guessed: the plan says so, the run fails, and where it can be asked again nothing is sent twice."""
    pushed(folder)
    sent = len(hub.uploads)
    if offline:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        why = "HF_HUB_OFFLINE forbids to read model 'owner/name'; unset it"
    else:
        hub.status = {"/api/": 503}
        why = f"the Hub at {hub.url} does not take model 'owner/name' at present (HTTP 503)"
    decision = decided(folder)
    assert decision.state == "run" and decision.reasons[0].startswith("whether what run ")
    assert f"still stands cannot be seen: {why}. It is done again at its turn" in decision.reasons[0]
    payload = run_here(recipe(folder), folder / "store")
    assert payload["state"] == "failed" and ("HF_HUB_OFFLINE forbids to write" in failures(payload)["up"]) is offline
    hub.status = {}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert pushed(folder) == "cached" and len(hub.uploads) == sent
