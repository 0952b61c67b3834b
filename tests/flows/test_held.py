"""What a stage reads from outside the store changes between plan and run, or while it is read: nothing is published,
the error says what changed, and the next run counts it as it is."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import stages.__main__
from artifacts import open_store
from artifacts.errors import PosttrainError, RequestError, StageError
from flows.plan import Plan, plan
from flows.recipe import Recipe
from flows.reproduce import reproduce
from flows.run import Run
from stages import outside
from stages.training.checkpoint import Saver
from tests.in_process import failures, run_here, run_planned, states
from tests.stages.small_models import save_completions, save_dataset, save_model

ROWS = '{"text": "first"}\n{"text": "second"}\n'
TIME = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
CHANGED = rf"has changed since the run was planned \({TIME}\); of its files {{}} was written last, at {TIME}\."
LAST = r" Nothing is kept of this stage, .*run again, and it counts as it is now"


class World:
    """A recipe of one stage, `one`, with a store."""

    def __init__(self, folder: Path, uses: str, **body: Any) -> None:
        self.folder = folder
        self.store = open_store(str(folder / "store"))
        (folder / "recipe.yaml").write_text(
            json.dumps({"name": "w", "launch": {"threads": 1}, "stages": {"one": {"uses": uses, **body}}})
        )

    def write(self, name: str, text: str) -> Path:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)
        return self.folder / name

    def plan(self, **options: Any) -> Plan:
        return plan(Recipe.load(self.folder / "recipe.yaml"), self.store, **options)

    def run(self, planned: Plan | None = None) -> dict[str, Any]:
        """The entry of the stage, run in a process of its own."""
        run = Run(planned or self.plan())
        with run.supervisors:
            for name in run.pending():
                with suppress(PosttrainError):
                    run.execute(name)
        return dict(run.finish()["stages"]["one"])

    def here(self, planned: Plan | None = None) -> dict[str, Any]:
        """As `run`, in this process."""
        return dict(run_planned(planned or self.plan())["stages"]["one"])

    def refused(self, entry: dict[str, Any], what: str, last: str) -> None:
        """It failed for that reason, and the store has nothing of it."""
        assert entry["state"] == "failed"
        assert re.match(f"{what} {CHANGED.format(re.escape(last))}{LAST}", entry["error"]), entry["error"]
        assert list(self.store.artifacts()) == [] and self.store.stage_records(entry["uses"]) == []

    def counts_now(self, fingerprint: str) -> None:
        """Run again, it is done as another work than that of `fingerprint`, and cached thereafter."""
        again = self.here()
        assert (again["state"], again["fingerprint"] == fingerprint) == ("ran", False)
        assert self.here()["state"] == "cached"


def of_file(folder: Path, **source: Any) -> World:
    world = World(folder, "normalize", **{"with": {"source": source, "deduplicate": False}})
    world.write("rows.jsonl", ROWS)
    return world


def test_a_data_file_that_changes_after_the_plan(tmp_path: Path) -> None:
    """In a process of its own, as a run starts it."""
    world = of_file(tmp_path, path="rows.jsonl")
    planned = world.plan()
    path = world.write("rows.jsonl", ROWS.replace("first", "other"))
    entry = world.run(planned)
    world.refused(entry, f"with.source.path: {path}", "rows.jsonl")
    again = world.run()
    assert again["state"] == "ran" and again["fingerprint"] != entry["fingerprint"]
    assert world.run()["state"] == "cached"
    world.write("rows.jsonl", ROWS)
    assert world.plan().decisions["one"].state == "run"  # of the old content there is nothing


def test_a_folder_that_changes_after_the_plan(tmp_path: Path) -> None:
    world = World(tmp_path, "mixture", inputs={"datasets": ["./given"]}, **{"with": {"weights": [1], "rows": 2}})
    save_dataset(tmp_path / "given", "language_modeling", [{"text": "abc"}, {"text": "de"}])
    planned = world.plan()
    described = tmp_path / "given" / "dataset.json"
    described.write_text(described.read_text() + "\n")
    entry = world.run(planned)
    world.refused(entry, f"input datasets: {tmp_path}/given", "dataset.json")
    world.counts_now(entry["fingerprint"])


def test_what_is_gone_is_said(tmp_path: Path) -> None:
    world = of_file(tmp_path, path="rows.jsonl")
    planned = world.plan()
    (tmp_path / "rows.jsonl").unlink()
    error = world.here(planned)["error"]
    said = rf"was there when the run was planned \({TIME}\) and cannot be read any more: no file or folder"
    assert re.match(f"with.source.path: {tmp_path}/rows.jsonl {said}", error)


def test_what_was_written_again_as_it_was_has_not_changed(tmp_path: Path) -> None:
    world = of_file(tmp_path, path="rows.jsonl")
    planned = world.plan()
    world.write("rows.jsonl", "")
    world.write("rows.jsonl", ROWS)
    assert world.here(planned)["state"] == "ran"


WRITING = """
from pathlib import Path
def copy(row, place, text):
    Path(place).write_text(text)
    return row
