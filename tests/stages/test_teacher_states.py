"""A teacher's states, kept once, against transformers' own and against a teacher beside the student."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from artifacts import Shards
from artifacts.errors import StageError
from stages import shards
from stages.context import Context, local_context
from stages.distill import Config, check
from stages.losses.head import Head
from stages.training import kept_teacher
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.state_files import StateFiles, write_head, write_rows, write_states
from tests.data.characters import ids
from tests.stages.interruptions import Killed
from tests.stages.small_models import EOS, output, read_json, read_lines, save_dataset, save_model
from tests.stages.test_other_engines import done
from tests.training.conftest import random_groups, tiny_model

ROWS = [("abc", "def"), ("hg", "a"), ("ab", "hhhhgg"), ("eeee", "bad"), ("c", "gg")]
GIVEN = {"lmbda": 0.0, "train_batch_size": 4, "max_steps": 5, "learning_rate": 1e-2}


def saved_rows(folder: Path, rows: list[tuple[str, str]]) -> Path:
    return save_dataset(folder, "prompt_completion", [{"prompt": one, "completion": other} for one, other in rows])


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    for seed, name in enumerate(("student", "teacher"), start=1):
        save_model(tmp_path / name, seed)
    return {
        "model": tmp_path / "student",
        "teacher": tmp_path / "teacher",
        "dataset": saved_rows(tmp_path / "rows", ROWS),
    }


def keep(folder: Path, inputs: dict[str, Path], **settings: Any) -> Path:
    asked = {"model": inputs["teacher"], "dataset": inputs["dataset"]}
    return output(done("teacher_states", folder, asked, **settings), "states")


def train(folder: Path, inputs: dict[str, Path], **settings: Any) -> tuple[list[dict[str, float]], dict[str, Any]]:
    made = output(done("distill", folder, inputs, **{**GIVEN, **settings}), "model")
    rows = [{name: row[name] for name in ("loss", "divergence")} for row in read_lines(made / "metrics.jsonl")]
    return rows, load_file(made / "model.safetensors")


def of_kept(inputs: dict[str, Path], kept: Path) -> dict[str, Path]:
    return {"model": inputs["model"], "dataset": inputs["dataset"], "teacher_states": kept}


def test_they_are_what_transformers_computes(tmp_path: Path, inputs: dict[str, Path]) -> None:
    teacher = save_model(tmp_path / "again", 2)
    context = done("teacher_states", tmp_path / "kept", {"model": inputs["teacher"], "dataset": inputs["dataset"]})
    folder = output(context, "states")
    logits, logps = [], []
    for prompt, completion in ROWS:
        tokens = torch.tensor([[*ids(prompt), *ids(completion), EOS]])
        with torch.no_grad():
            logits.append(teacher(tokens).logits[0, len(prompt) - 1 : -1])
        logps.append(float(logits[-1].log_softmax(-1).gather(1, tokens[0, len(prompt) :, None]).sum()))
    kept = StateFiles(folder, "teacher_states").head(1.0).logits(load_file(folder / "states.safetensors")["states"])
    torch.testing.assert_close(kept, torch.cat(logits), atol=1e-5, rtol=1e-5)
    rows = parquet.read_table(folder / "rows.parquet").to_pydict()
    assert rows["row_id"] == [f"r{number}" for number in range(5)]
    assert rows["tokens"] == [len(completion) + 1 for _, completion in ROWS]
    assert rows["logps"] == pytest.approx(logps, abs=1e-5)
    mean = sum(logps) / sum(rows["tokens"])
    assert context.metrics["mean_logprob_per_token"] == pytest.approx(mean, abs=1e-5)
    assert read_json(folder / "ledger.json")["states"] == {"used": 5}


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": 0.4, "temperature": 0.7}, {"loss_top_k": 3}])
def test_a_student_learns_what_it_does_beside_the_teacher(
    settings: dict[str, Any], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """Over several epochs, and of rows in another order than they are kept in."""
    beside, weights = train(tmp_path / "beside", inputs, **settings)
    kept, others = train(tmp_path / "student_of_kept", of_kept(inputs, keep(tmp_path / "kept", inputs)), **settings)
    assert kept == [pytest.approx(row, rel=2e-5) for row in beside]
    assert beside[0]["loss"] > 0.01 and len({row["loss"] for row in beside}) == 5
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, atol=1e-4, rtol=1e-4)


def test_in_bfloat16(tmp_path: Path, inputs: dict[str, Path]) -> None:
    kept = keep(tmp_path / "kept", inputs, bf16=True)
    assert load_file(kept / "states.safetensors")["states"].dtype == torch.bfloat16
    (beside, *_), _ = train(tmp_path / "beside", inputs, bf16=True)
    (found, *_), _ = train(tmp_path / "student_of_kept", of_kept(inputs, kept), bf16=True)
    assert found["loss"] == pytest.approx(beside["loss"], rel=0.02)


APART = [("ga", "abc"), ("bad", "e"), ("h", "cafe")]


def test_rows_apart_are_measured(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Reverse KL by hand on the weights that the stage leaves, by a teacher beside it and by what one has said; both
    datasets name their rows alike, and measuring changes no bit."""
    apart = saved_rows(tmp_path / "apart", APART)
    kept = {
        name: keep(tmp_path / name, {**inputs, "dataset": of})
        for name, of in (("own", inputs["dataset"]), ("theirs", apart))
    }
    told = {**of_kept(inputs, kept["own"]), "eval_teacher_states": kept["theirs"]}
    alone = output(done("distill", tmp_path / "alone", of_kept(inputs, kept["own"]), **GIVEN), "model")
    teacher = save_model(tmp_path / "again", 2)
    for name, more in (("beside", inputs), ("told", told)):
        context = done("distill", tmp_path / name, {**more, "eval_dataset": apart}, **GIVEN, eval_steps=2)
        folder = output(context, "model")
        student = AutoModelForCausalLM.from_pretrained(folder).eval()
        values = [value for row in APART for value in reverse_kl(student, teacher, *row)]
        rows = read_lines(folder / "metrics.jsonl")
        assert [row["step"] for row in rows if "eval/loss" in row] == [2, 4, 5]
        assert rows[-1]["eval/loss"] == pytest.approx(sum(values) / len(values), rel=2e-5)
        assert rows[-1]["eval/divergence"] == rows[-1]["eval/loss"]
    assert (folder / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


def reverse_kl(student: Any, teacher: Any, prompt: str, completion: str) -> list[float]:
    """Of every token, on transformers' distributions."""
    tokens = torch.tensor([[*ids(prompt), *ids(completion), EOS]])
    with torch.no_grad():
        logs, wanted = (one(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for one in (student, teacher))
    return (logs.exp() * (logs - wanted)).sum(-1).tolist()


def test_rows_apart_are_of_the_same_teacher(tmp_path: Path, inputs: dict[str, Path]) -> None:
    apart = saved_rows(tmp_path / "apart", APART)
    own = keep(tmp_path / "own", inputs)
    theirs = keep(tmp_path / "theirs", {"teacher": inputs["model"], "dataset": apart})
    told = {**of_kept(inputs, own), "eval_dataset": apart, "eval_teacher_states": theirs}
    with pytest.raises(
        StageError, match=r"teacher_states and eval_teacher_states are of two models \(\w+ and \w+\); make both by one"
    ):
        train(tmp_path / "run", told)


def test_killed_after_two_shards(tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is not computed again, and the files are the same bytes."""

    def context(folder: Path) -> Context:
        AcceleratorState._reset_state(reset_partial_state=True)
        asked: dict[str, Any] = {"model": inputs["teacher"], "dataset": inputs["dataset"]}
        return local_context("teacher_states", {"shard_rows": 1}, folder=folder, inputs=asked)

    def run(found: Context) -> dict[str, bytes]:
        found.stage.run(found)
        return {path.name: path.read_bytes() for path in output(found, "states").iterdir()}

    whole = run(context(tmp_path / "whole"))
    saved, save = [], Shards.save

    def save_two(self: Shards, name: str, data: bytes) -> None:
        save(self, name, data)
        saved.append(name)
        if len(saved) == 2:
            raise Killed

    monkeypatch.setattr(Shards, "save", save_two)
    with pytest.raises(Killed):
        run(context(tmp_path / "killed"))
    last = context(tmp_path / "killed")
    assert run(last) == whole
    assert last.resumed_from == 2 and len(saved) == len(set(saved)) == len(ROWS)


def test_pieces_are_no_larger_than_can_be_read(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven tokens of (16 + 2) numbers are the largest row, and twice two of them are 2,016 bytes."""
    sizes, whole = [], shards.save_pieces

    def save_pieces(*arguments: Any, size: int) -> list[str]:
        sizes.append(size)
        return whole(*arguments, size=size)

    monkeypatch.setattr(kept_teacher, "LARGEST_BYTES", 2016)
    monkeypatch.setattr(kept_teacher, "save_pieces", save_pieces)
    keep(tmp_path / "kept", inputs)
    assert sizes == [2]


def test_a_row_that_no_piece_holds_is_refused_before_the_pass(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_teacher, "LARGEST_BYTES", 500)
    monkeypatch.setattr(kept_teacher, "save_pieces", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(StageError, match="row r2: the states of its 7 trained tokens take 504 bytes, of which 500 can"):
        keep(tmp_path / "kept", inputs)


def fill_up(folder: Path, tokens: int) -> Path:
    """The model with so many tokens more in its head, which are none: likely ones, at that."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + tokens)
    with torch.no_grad():
        model.get_output_embeddings().weight[-tokens:] *= 30
    filled = folder.with_name(f"{folder.name}-filled")
    shutil.copytree(folder, filled)
    model.save_pretrained(filled)
    return filled


@pytest.mark.parametrize("settings", [{}, {"loss_top_k": 4}], ids=["whole", "top"])
def test_a_teacher_whose_vocabulary_is_filled_up_teaches_the_same(
    tmp_path: Path, inputs: dict[str, Path], settings: dict[str, Any]
) -> None:
    """One tokenizer, heads of two sizes, as in Qwen2.5: beside the student, and from its states."""
    expected, weights = train(tmp_path / "plain", inputs, **settings)
    filled = inputs | {"teacher": fill_up(inputs["teacher"], 8)}
    for name, given in {"beside": filled, "kept": of_kept(inputs, keep(tmp_path / "states", filled))}.items():
        found, others = train(tmp_path / name, given, **settings)
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
        for key, weight in weights.items():
            torch.testing.assert_close(others[key], weight, atol=2e-5, rtol=1e-4)


def test_tokens_that_one_of_two_models_does_not_know_are_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(inputs["teacher"])
    size = teacher.config.vocab_size
    teacher.resize_token_embeddings(size - 1)
    teacher.save_pretrained(inputs["teacher"])
    message = f"heads of {size - 1} and {size} tokens, and their tokenizer knows token {size - 1}: resize the smaller"
    with pytest.raises(StageError, match=message):
        train(tmp_path / "run", inputs)


def test_a_student_that_samples_nothing_needs_no_copy_to_sample_from(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sharded one would have a whole one in every process."""
    monkeypatch.setattr(Trainer, "policy", lambda self: pytest.fail("a policy to sample from was made"))
    train(tmp_path / "run", inputs)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "qwen3"])
def test_a_head_comes_back(tmp_path: Path, family: str) -> None:
    """With soft-capping, a scale, or neither; and with a bias."""
    scorer = Scorer(tiny_model(family))
    states = torch.randn(5, scorer.head().weight_VH.shape[1])
    for number, head in enumerate((scorer.head(), Head(scorer.head().weight_VH, torch.randn(scorer.vocabulary)))):
        folder = tmp_path / str(number)
        folder.mkdir()
        groups = random_groups(1, 1)
        write_states(folder, [states[:2], states[2:]], (5, states.shape[1]), torch.float32)
        write_rows(folder, groups, [0.0] * len(groups))
        write_head(folder, head, "a teacher")
        files = StateFiles(folder, "teacher_states")
        again = load_file(folder / "states.safetensors")["states"]
        assert torch.equal(again, states)
        assert torch.equal(files.head(0.7).logits(states), Head(**{**vars(head), "temperature": 0.7}).logits(states))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder, _: {"dataset": saved_rows(folder / "more", [*ROWS, ("a", "b")])},
            "has nothing of 1 of 6 rows, the first is r5; it has 5 rows",
        ),
        (
            lambda folder, _: {"dataset": saved_rows(folder / "other", [*ROWS[:4], ("c", "gf")])},
            "has 1 of 5 rows with other tokens, the first is r4, of which it has 3 trained tokens where there are 3",
        ),
    ],
)
def test_states_of_other_rows(tmp_path: Path, inputs: dict[str, Path], spoil: Any, message: str) -> None:
    kept = of_kept(inputs, keep(tmp_path / "kept", inputs))
    with pytest.raises(StageError, match=message):
        train(tmp_path / "run", {**kept, **spoil(tmp_path, inputs)})


