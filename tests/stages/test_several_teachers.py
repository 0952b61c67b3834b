"""Distillation from several teachers, each of the rows that a column gives to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts.errors import DataError, StageError
from stages.context import Context
from stages.distill import STAGE, Config, check
from tests.data.characters import ids
from tests.rollouts.model_server import model_server
from tests.stages.small_models import EOS, output, read_lines, record_samples, save_dataset, save_model, states
from tests.stages.test_other_engines import divergence, done

ROWS = [("abc", "def", "math"), ("hg", "a", "code"), ("ab", "hhhhgg", "code"), ("eeee", "bad", "math")]
HELD_OUT = [("ca", "bed", "code"), ("ffg", "abc", "math")]
NAMED = {"teacher_column": "subject", "teacher_names": ["math", "code"]}
GIVEN = {"lmbda": 0.0, "train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2}
SEEDS = {"math": 2, "code": 3}
WIRED = frozenset({"model", "teacher", "dataset"})


def rows(folder: Path, found: list[tuple[str, str, Any]]) -> Path:
    named = [{"prompt": prompt, "completion": answer, "subject": subject} for prompt, answer, subject in found]
    return save_dataset(folder, "prompt_completion", named)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    for name, seed in {"student": 1, **SEEDS, "other": 4}.items():
        save_model(tmp_path / name, seed)
    return {
        "model": tmp_path / "student",
        "teacher": [tmp_path / name for name in SEEDS],
        "dataset": rows(tmp_path / "rows", ROWS),
    }


def run(folder: Path, inputs: dict[str, Any], **settings: Any) -> Context:
    return done("distill", folder, inputs, **{**GIVEN, **NAMED, **settings})


def metrics(folder: Path, inputs: dict[str, Any], **settings: Any) -> list[dict[str, float]]:
    return read_lines(output(run(folder, inputs, **settings), "model") / "metrics.jsonl")


def near(rows: list[dict[str, float]]) -> list[Any]:
    names = ("loss", "divergence", "divergence/math", "divergence/code", "grad_norm")
    return [pytest.approx({name: row[name] for name in names if name in row}, rel=2e-5) for row in rows]


def same(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    names = ("loss", "divergence", "divergence/math", "divergence/code", "grad_norm")
    return [{name: row[name] for name in names if name in row} for row in rows]


def by_hand(folder: Path, pairs: list[tuple[list[int], list[int], str]]) -> dict[str, float]:
    """Reverse KL by transformers: the mean over all tokens, and over those of each teacher."""
    student = save_model(folder / "again", 1)
    teachers = {name: save_model(folder / f"again-{name}", seed) for name, seed in SEEDS.items()}
    found = {
        name: torch.cat([divergence(student, teacher, *pair[:2]) for pair in pairs if pair[2] == name])
        for name, teacher in teachers.items()
    }
    own = {f"divergence/{name}": float(values.mean()) for name, values in found.items()}
    return {"loss": float(torch.cat(list(found.values())).mean()), **own}


def test_a_mixed_step_by_hand(tmp_path: Path, inputs: dict[str, Any]) -> None:
    context = run(tmp_path / "run", inputs)
    first, _ = read_lines(output(context, "model") / "metrics.jsonl")
    expected = by_hand(tmp_path, [(ids(prompt), [*ids(said), EOS], name) for prompt, said, name in ROWS])
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert states(output(context, "model")) == {"used": len(ROWS)}


def test_own_completions_by_hand(tmp_path: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's teacher reads what the student says to the row's prompt."""
    made = record_samples(monkeypatch)
    first, _ = metrics(tmp_path / "run", inputs, lmbda=1.0, max_completion_length=5)
    subjects = {tuple(ids(prompt)): subject for prompt, _, subject in ROWS}
    expected = by_hand(tmp_path, [(*pair, subjects[tuple(pair[0])]) for pair in made[:4]])
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"loss_top_k": 3, "beta": 0.0}, {"beta": 0.5, "temperature": 1.3}])
def test_how_a_step_is_split_makes_no_difference(
    settings: dict[str, Any], tmp_path: Path, inputs: dict[str, Any]
) -> None:
    """All rows at once, a row at a time, and a number in the column's place."""
    whole = metrics(tmp_path / "whole", inputs, **settings)
    assert same(metrics(tmp_path / "split", inputs, **settings, micro_batch_tokens=8)) == near(whole)
    numbers = [(prompt, said, list(SEEDS).index(subject)) for prompt, said, subject in ROWS]
    numbered = {**inputs, "dataset": rows(tmp_path / "numbers", numbers)}
    found = metrics(tmp_path / "numbered", numbered, **settings, teacher_names=[])
    for row, named in zip(found, whole, strict=True):
        assert [row["divergence/0"], row["divergence/1"]] == [named["divergence/math"], named["divergence/code"]]
        assert (row["loss"], row["grad_norm"]) == (named["loss"], named["grad_norm"])


