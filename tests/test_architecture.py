"""Imports point one way: flows -> stages -> artifacts. Checked on the source of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.stage import STAGES

ROOT = Path(__file__).parents[1]
PACKAGES = ("artifacts", "stages", "flows")
HEAVY = ("torch", "transformers", "accelerate", "peft", "datasets", "pyarrow", "vllm")
PREFECT_FILES = ("pipeline.py", "prefect_*.py", "server_process.py")
"""The only files of flows/ that may import Prefect; commands reach them when they run, never on import."""


def files(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts)


def imported(path: Path) -> Iterator[str]:
    """The dotted modules that a file imports anywhere, relative ones made absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they point"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offenders(package: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(package)
        if not any(path.match(pattern) for pattern in allowed)
        for name in imported(path)
        if name.split(".")[0] in forbidden
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_there_is_something_to_check(package):
    assert len(files(package)) > 3


def test_artifacts_import_nothing_above_them():
    assert offenders("artifacts", ("stages", "flows", "prefect", "torch", "transformers", "accelerate")) == []


def test_stages_import_neither_flows_nor_prefect():
    assert offenders("stages", ("flows", "prefect")) == []


def test_losses_import_torch_and_nothing_of_ours():
    allowed = {"torch", "stages", *sys.stdlib_module_names}
    for path in files("stages/losses"):
        for name in imported(path):
            assert name.split(".")[0] in allowed, f"{path.relative_to(ROOT)} imports {name}"
            assert not name.startswith("stages") or name.startswith("stages.losses"), f"{path}: {name}"


def test_flows_import_prefect_in_few_places_and_torch_nowhere():
    assert offenders("flows", ("prefect",), PREFECT_FILES) == []
    assert offenders("flows", HEAVY[:4] + HEAVY[6:]) == []


def test_nothing_imports_trl():
    for package in PACKAGES:
        assert offenders(package, ("trl",)) == []


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    program = f"{statement}\nimport sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_command_line_loads_neither_torch_nor_prefect():
    loaded = loaded_after("import flows.cli")
    assert not loaded & {*HEAVY, "prefect"}
    assert not loaded & {"artifacts", "stages", "pydantic", "yaml", "fsspec", "rich"}  # `--help` needs none of them


def test_recipes_and_plans_load_neither_torch_nor_prefect():
    statement = "import flows.recipe, flows.plan, flows.tables, flows.pipeline, flows.terminal, flows.report"
    assert not loaded_after(statement) & {*HEAVY, "prefect"}


def test_stage_modules_load_nothing_heavy():
    statement = f"import importlib\nfor name in {STAGES!r}: importlib.import_module('stages.' + name)"
    assert not loaded_after(statement) & {*HEAVY, "prefect"}