"""


def test_a_data_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """Written by a function on the rows, after it was hashed and opened."""
    path = tmp_path / "rows.jsonl"
    world = of_file(tmp_path, path="rows.jsonl", function="code.py:copy", arguments={"text": "x"})
    world.write("code.py", WRITING.replace("place, text", "text").replace("place", repr(str(path))))
    entry = world.run()
    world.refused(entry, f"with.source.path: {path}", "rows.jsonl")


def test_a_file_among_arguments_counts_by_its_content(tmp_path: Path) -> None:
    """Relative to the recipe, in lists as well; what leads nowhere is text."""
    code = "def rows(files, word):\n    for file in files:\n        yield {'text': open(file).read() + word}\n"
    world = World(
        tmp_path,
        "normalize",
        **{"with": {"source": {"function": "code.py:rows", "arguments": {"files": ["./a.txt"], "word": "a/b."}}}},
    )
    world.write("code.py", code)
    path = world.write("a.txt", "old")
    entry = world.run()
    assert entry["state"] == "ran" and world.plan().decisions["one"].state == "cached"
    assert str(tmp_path) not in json.dumps(world.plan().decisions["one"].identity)
    world.write("a.txt", "new")
    planned = world.plan()
    assert planned.decisions["one"].reasons == ("data of a.txt changed",)
    world.write("a.txt", "late")
    refused = world.here(planned)
    assert re.match(f"with.source.arguments.files.0: {path} {CHANGED.format('a.txt')}{LAST}", refused["error"])
    assert len(list(world.store.artifacts())) == 1
    assert world.here()["state"] == "ran" and world.here()["state"] == "cached"


def test_files_among_arguments_are_found_by_content(tmp_path: Path) -> None:
    """To make an artifact again, wherever they went."""
    code = "def rows(files):\n    for file in files['of']:\n        yield {'text': open(file).read()}\n"
    source = {"function": "code.py:rows", "arguments": {"files": {"of": ["a.txt", "./b"], "if": "a.b"}}}
    world = World(tmp_path, "normalize", **{"with": {"source": source}})
    world.write("code.py", code)
    world.write("a.txt", "a")
    world.write("b", "b")
    world.here()
    (tmp_path / "moved").mkdir()
    for name in ("code.py", "a.txt", "b"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    made = world.store.find("@w/one")
    again = reproduce(world.store, made, tmp_path / "again", files=[tmp_path / "moved"])
    assert again.made == made
    world.write("moved/b", "c")
    with pytest.raises(RequestError, match=r"with\.source\.arguments\.files\.of\.1: no data with SHA-256"):
        reproduce(world.store, made, tmp_path / "more", files=[tmp_path / "moved"])


def test_a_folder_among_arguments_counts_and_is_not_to_be_written_to(tmp_path: Path) -> None:
    code = "import os\ndef rows(folder, sep):\n    open(folder + '/b.txt', 'w').close()\n    yield {'text': sep}\n"
    arguments = {"folder": "texts/", "sep": "/"}  # which is a folder as well, and not meant
    world = World(tmp_path, "normalize", **{"with": {"source": {"function": "code.py:rows", "arguments": arguments}}})
    world.write("code.py", code)
    world.write("texts/a.txt", "a")
    entry = world.here()
    world.refused(entry, f"with.source.arguments.folder: {tmp_path}/texts", "b.txt")


CODE = "def change(row):\n    from late import SUFFIX\n    return {'text': row['text'] + SUFFIX}\n"


def of_code(folder: Path, code: str = CODE) -> World:
    world = of_file(folder, path="rows.jsonl", function="code.py:change")
    world.write("code.py", code)
    world.write("late.py", "SUFFIX = '1'\n")
    return world


@pytest.mark.parametrize("edited", ["code.py", "late.py"])
def test_code_that_is_edited_after_the_plan(tmp_path: Path, edited: str) -> None:
    """Itself, or what it imports."""
    world = of_code(tmp_path)
    planned = world.plan()
    world.write(edited, (tmp_path / edited).read_text() + "# other\n")
    entry = world.here(planned)
    world.refused(entry, f"with.source.function: {tmp_path}/code.py", edited)
    world.counts_now(entry["fingerprint"])


EDITING = """
from pathlib import Path
late = Path(__file__).with_name("late.py")
def change(row):
    if row["text"] == "first":
        return row
    late.write_text("SUFFIX = '2'\\n")
    {body}
    return {{"text": row["text"] + SUFFIX}}