def test_a_list_of_one_is_that_teacher(tmp_path: Path, inputs: dict[str, Any]) -> None:
    """Bit for bit."""
    alone = {**inputs, "teacher": tmp_path / "math"}
    listed = {**inputs, "teacher": [tmp_path / "math"]}
    settings = {"teacher_column": None, "teacher_names": []}
    weights = []
    for name, wired in (("alone", alone), ("listed", listed)):
        (file,) = output(run(tmp_path / name, wired, **settings), "model").glob("*.safetensors")
        weights.append(file.read_bytes())
    assert weights[0] == weights[1]


def test_teachers_of_one_model_are_that_model(tmp_path: Path, inputs: dict[str, Any]) -> None:
    alone = metrics(tmp_path / "one", {**inputs, "teacher": tmp_path / "math"}, teacher_column=None, teacher_names=[])
    both = metrics(tmp_path / "two", {**inputs, "teacher": [tmp_path / "math"] * 2})
    assert [{name: row[name] for name in ("loss", "divergence", "grad_norm")} for row in both] == near(alone)


@pytest.mark.parametrize("settings", [{}, {"lmbda": 1.0, "max_completion_length": 5}])
def test_servers_teach_what_models_here_do(settings: dict[str, Any], tmp_path: Path, inputs: dict[str, Any]) -> None:
    """Each has servers of its own, which had another model's weights; or one of them is here."""
    here = metrics(tmp_path / "here", inputs, loss_top_k=4, **settings)
    with model_server(tmp_path / "other") as (one, first), model_server(tmp_path / "other") as (two, second):
        for name, engines in (("there", [first, second]), ("mixed", [{}, second])):
            found = metrics(tmp_path / name, inputs, loss_top_k=4, teacher_engines=engines, **settings)
            assert same(found) == near(here)
        assert (one.loads, two.loads) == (1, 2)


