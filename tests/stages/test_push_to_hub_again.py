"""Pushes to a repository that has something already: of ours, of somebody else, of somebody at the same time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from artifacts.errors import StageError, UnreachableError
from tests.stages.fake_hub import FakeHub, Held
from tests.stages.hub_pushes import MODEL, push, snapshot
from tests.stages.small_models import save_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", 1)
    return tmp_path / "model"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    save_model(tmp_path / "other", 2)
    return tmp_path / "other"


@pytest.fixture
def adapter(tmp_path: Path, model: Path) -> Path:
    """On a model of the Hub."""
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, task_type="CAUSAL_LM"))
    made.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").unlink()
    config = tmp_path / "adapter" / "adapter_config.json"
    base = {"base_model_name_or_path": "some/base", "revision": "a" * 40}
    config.write_text(json.dumps({**json.loads(config.read_text()), **base}))
    return tmp_path / "adapter"


def branch(hub: FakeHub) -> dict[str, bytes]:
    return hub.repositories[MODEL].branches["main"]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_model_after_an_adapter_loads(hub: FakeHub, tmp_path: Path, adapter: Path, model: Path) -> None:
    """And an adapter after a model is an adapter, with nothing of the model left."""
    push(tmp_path / "1", {"model": adapter})
    branch(hub)["notes.md"] = b"by hand"
    push(tmp_path / "2", {"model": model})
    assert "adapter_config.json" not in branch(hub) and branch(hub)["notes.md"] == b"by hand"
    loaded = AutoModelForCausalLM.from_pretrained(snapshot(branch(hub), tmp_path / "down"), local_files_only=True)
    loaded.save_pretrained(tmp_path / "loaded")
    assert weights(tmp_path / "loaded") == weights(model)
    push(tmp_path / "3", {"model": adapter})
    left = {name for name in branch(hub) if not name.startswith(".posttrain/")}
    assert left == {"README.md", "notes.md", "adapter_config.json", "adapter_model.safetensors"}
    assert b"library_name: peft" in branch(hub)["README.md"]


def test_what_an_earlier_push_made_goes_and_what_a_person_put_there_stays(
    hub: FakeHub, tmp_path: Path, model: Path, other: Path
) -> None:
    """A chat template, code, records that quote rows; a person's files in folders, of whatever name."""
    (model / "additional_chat_templates.jinja").write_text("old")
    (model / "modeling_own.py").write_text("old")
    (model / "samples.jsonl").write_text("{}\n")
    push(tmp_path / "1", {"model": model}, records=True)
    by_hand = {"step-10/model.safetensors": b"1", "picture.png": b"2", "step-10/config.json": b"3"}
    branch(hub).update(by_hand)
    push(tmp_path / "2", {"model": other})
    assert not {"additional_chat_templates.jinja", "modeling_own.py", "samples.jsonl"} & set(branch(hub))
    assert by_hand.items() <= branch(hub).items() and branch(hub)["model.safetensors"] == weights(other)


def test_a_page_that_a_person_wrote_stays(hub: FakeHub, tmp_path: Path, model: Path, other: Path) -> None:
    push(tmp_path / "1", {"model": model})
    first = branch(hub)["README.md"]
    push(tmp_path / "2", {"model": other})
    second = branch(hub)["README.md"]
    assert first != second
    for index, page in enumerate([b"# by hand\n", second + b"\nIts license.\n", b"\xff"]):
        branch(hub)["README.md"] = page
        push(tmp_path / f"by hand {index}", {"model": model})
        assert branch(hub)["README.md"] == page and branch(hub)["model.safetensors"] == weights(model)
    del branch(hub)["README.md"]
    push(tmp_path / "none", {"model": model})
    assert branch(hub)["README.md"] == first


def test_a_page_of_version_1_is_known(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    head = "---\nlibrary_name: transformers\ntags:\n- posttrain\n---\n"
    page = f"{head}\n# name\n\nMade by posttrain: model `{'0' * 64}`.\n"
    hub.repositories[MODEL] = Held(True, {"main": {"README.md": page.encode()}})
    push(tmp_path / "1", {"model": model})
    assert "0" * 64 not in branch(hub)["README.md"].decode() and b"Made by posttrain" in branch(hub)["README.md"]


def test_the_page_of_an_artifact_follows_it_until_a_person_edits_it(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    for page in ("first", "second"):
        (model / "README.md").write_text(page)
        push(tmp_path / page, {"model": model})
        assert branch(hub)["README.md"].decode() == page
    branch(hub)["README.md"] = b"edited"
    (model / "README.md").write_text("third")
    push(tmp_path / "third", {"model": model})
    assert branch(hub)["README.md"] == b"edited"


def test_what_is_equal_is_not_sent_again(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    first = push(tmp_path / "1", {"model": model})
    sent = len(hub.uploads)
    assert push(tmp_path / "2", {"model": model}) == first and len(hub.uploads) == sent


def test_a_note_that_somebody_spoilt_is_said(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    push(tmp_path / "1", {"model": model})
    branch(hub)[".posttrain/model/pushed.json"] = b"{}"
    with pytest.raises(StageError, match=r"^\.posttrain/model/pushed.json of model .* of the Hub is no longer"):
        push(tmp_path / "2", {"model": model})


def shards(hub: FakeHub) -> Callable[[], None]:
    """Another push, of a model in parts."""
    put = {
        "model-00001-of-00002.safetensors": b"1",
        "model-00002-of-00002.safetensors": b"2",
        "model.safetensors.index.json": b"{}",
        "config.json": b'{"other": 1}',
    }

    def lands() -> None:
        branch(hub).pop("model.safetensors", None)
        branch(hub).update(put)

    return lands


def test_pushes_at_once_do_not_mix(hub: FakeHub, tmp_path: Path, model: Path, other: Path) -> None:
    """The one that comes second lists again and leaves nothing of the first."""
    push(tmp_path / "1", {"model": model})
    hub.meanwhile = [shards(hub), lambda: 409]
    push(tmp_path / "2", {"model": other})
    assert [name for name in branch(hub) if "safetensors" in name] == ["model.safetensors"]
    assert branch(hub)["model.safetensors"] == weights(other)
    assert branch(hub)["config.json"] == (other / "config.json").read_bytes()


def test_whoever_never_gets_his_turn_says_so(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    hub.meanwhile = [lambda: 412] * 9
    with pytest.raises(
        UnreachableError, match=r"changed by others in each of 5 tries to write its branch 'main' \(HTTP 412: another"
    ):
        push(tmp_path / "1", {"model": model})
    assert len(hub.meanwhile) == 4 and branch(hub) == {}
