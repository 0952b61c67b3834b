"""Uploads to a Hub of this machine, which speaks the real one's protocol to the real client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from artifacts.errors import StageError, UnreachableError
from stages.hub_asking import Repository, asked
from stages.push_to_hub import Config, check
from tests.stages.fake_hub import TOKEN, FakeHub, Held
from tests.stages.hub_pushes import MODEL, push, use
from tests.stages.small_models import save_model

NOTE = ".posttrain/model/pushed.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_model(folder, 1)
    (folder / "samples.jsonl").write_text('{"prompt": "a row"}\n')
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def contents(folder: Path, *left: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in left}


def test_a_model_goes_whole_and_nothing_that_quotes_rows(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    said = push(tmp_path / "run", {"model": model})
    held = hub.repositories[MODEL]
    assert held.private and held.head("main") == said["commit"] and len(held.messages) == 1
    found = dict(held.branches["main"])
    assert json.loads(found.pop(NOTE))["files"] == sorted(set(found) - {"README.md"})
    card = found.pop("README.md").decode()
    assert found == contents(model, "samples.jsonl", "metrics.jsonl") and "model.safetensors" in found
    assert card.startswith(
        "---\nlibrary_name: transformers\ntags:\n- posttrain\n---\n\n# name\n\nMade by posttrain: model `"
    )
    assert held.messages[0].startswith("posttrain ") and held.messages[0].removeprefix("posttrain ") in card
    assert set(said["files"]) == {*found, NOTE} and said["url"].endswith(said["commit"])


def test_records_go_too_if_asked_for(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    (model / "README.md").write_text("of the artifact")
    push(tmp_path / "run", {"model": model}, records=True, commit_message="with all")
    found = dict(hub.repositories[MODEL].branches["main"])
    assert found.pop(NOTE) and found == contents(model)
    assert hub.repositories[MODEL].messages == ["with all"]


def test_old_weights_do_not_stay_beside_new_ones(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    """What somebody else put there stays."""
    before = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"2", "picture.png": b"3"}
    hub.repositories[MODEL] = Held(True, {"main": dict(before)})
    push(tmp_path / "run", {"model": model})
    now = hub.repositories[MODEL].branches["main"]
    assert set(before) & set(now) == {"picture.png"} and now["picture.png"] == b"3"
    assert now["model.safetensors"] == (model / "model.safetensors").read_bytes()


def test_a_branch_of_its_own(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    for folder in ("first", "again"):
        push(tmp_path / folder, {"model": model}, branch="nightly")
    held = hub.repositories[MODEL]
    assert held.branches["main"] == {} and "model.safetensors" in held.branches["nightly"]


def test_what_is_public_gets_nothing_private(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    hub.repositories[MODEL] = Held(private=False)
    with pytest.raises(StageError, match="is public on the Hub, and private is true: nothing was uploaded"):
        push(tmp_path / "run", {"model": model})
    assert hub.repositories[MODEL].branches["main"] == {} and not hub.blobs


def test_what_the_hub_has_is_looked_at(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    for name, spoil in {
        "config.json": lambda files: files.update({"config.json": b"{}"}),
        "model.safetensors": lambda files: files.update({"model.safetensors": b"other"}),
        "tokenizer.json": lambda files: files.pop("tokenizer.json"),
    }.items():
        hub.spoil = spoil
        with pytest.raises(StageError, match=f"of the Hub has {name} with other content than was sent"):
            push(tmp_path / name, {"model": model})


@pytest.mark.parametrize(
    ("part", "status", "error", "said"),
    [
        (
            "/api/repos/create",
            403,
            StageError,
            r"the Hub refuses to write model 'owner/name' \(HTTP 403: refused\); set",
        ),
        ("/commit/", 400, StageError, r"the Hub refuses to write .* \(HTTP 400\): refused"),
        ("/commit/", 503, UnreachableError, r"the Hub at \S+ does not take .* at present \(HTTP 503\)"),
        ("/upload/", 500, UnreachableError, r"the Hub at \S+ does not"),
    ],
)
def test_what_the_hub_refuses_is_said(
    hub: FakeHub, tmp_path: Path, model: Path, part: str, status: int, error: type[Exception], said: str
) -> None:
    """And nothing of it is there; what may pass is tried again by the run."""
    hub.status = {part: status}
    with pytest.raises(error, match=said) as caught:
        push(tmp_path / "run", {"model": model})
    assert TOKEN not in str(caught.value)
    assert all(not held.branches["main"] for held in hub.repositories.values())


def test_a_token_is_needed_and_never_said(
    hub: FakeHub, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(StageError, match=r"HTTP 401") as caught:
        push(tmp_path / "other", {"model": model})
    assert "hf_another" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_sécret")
    with pytest.raises(StageError, match=r"^HF_TOKEN holds characters that no token has") as caught:
        push(tmp_path / "none", {"model": model})
    assert caught.value.__suppress_context__
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(StageError, match="there is no token to write model 'owner/name' of the Hub: set HF_TOKEN"):
        push(tmp_path / "without", {"model": model})


def test_nobody_answers(hub: FakeHub, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(
        UnreachableError,
        match=r"the Hub at http://127.0.0.1:9 does not answer for model 'owner/name' \(ConnectError\); check",
    ):
        push(tmp_path / "run", {"model": model})


def test_an_adapter_whose_base_nobody_else_has(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "sha256:" + "a" * 64}
    (model / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match=r"the adapter is on sha256:a+, which only this store has"):
        push(tmp_path / "run", {"model": model})
    assert not hub.requests


@pytest.mark.parametrize("wired", [set(), {"model", "dataset"}])
def test_it_takes_one_input(wired: set[str]) -> None:
    assert check(Config(repo="a/b"), frozenset(wired)) == [
        f"takes one input, model (also an adapter or a reward model) or dataset; found {'both' if wired else 'neither'}"
    ]


@pytest.mark.parametrize("repo", ["name", "a/b/c", "../b", "a/b c", "/b", "a/b--c", "a/b..c", "a/b.git"])
def test_names_that_are_none(repo: str) -> None:
    with pytest.raises(ValueError, match="a Hub repository is owner/name"):
        Config(repo=repo)


def test_a_model_is_no_split() -> None:
    assert check(Config(repo="a/b", split="test"), frozenset({"model"})) == [
        "split is of datasets, and the input is a model; leave it out, found 'test'"
    ]


@pytest.mark.parametrize("address", ["huggingface.co", "https://name:secret@host", "https://host?a=b", "ftp://host"])
def test_addresses_that_are_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password is not quoted."""
    with pytest.raises(ValueError, match="a Hub is http") as caught:
        Config(repo="a/b", endpoint=address)
    assert "secret@" not in str(caught.value.errors()[0]["msg"])  # type: ignore[attr-defined]
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(ValueError, match="HF_ENDPOINT is http"):
        Config(repo="a/b")


def test_the_address_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert Config(repo="a/b").endpoint == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "http://hub:8080/path/")
    assert Config(repo="a/b").endpoint == "http://hub:8080/path"
    assert Config(repo="a/b", endpoint="https://other").endpoint == "https://other"


@pytest.mark.parametrize("mistake", [TypeError("a bug"), KeyError("a bug"), FileNotFoundError("a file of ours")])
def test_mistakes_are_not_taken_for_a_hub_that_does_not_answer(mistake: Exception) -> None:
    def ask() -> None:
        raise mistake

    with pytest.raises(type(mistake)) as caught:
        asked(Repository("a/b", "model", True, "main", "http://hub"), ask)
    assert caught.value is mistake
