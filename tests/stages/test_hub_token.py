"""A token for the Hub is looked for before anything runs, where the stage will run; nothing of it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from artifacts import open_store
from artifacts.errors import RequestError
from flows.plan import plan
from flows.recipe import Recipe
from stages.hub_token import lacking_token
from tests.stages.small_models import save_model


def test_where_the_client_would_find_one(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    empty = {"HF_HOME": str(tmp_path / "home")}
    none = lacking_token(empty)
    assert none is not None and f"HF_TOKEN is not set, and {tmp_path}/home/token holds none" in none
    assert lacking_token({**empty, "HF_TOKEN": "hf_abc"}) is None
    assert lacking_token({**empty, "HUGGING_FACE_HUB_TOKEN": "hf_abc\n"}) is None
    assert lacking_token({**empty, "HF_OIDC_RESOURCE": "models/owner/name"}) is None
    assert lacking_token({**empty, "HF_TOKEN": "  "}) == none
    (tmp_path / "home" / "token").write_text("\n")
    assert lacking_token(empty) == none
    (tmp_path / "home" / "token").write_text("hf_abc\n")
    assert lacking_token(empty) is None
    assert lacking_token({"HF_TOKEN_PATH": str(tmp_path / "home" / "token")}) is None
    assert lacking_token({"XDG_CACHE_HOME": str(tmp_path)}) is not None


@pytest.mark.parametrize("token", ["hf_s\u00e9cret", "hf_one hf_two"])
def test_a_token_that_can_be_none(token: str) -> None:
    assert lacking_token({"HF_TOKEN": token}) == "HF_TOKEN holds characters that no token has; set it again"


def problems(folder: Path, launch: dict[str, object], *only: str) -> list[str]:
    stages = {
        "merged": {"uses": "average", "inputs": {"models": ["./model", "./model"]}},
        "up": {
            "uses": "push_to_hub",
            "inputs": {"model": "merged"},
            "with": {"repo": "owner/name"},
            "launch": launch,
        },
    }
    recipe = Recipe.from_dict({"name": "r", "stages": stages}, base=folder)
    try:
        plan(recipe, open_store(str(folder / "store")), only=only)
    except RequestError as error:
        return [f"{problem.where} {problem.what}" for problem in error.problems]
    return []


def test_a_plan_asks_the_environment_of_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model", seed=1)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nobody"))
    (wrong,) = problems(tmp_path, {})
    assert wrong.startswith("recipe: stages.up.with.repo needs a token that may write to the Hub, and there is none")
    assert problems(tmp_path, {}, "merged") == []  # nothing is pushed
    (tmp_path / "token").write_text("hf_abc")
    assert problems(tmp_path, {"env": {"HF_HOME": str(tmp_path)}}) == []
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    assert problems(tmp_path, {}) == []
    monkeypatch.setenv("HF_TOKEN", "hf_s\u00e9cret")
    (wrong,) = problems(tmp_path, {})
    assert "HF_TOKEN holds characters" in wrong and "cret" not in wrong
