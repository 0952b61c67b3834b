"""Columns that rewards cannot do without are asked for before a stage does anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from artifacts import open_store
from artifacts.errors import StageError
from stages.__main__ import run_spec
from stages.context import local_context
from stages.rollouts.reward_columns import given_by, loaded_arguments, missing_columns, written_arguments
from stages.rollouts.reward_spec import RewardSpec
from stages.stage import load_stage
from tests.stages.small_models import save_dataset, save_model

CODE = """\
import functools

def plain(prompts, completions, answer, margin=1.0, *, level, weight=2, **columns):
    return [0.0 for _ in prompts]

async def waits(completions, answer, /):
    return [0.0 for _ in completions]

@functools.lru_cache
def decorated(completions, answer):
    return None
"""
ROWS = {"type": "prompt", "columns": ["row_id", "prompt", "solutions"]}


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "checks.py").write_text(CODE, encoding="utf-8")
    return f"{tmp_path}/checks.py"


def test_arguments_without_defaults(code: str) -> None:
    """The same of the source as of the function, where the source shows them."""
    assert written_arguments(f"{code}:plain") == loaded_arguments(f"{code}:plain") == [
        "prompts", "completions", "answer", "level",
    ]  # fmt: skip
    assert written_arguments(f"{code}:waits") == loaded_arguments(f"{code}:waits") == ["completions", "answer"]
    assert (written_arguments(f"{code}:decorated"), loaded_arguments(f"{code}:decorated")) == (
        [],
        ["completions", "answer"],
    )


BOUND_AGAIN = [
    "near = functools.partial(near, margin=2)",
    "near: object = functools.partial(near, margin=2)",
    "if True:\n    near = functools.partial(near, margin=2)",
    "try:\n    from fast import near\nexcept ImportError:\n    pass",
    "from checks_of_others import *",
    "import near.by",
    "def near(prompts, completions): return near",
    "for near in [print]:\n    pass",
    "with open(__file__) as near:\n    pass",
    "def wrap():\n    global near\n    near = functools.partial(near, margin=2)\nwrap()",
]


@pytest.mark.parametrize("again", BOUND_AGAIN)
def test_a_name_that_is_bound_again_may_be_another_function(tmp_path: Path, again: str) -> None:
    """Python has the last one, and only running the file shows what that takes."""
    code = tmp_path / "checks.py"
    defined = "import functools\n\ndef near(prompts, completions, margin):\n    return near\n"
    code.write_text(f"{defined}\n{again}\n")
    assert written_arguments(f"{code}:near") == []
    code.write_text(f"{defined}\ndef other():\n    near = 3\n\nfar = near\n")
    assert written_arguments(f"{code}:near") == ["prompts", "completions", "margin"]


def test_tools_are_given_where_a_stage_has_some(tmp_path: Path) -> None:
    """They come into every row; without them a row has none."""
    (tmp_path / "checks.py").write_text("def right(completions, tools):\n    return [1.0]\n")
    rewards = [f"{tmp_path}/checks.py:right"]

    def wrong(tools: list[str]) -> list[str]:
        config = {"rewards": rewards, "tools": tools}
        made = load_stage("rl").config.model_validate(config)
        return list(missing_columns(rewards, ROWS, given=given_by(made)))

    assert wrong([f"{tmp_path}/tools.py:add"]) == []
    assert wrong([])[0].startswith("reward 'right' asks for column tools; the rows have solutions")


def test_of_rows_without_a_list_of_columns_nothing_is_said(code: str) -> None:
    assert asked(f"{code}:plain", {"type": "prompt", "rows": 1}) == []
    assert asked(f"{code}:plain", {"type": "prompt", "columns": None}) == []


def asked(reward: Any, description: dict[str, Any] = ROWS) -> list[str]:
    spec = reward if isinstance(reward, str) else RewardSpec.model_validate(reward)
    return [what.partition(";")[0].partition(" asks for ")[2] for what in missing_columns([spec], description)]


@pytest.mark.parametrize(
    ("reward", "columns"),
    [
        ("exact_match", ["column answer or completion or messages or solution"]),
        ({"name": "numeric_match", "parameters": {"column": "result"}}, ["column result"]),
        ({"name": "numeric_match", "parameters": {"column": "solutions"}}, []),
        ({"name": "cosine_length", "parameters": {"max_len": 9, "column": "result"}}, ["column result"]),
        ({"name": "code"}, ["column tests"]),
        ({"name": "json_schema", "parameters": {"column": "schema"}}, ["column schema"]),
        ({"name": "json_schema", "parameters": {"expected": {}}}, []),
        ({"name": "judge", "parameters": {"model": "m", "template": "{completion} {rubric}"}}, ["column rubric"]),
        ({"name": "soft_overlong", "parameters": {"max_completion_len": 9, "soft_punish_cache": 2}}, []),
        ("environment", []),
    ],
)  # fmt: skip
def test_built_in_rewards(reward: Any, columns: list[str]) -> None:
    assert asked(reward) == columns


def test_functions_of_your_own(code: str) -> None:
    assert asked(f"{code}:plain") == ["column answer", "column level"]
    assert asked({"name": f"{code}:plain", "parameters": {"level": 3, "answer": 4}}) == []
    assert list(missing_columns([f"{code}:waits"], {**ROWS, "columns": ["row_id", "prompt", "answers"]})) == [
        "reward 'waits' asks for column answer; the rows have answers; did you mean 'answers'?: keep it, or give it "
        "that name, in normalize"
    ]
    assert asked(f"{code}:plain", {}) == asked(f"{code}:plain", {**ROWS, "type": "preference_of_others"}) == []


def test_a_stage_says_so_before_it_loads_a_model(code: str, tmp_path: Path) -> None:
    """Also where only the function itself shows what it asks for."""
    save_model(tmp_path / "model", seed=1)
    save_dataset(tmp_path / "rows", "prompt_completion", [{"prompt": "ab", "completion": "c"}])
    inputs = {"model": tmp_path / "model", "dataset": tmp_path / "rows"}
    context = local_context("evaluate", {"rewards": [f"{code}:decorated"]}, folder=tmp_path, inputs=inputs)
    open_store(context.spec.store)
    with pytest.raises(StageError, match="input dataset: reward 'decorated' asks for column answer; the rows have com"):
        run_spec(context.spec)
    events = Path(context.spec.job) / "events.jsonl"
    assert not events.exists() or "loading the model" not in events.read_text(encoding="utf-8")
