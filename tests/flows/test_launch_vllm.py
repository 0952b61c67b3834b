"""`launch.vllm_python` of a recipe: a path counts from the recipe, and the stage's process is told of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from artifacts.errors import RequestError
from flows.command import stage_command
from flows.launch_settings import Launch
from flows.recipe import Recipe

RECIPE = """
name: served
launch: {vllm_python: PYTHON}
stages:
  base: {uses: init_model, with: {tokenizer: characters}, inputs: {dataset: rows}, launch: {threads: 1}}
  rows: {uses: normalize, with: {source: {path: rows.jsonl}, type: prompt}}
"""


def write(tmp_path: Path, python: str) -> str:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("PYTHON", python))
    return str(tmp_path / "recipe.yaml")


def test_reaches_the_stage(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env/python").symlink_to(sys.executable)
    launch = Recipe.load(write(tmp_path, "env/python")).stages["base"].launch
    assert launch.vllm_python == str(tmp_path / "env/python")
    assert stage_command(launch, tmp_path, threads=1).variables["POSTTRAIN_VLLM_PYTHON"] == launch.vllm_python
    assert "POSTTRAIN_VLLM_PYTHON" not in stage_command(Launch(), tmp_path, threads=1).variables


def test_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"recipe.yaml:3: .*vllm_python: no such Python interpreter: 'env/python'"):
        Recipe.load(write(tmp_path, "env/python"))