def test_held_out_rows_have_their_teachers(tmp_path: Path, inputs: dict[str, Any]) -> None:
    """Before the first step, by hand."""
    inputs["eval_dataset"] = rows(tmp_path / "unseen", HELD_OUT)
    found = metrics(tmp_path / "run", inputs, eval_steps=1, learning_rate=1e-30)
    expected = by_hand(tmp_path, [(ids(prompt), [*ids(said), EOS], name) for prompt, said, name in HELD_OUT])
    measured = [row for row in found if "eval/loss" in row]
    assert measured
    for row in measured:
        assert {name: row[f"eval/{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        ("maths", r"input dataset: row r1: field 'subject': no teacher is called 'maths'; did you mean 'math'\?"),
        (None, "input dataset: row r1: field 'subject': names no teacher; there are 'math', 'code'"),
    ],
)
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_rows_without_a_teacher(
    lmbda: float, subject: Any, said: str, tmp_path: Path, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before any model is read."""
    monkeypatch.setattr("stages.training.start.load_causal_lm", lambda *_: pytest.fail("a model is read"))
    inputs["dataset"] = rows(tmp_path / "spoilt", [ROWS[0], (*ROWS[1][:2], subject)])
    with pytest.raises(DataError, match=said):
        run(tmp_path / "run", inputs, lmbda=lmbda)


@pytest.mark.parametrize("number", [2, -1, 0.5, True])
def test_numbers_of_no_teacher(number: Any, tmp_path: Path, inputs: dict[str, Any]) -> None:
    inputs["dataset"] = rows(tmp_path / "spoilt", [(*row[:2], number) for row in ROWS])
    with pytest.raises(DataError, match="row r0: field 'subject': no teacher is called"):
        run(tmp_path / "run", inputs, teacher_names=[])


def test_a_column_that_is_not_there(tmp_path: Path, inputs: dict[str, Any]) -> None:
    inputs["eval_dataset"] = save_dataset(
        tmp_path / "unseen", "prompt_completion", [{"prompt": "a", "completion": "b"}]
    )
    with pytest.raises(DataError, match=r"input eval_dataset: there is no column 'subject'.*found columns: row_id"):
        run(tmp_path / "run", inputs, eval_steps=1)


@pytest.mark.parametrize(
    ("settings", "teachers", "said"),
    [
        ({}, 2, "input teacher is a list of 2; give teacher_column"),
        ({**NAMED}, 1, "teacher_column says .* and input teacher is one: leave it out"),
        ({**NAMED}, 3, "teacher_names has 2 entries for 3 teachers"),
        ({**NAMED, "teacher_engines": [{}]}, 2, "teacher_engines has 1 entries for 2 teachers"),
        (
            {**NAMED, "loss_top_k": 2, "teacher_engine": {"engine": "vllm_server", "devices": "1"}},
            2,
            "teacher_engine.devices is of one teacher's servers, and here are 2 teachers: give teacher_engines",
        ),
    ],
)
def test_numbers_that_do_not_go_together(
    settings: dict[str, Any], teachers: int, said: str, tmp_path: Path, inputs: dict[str, Any]
) -> None:
    assert STAGE.check_lists is not None
    found = STAGE.check_lists(Config(**settings), {"teacher": teachers})
    assert len(found) == 1
    wired = {**inputs, "teacher": [tmp_path / "math"] * teachers}
    with pytest.raises(StageError, match=said):
        done("distill", tmp_path / "run", wired, **GIVEN, **settings)


SERVER = {"engine": "vllm_server"}


@pytest.mark.parametrize(
    ("settings", "wired", "said"),
    [
        ({"teacher_names": ["a"]}, WIRED, "teacher_names is of several teachers"),
        ({"teacher_engines": [{}]}, WIRED, "teacher_engines is of several teachers"),
        ({**NAMED}, WIRED - {"teacher"}, "input teacher is not wired"),
        ({**NAMED, "lmbda": 0}, {"teacher_states"}, "teacher_states are of one"),
        ({**NAMED, "cross_tokenizer": {}}, WIRED, "cross_tokenizer is of one teacher"),
        ({**NAMED, "loss_type": "iw_opd"}, WIRED, "loss_type iw_opd learns from one teacher"),
        ({**NAMED, "teacher_names": ["a", "a"]}, WIRED, "teacher_names has a name twice"),
        ({**NAMED, "teacher_engines": [SERVER, {}]}, WIRED, "teacher_engines is a server, which sends likely tokens"),
        (
            {**NAMED, "teacher_engines": [{}, {**SERVER, "lora_sync": "adapter"}], "loss_top_k": 2},
            WIRED,
            "teacher_engines.1.lora_sync is of what is trained",
        ),
        (
            {**NAMED, "teacher_engines": [{}, {}], "teacher_engine": SERVER, "loss_top_k": 2},
            WIRED,
            "teacher_engine and teacher_engines exclude each other",
        ),
        (
            {
                **NAMED,
                "loss_top_k": 2,
                "teacher_engines": [{**SERVER, "urls": ["http://a:1"], "weights_folder": "/x"}] * 2,
            },
            WIRED,
            "teacher_engines name a server twice",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], wired: Any, said: str) -> None:
    assert any(said in problem for problem in check(Config(**settings), frozenset(wired)))