def test_states_of_shorter_rows(tmp_path: Path, inputs: dict[str, Path]) -> None:
    kept = of_kept(inputs, keep(tmp_path / "kept", inputs, max_length=8))
    with pytest.raises(
        StageError,
        match=r"the first is r2, of which it has 6 trained tokens where there are 7: run teacher_states with",
    ):
        train(tmp_path / "run", kept)


@pytest.mark.parametrize(
    ("settings", "wired", "message"),
    [
        ({"lmbda": 0.5}, set(), "lmbda is 0.5, but teacher_states are of the dataset's completions"),
        ({"lmbda": 0.0}, {"teacher"}, "inputs teacher and teacher_states exclude each other"),
        ({"lmbda": 0.0, "teacher_update_rate": 0.1}, set(), "teacher_states stay as they are"),
        ({"lmbda": 0.0}, {"eval_dataset"}, "wire eval_teacher_states too, from a stage teacher_states on eval_dataset"),
        ({"lmbda": 0.0}, {"eval_teacher_states"}, "eval_teacher_states is given, but input eval_dataset is not wired"),
        (
            {"lmbda": 0.0, "loss_top_k": 4, "teacher_engine": {"engine": "vllm_server"}},
            set(),
            "teacher_engine computes input teacher, which is not wired in",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], wired: set[str], message: str) -> None:
    problems = check(Config(**settings), frozenset({"model", "dataset", "teacher_states", *wired}))
    assert any(message in problem for problem in problems)


def test_settings_that_do() -> None:
    config = Config(lmbda=0.0, beta=0.5, temperature=0.7, loss_top_k=4)
    assert not check(config, frozenset({"model", "dataset", "teacher_states"}))
