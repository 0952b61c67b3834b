"""Three runs of one small recipe in one store, for the commands that ask about runs of the past."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from tests.in_process import run_here
from tests.tiny_recipe import BASE

ROWS = [(left, right) for left in range(8) for right in range(5)]
WRONG = (13, 29)
"""Indices of the rows whose answers the reward calls wrong, whatever they are."""

CODE = """
def right(prompts, completions, **_):
    return [0.0 if prompt in {wrong!r} else 1.0 for prompt in prompts]
"""


def prompt(index: int) -> str:
    left, right = ROWS[index]
    return f"{left}+{right}="


def source(rows: list[tuple[int, int]]) -> str:
    return "".join(json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}) + "\n" for a, b in rows)


def row_id(file: Path, index: int) -> str:
    """As README and design define it: from the digest of the file and the index of the row."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return hashlib.sha256(f"{digest}:{index}".encode()).hexdigest()[:24]


STAGES: dict[str, Any] = {
    "rows": {"uses": "normalize", "with": {"source": {"path": "rows.jsonl"}, "type": "prompt_completion"}},
    "base": BASE["base"],
    "sft": {
        "uses": "sft",
        "inputs": {"model": "base", "dataset": "rows"},
        "with": {"max_steps": 4, "train_batch_size": 8, "learning_rate": 0.01},
    },
    "more": {
        "uses": "sft",
        "inputs": {"model": "sft", "dataset": "rows"},
        "with": {"max_steps": 2, "train_batch_size": 8, "learning_rate": 0.001},
    },
    "judge": {
        "uses": "evaluate",
        "inputs": {"model": "more", "dataset": "rows"},
        "with": {"rewards": ["code.py:right"], "tasks": ["accuracy"], "max_completion_length": 3},
    },
}


@dataclass
class Asked:
    """The folder of the recipe, its store, and the ids of its runs: as it is, another seed of sft, as it is again."""

    folder: Path
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def recipe(self) -> Path:
        return self.folder / "small.yaml"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    def run(self, *settings: str) -> dict[str, Any]:
        payload = run_here(self.recipe, self.store, settings)
        assert payload["state"] == "ok", payload
        self.runs.append(payload)
        return payload

    def ask(self, capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
        """The JSON of a command."""
        capsys.readouterr()
        assert cli.main([*arguments, "--json", "--store", str(self.store)]) == status
        return json.loads(capsys.readouterr().out)

    def show(self, capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
        """What a command prints for people."""
        capsys.readouterr()
        assert cli.main([*arguments, "--store", str(self.store)]) == status
        shown = capsys.readouterr()
        return shown.out if status == 0 else shown.err


def make_asked(folder: Path) -> Asked:
    """The recipe and its files, and nothing run yet."""
    asked = Asked(folder)
    asked.rows.write_text(source(ROWS))
    (folder / "code.py").write_text(CODE.format(wrong={prompt(index) for index in WRONG}))
    asked.recipe.write_text(json.dumps({"name": "small", "launch": {"threads": 1}, "stages": STAGES}))
    return asked


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """Runs that several files of tests share: none of these may change what the store holds of them."""
    made = make_asked(tmp_path_factory.mktemp("asked"))
    made.run()
    made.run("sft.seed=1")
    made.run()
    yield made
