"""Wrong recipes and broken datasets, kept as files, and what posttrain says of each.

`recipes/NAME.yaml` is planned as `posttrain plan` does it, `datasets/NAME` is read by the stage `normalize`, with the
settings of `NAME.with.yaml` where there is one. What is said stands in `expected.txt` of the folder, word for word: a
message that changes shows there. `python -m tests.bad_input.corpus` writes the two files anew, to be read before they
are committed.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from artifacts.errors import PosttrainError
from flows.cli import main
from stages.context import local_context

RECIPES = Path(__file__).parent / "recipes"
DATASETS = Path(__file__).parent / "datasets"
EXPECTED = "expected.txt"
_SETTINGS = ".with.yaml"
_HEAD = re.compile(r"^== (.*)$", re.MULTILINE)


def recipes() -> list[str]:
    return sorted(path.name for path in RECIPES.glob("*.yaml"))


def datasets() -> list[str]:
    return sorted(path.name for path in DATASETS.iterdir() if path.name != EXPECTED and _SETTINGS not in path.name)


def said_of_recipe(name: str, scratch: Path) -> str:
    """What `posttrain plan` writes of a recipe that it refuses. AssertionError: it does not refuse it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["plan", str(RECIPES / name), "--store", str(scratch)])
    assert status == 2, f"{name}: exit status {status}, printed {out.getvalue()}"
    return _without_places(err.getvalue(), scratch)


def said_of_dataset(name: str, scratch: Path) -> str:
    """The error with which `normalize` refuses a file. AssertionError: it takes it."""
    settings = DATASETS / (name + _SETTINGS)
    config = yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    context = local_context("normalize", {"source": {"path": str(DATASETS / name)}, **config}, folder=scratch)
    try:
        context.stage.run(context)
    except PosttrainError as error:
        return _without_places(str(error), scratch)
    raise AssertionError(f"{name} was taken")


def expected(folder: Path) -> dict[str, str]:
    """File -> what is said of it."""
    _, *parts = _HEAD.split((folder / EXPECTED).read_text(encoding="utf-8"))
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


def _without_places(text: str, scratch: Path) -> str:
    for place, name in ((f"{RECIPES}/", ""), (f"{DATASETS}/", ""), (str(scratch), "STORE")):
        text = text.replace(place, name)
    return text.strip()


def _record(folder: Path, names: Iterable[str], said: Callable[[str, Path], str]) -> None:
    blocks = []
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            blocks.append(f"== {name}\n{said(name, Path(scratch))}\n")
    (folder / EXPECTED).write_text("\n".join(blocks), encoding="utf-8")


if __name__ == "__main__":
    _record(RECIPES, recipes(), said_of_recipe)
    _record(DATASETS, datasets(), said_of_dataset)