"""


@pytest.mark.parametrize(
    "body",
    [
        "from late import SUFFIX",
        "try:\n        from late import SUFFIX\n    except BaseException:\n        SUFFIX = ''",
        "from concurrent.futures import ProcessPoolExecutor as Pool\n    from multiprocessing import get_context\n"
        "    from other import suffix\n"
        "    SUFFIX = Pool(1, mp_context=get_context('spawn')).submit(suffix).result()",
    ],
    ids=["imported", "caught", "in another process"],
)
def test_code_that_is_imported_after_an_edit(tmp_path: Path, body: str) -> None:
    """In the middle of the work, caught by the code itself, and in a process that it starts."""
    world = of_code(tmp_path, EDITING.format(body=body))
    world.write("other.py", "def suffix():\n    from late import SUFFIX\n    return SUFFIX\n")
    entry = world.run()
    assert entry["state"] == "failed" and f"{tmp_path}/late.py has changed since the run was planned" in entry["error"]
    assert list(world.store.artifacts()) == []
    assert world.here()["state"] == "ran"  # it writes what is there by now


def test_an_edit_of_code_that_was_loaded_does_no_harm(tmp_path: Path) -> None:
    late = "from late import SUFFIX\nfrom pathlib import Path\n"
    code = "def change(row):\n    Path(__file__).with_name('late.py').write_text('')\n    return row\n"
    world = of_code(tmp_path, late + code)
    assert world.here()["state"] == "ran"


def test_code_of_an_importable_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`package.module:name`: what it imports late must be the source that was planned as well."""
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    name = f"package_{tmp_path.name}"
    world = of_file(tmp_path, path="rows.jsonl", function=f"{name}.code:change")
    for path in ("__init__.py", "late.py"):
        world.write(f"lib/{name}/{path}", "SUFFIX = '1'\n")
    body = f"from {name}.late import SUFFIX"
    world.write(f"lib/{name}/code.py", EDITING.format(body=body))
    entry = world.here()
    assert f"lib/{name}/late.py has changed since the run was planned" in entry["error"]
    assert list(world.store.artifacts()) == []


def test_what_nobody_wrote_to_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By plan, decision and stage together, however often it is named; two seconds after it was written at least."""
    save_model(tmp_path / "model", seed=0)
    given = save_completions(tmp_path, dataset=[("abc", "de"), ("da", "bb")])["dataset"].name
    settings = {"train_batch_size": 2, "max_steps": 3, "checkpoint_steps": 1, "max_length": 16}
    stage = {"uses": "sft", "inputs": {"model": "./model", "dataset": f"./{given}"}, "with": settings}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"stages": {"one": stage, "two": {**stage, "with": {**settings, "seed": 1}}}}))
    hashed: list[str] = []
    content_of = outside.content_of
    monkeypatch.setattr(outside, "content_of", lambda *what: hashed.append(what[1]) or content_of(*what))
    monkeypatch.setattr(outside, "RACY_SECONDS", -60.0)
    assert states(run_here(recipe, tmp_path / "store")) == {"one": "ran", "two": "ran"}
    assert sorted(hashed) == sorted([str(tmp_path / "model"), str(tmp_path / given)])


def trained(folder: Path, **settings: Any) -> World:
    save_completions(folder, dataset=[("abc", "de"), ("da", "bb")])
    save_model(folder / "model", seed=0)
    values = {"train_batch_size": 2, "max_steps": 6, "checkpoint_steps": 2, "max_length": 16, **settings}
    return World(folder, "sft", inputs={"model": "./model", "dataset": "./dataset"}, **{"with": values})


def test_no_checkpoint_is_kept_of_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before the change is, and counts once the content is what it was."""
    world = trained(tmp_path)
    planned, config = world.plan(), tmp_path / "model" / "config.json"
    before, save = config.read_text(), Saver.save

    def save_and_write(saver: Saver, progress: Any, *rest: Any) -> None:
        save(saver, progress, *rest)
        saver.background.wait()
        config.write_text(before + " ")

    with monkeypatch.context() as patched:
        patched.setattr(Saver, "save", save_and_write)
        entry = world.here(planned)
    world.refused(entry, f"input model: {tmp_path}/model", "config.json")
    config.write_text(before)
    decision = world.plan().decisions["one"]
    assert (decision.fingerprint, decision.state, decision.step) == (entry["fingerprint"], "resume", 2)
    assert world.here()["resumed_from"] == 2


def test_a_forced_stage_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a checkpoint of it is there, which it clears; a retry of the same run would find its own."""
    world = trained(tmp_path)

    def full(context: object) -> None:
        raise StageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(stages.__main__, "publish", full)
        assert world.here()["error"] == "the disk is full"
    assert world.plan().decisions["one"].state == "resume"
    forced = world.plan(force=["one"])
    assert (forced.decisions["one"].state, forced.decisions["one"].reasons) == ("run", ("forced",))
    payload = run_planned(forced)
    assert failures(payload) == {} and payload["stages"]["one"]["resumed_from"] is None
