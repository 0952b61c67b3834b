"""Distillation from a teacher of another tokenizer: which rows, completions and settings it takes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from artifacts.errors import DataError, StageError
from stages.data.dataset import read_dataset
from stages.data.ledger import RowLedger
from stages.data.readings import Reader
from stages.data.truncation import RowLimit
from stages.distill import Config, check
from stages.rollouts.requests import Completion
from stages.training.cross_rows import UNALIGNED, CrossRows, Limits
from stages.training.generation import Sampling
from tests.data.characters import IDS, ids
from tests.data.two_tokenizers import byte_level
from tests.stages.cross_tokenizer_runs import GIVEN, TEMPLATE, cross_inputs, metrics, save_teacher, talk  # noqa: F401
from tests.stages.small_models import EOS, output, read_json, read_lines, save_dataset, states
from tests.stages.test_other_engines import done


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_teacher_that_changes_texts(tmp_path: Path, inputs: dict[str, Path], lmbda: float) -> None:
    """Rows with an h, which it reads as an x, are dropped and counted, and prompts with one."""
    save_teacher(tmp_path / "changing", normalizer=normalizers.Replace("h", "x"))
    inputs["teacher"] = tmp_path / "changing"
    context = done("distill", tmp_path / "run", inputs, cross_tokenizer={}, **{**GIVEN, "lmbda": lmbda})
    folder = output(context, "model")
    dropped = 1 if lmbda else 2
    assert states(folder) == {"used": 4 - dropped, "filtered: not read alike by both tokenizers": dropped}
    (example, *_) = read_json(folder / "ledger.json")["examples"]["filtered: not read alike by both tokenizers"]
    assert example == {
        "row": "r1",
        "detail": "input teacher's tokenizer changes the text: it reads 'x' where the text goes on with 'h"
        + ("g' (byte 0)" if lmbda else "ga' (byte 0)"),
    }
    rows = [{"prompt": "h", "completion": "a"}]
    inputs["dataset"] = save_dataset(tmp_path / "none", "prompt_completion", rows)
    with pytest.raises(DataError, match=r"none of the 1 rows can be read by both .*; row r0: .* it reads 'x' where"):
        metrics(tmp_path / "nothing", inputs, {}, lmbda=lmbda)


def test_a_teacher_that_changes_whatever_the_student_writes(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """One that doubles every letter of the prompts would be found at the prompts; this one changes all others."""
    changes = [normalizers.Replace(letter, "x") for letter in [*IDS][3:] if letter not in "abc"]
    save_teacher(tmp_path / "changing", normalizer=normalizers.Sequence(changes))
    inputs["teacher"] = tmp_path / "changing"
    inputs["dataset"] = save_dataset(tmp_path / "some", "prompt", [{"prompt": "abc"}, {"prompt": "b"}])
    settings = {"train_batch_size": 1, "max_steps": 30, "lmbda": 1.0, "max_completion_length": 1, "learning_rate": 1e-9}
    with pytest.raises(StageError, match=r"changes what the student writes.*: row r\d: it reads 'x' where the text"):
        metrics(tmp_path / "run", inputs, {"skip_eos": True}, **settings)


def test_a_limit_of_prompts_does_not_cut_completions(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Prompts have at most 3 tokens for both models, and max_length 3 is no limit of what is sampled behind them; in
    the teacher's template they have 18 and their letters."""
    settings: dict[str, Any] = {"lmbda": 1.0, "max_steps": 1}
    (free,) = metrics(tmp_path / "free", inputs, {}, **settings)
    (bounded,) = metrics(tmp_path / "bounded", inputs, {}, **settings, max_length=3)
    for name in ("loss", "grad_norm", "aligned_tokens", "completions/mean_length"):
        assert bounded[name] == free[name]
    assert free["completions/mean_length"] > 3
    rows = [{"prompt": talk("e" * letters)} for letters in (1, 2, 3)]
    inputs["dataset"] = save_dataset(tmp_path / "talks", "prompt", rows, conversational=True)
    context = done("distill", tmp_path / "talk", inputs, cross_tokenizer={}, **{**GIVEN, **settings, "max_length": 20})
    examples = read_json(output(context, "model") / "ledger.json")["examples"]
    assert examples["filtered: teacher's prompt too long"] == [{"row": "r2", "detail": "21 tokens, at most 20 fit"}]


@pytest.mark.parametrize("skip_eos", [False, True])
def test_completions_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Path], skip_eos: bool
) -> None:
    """Their ends are compared; without these there is nothing to learn, and the run goes on."""

    def ends(self: Sampling, prompts: Any, seeds: Any) -> list[list[Completion]]:
        return [[Completion([EOS], [0.0], finished=True)] for _ in prompts]

    monkeypatch.setattr(Sampling, "__call__", ends)
    rows = metrics(tmp_path / "run", inputs, {"skip_eos": skip_eos}, lmbda=1.0)
    assert len(rows) == 2 and rows[0]["aligned_tokens"] == (0.0 if skip_eos else 1.0)
    assert (rows[0]["loss"] == rows[0]["grad_norm"] == 0.0) == skip_eos
    inputs["eval_dataset"] = save_dataset(tmp_path / "apart", "prompt", [{"prompt": "b"}])
    settings = {**GIVEN, "lmbda": 1.0, "keep": "best", "cross_tokenizer": {"skip_eos": skip_eos}}
    context = done("distill", tmp_path / "measured", inputs, **settings)
    measured = read_lines(output(context, "model") / "metrics.jsonl")
    assert [row["step"] for row in measured if "eval/completions/mean_length" in row] == [0, 1, 2]
    assert [row["step"] for row in measured if "eval/loss" in row] == ([] if skip_eos else [0, 1, 2])
    if skip_eos:  # no measurement was best: the last weights are left
        assert "kept_step" not in context.counts and context.metrics["step"] == 2


def test_held_out_completions_that_the_teacher_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Path]
) -> None:
    """A measurement of nothing else says how long they are, and the run goes on; it reads what it is trained on."""

    def write(self: Sampling, prompts: Any, seeds: Any) -> list[list[Completion]]:
        said = [ids("h") if prompt.prompt_ids == ids("bbb") else ids("de") for prompt in prompts]
        return [[Completion(token_ids, [0.0] * len(token_ids), finished=False)] for token_ids in said]

    monkeypatch.setattr(Sampling, "__call__", write)
    save_teacher(tmp_path / "changing", normalizer=normalizers.Replace("h", "x"))
    inputs["teacher"] = tmp_path / "changing"
    inputs["eval_dataset"] = save_dataset(tmp_path / "apart", "prompt", [{"prompt": "bbb"}])
    rows = metrics(tmp_path / "run", inputs, {}, lmbda=1.0)
    assert [row["eval/completions/mean_length"] for row in rows] == [1.0, 1.0, 1.0]
    assert rows[-1]["loss"] > 0 and not any("eval/loss" in row for row in rows)


def test_held_out_rows_of_which_the_teacher_reads_no_completion(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Its template alone takes 18 tokens. No step is taken for a measurement that can never be made."""
    rows = [{"prompt": talk("b"), "completion": [talk("", "de")[1]]}]
    inputs["eval_dataset"] = save_dataset(tmp_path / "apart", "prompt_completion", rows, conversational=True)
    with pytest.raises(
        StageError, match=r"input eval_dataset has nothing to measure: every item of its 1 rows is masked, row r0 the"
    ):
        metrics(tmp_path / "run", inputs, {}, max_length=12)
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))


def test_rows_that_say_no_text(tmp_path: Path, inputs: dict[str, Path]) -> None:
    rows = [{"input_ids": ids("abc")}]
    inputs["dataset"] = save_dataset(tmp_path / "tokens", "pretokenized", rows)
    with pytest.raises(DataError, match=r"the dataset holds token ids \(pretokenized\).*type: prompt_completion"):
        metrics(tmp_path / "run", inputs, {})


def test_reading_rows_takes_little_more_memory_than_they_do(tmp_path: Path) -> None:
    """440 bytes of each of the student's tokens before, where every token's span was kept until all rows were read."""
    told = [{"prompt": "ab", "completion": "hello world " * 80}] * 50
    dataset = read_dataset(save_dataset(tmp_path / "rows", "prompt_completion", told))
    one, two, limit = byte_level(["l l"], TEMPLATE), byte_level(["o r"], TEMPLATE), RowLimit(4096)
    limits = Limits(limit, None, limit, 4096)
    rows = CrossRows(one, Reader(one), Reader(two), limits, frozenset(), False, lambda row: row)
    rows.given(dataset.select([0]), RowLedger())
    tracemalloc.start()
    try:
        groups = rows.given(dataset, RowLedger())
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(len(group.branches[0].token_ids) for group in groups) == 50 * 883
    assert peak < 1.5 * held


def test_tool_calls_that_both_templates_show_alike(tmp_path: Path) -> None:
    """Their text is compared; those of templates that show them otherwise are dropped, with both texts."""
    calls = TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ shown }}{% endfor %}"
    )
    texts = ("(add {{ c.function.arguments | tojson }})", "[add {{ c.function.arguments | tojson }}]")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    told = [{"prompt": talk("ab"), "completion": [{"role": "assistant", "content": "", "tool_calls": [call]}]}]
    dataset = read_dataset(save_dataset(tmp_path / "rows", "prompt_completion", told, conversational=True))
    one, alike, other = (
        byte_level(merges, calls.replace("{{ shown }}", text))
        for merges, text in ((["a d"], texts[0]), (["d d"], texts[0]), (["d d"], texts[1]))
    )
    limits = Limits(RowLimit(96), None, RowLimit(96), 96)
    readers = [
        CrossRows(one, Reader(one), Reader(two), limits, frozenset(), True, lambda row: row) for two in (alike, other)
    ]
    (group,) = readers[0].given(dataset, RowLedger())
    compared = [
        one.decode(group.branches[0].token_ids[i]) for i, asked in enumerate(group.branches[0].loss_mask or ()) if asked
    ]
    assert "".join(compared) == '(add {"a": 1})' and group.data.sizes[:2] == ((1, 1), (2, 2))
    with pytest.raises(DataError, match=r"the two chat templates show its tool calls as '\(add .* and as '\[add "):
        readers[1].given(dataset, RowLedger())


@pytest.mark.parametrize("blind", ["model", "teacher"])
def test_tool_calls_that_one_template_does_not_show(tmp_path: Path, blind: str) -> None:
    """Such a row is dropped and counted, and the others are compared."""
    shown = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = {"role": "assistant", "content": "ab"}
    told = [{"prompt": talk("ab"), "completion": [one]} for one in (said, {**said, "tool_calls": [call]})]
    dataset = read_dataset(save_dataset(tmp_path / "rows", "prompt_completion", told, conversational=True))
    one, two = (
        byte_level([merge], TEMPLATE if name == blind else shown)
        for merge, name in (("a d", "model"), ("d d", "teacher"))
    )
    limits, ledger = Limits(RowLimit(96), None, RowLimit(96), 96), RowLedger()
    rows = CrossRows(one, Reader(one), Reader(two), limits, frozenset(), True, lambda row: row)
    assert len(rows.given(dataset, ledger)) == 1
    assert ledger.states == {"used": 1, UNALIGNED: 1}
    with pytest.raises(DataError, match=rf"none of the 1 rows.*input {blind}: .*tool calls"):
        rows.given(dataset.select([1]), RowLedger())


def test_rows_of_another_type(tmp_path: Path, inputs: dict[str, Path]) -> None:
    inputs["dataset"] = save_dataset(tmp_path / "prompts", "prompt", [{"prompt": "abc"}])
    with pytest.raises(DataError, match=r"the dataset is of type prompt; this stage takes .* or prompt_completion"):
        metrics(tmp_path / "run", inputs, {}, lmbda=0.5)


def test_what_does_not_go_together() -> None:
    wired = frozenset({"model", "teacher", "dataset"})

    def said(inputs: frozenset[str] = wired, **settings: Any) -> list[str]:
        cross = settings.pop("cross", {})
        return check(Config.model_validate({"cross_tokenizer": cross, **settings}), inputs)

    assert said() == [] and said(cross={"loss_type": "hybrid"}, beta=0.5) == []
    assert "needs input teacher; a model that teaches itself" in said(frozenset({"model", "dataset"}))[0]
    kept = said(frozenset({"model", "teacher_states", "dataset"}), lmbda=0.0)
    assert kept == ["cross_tokenizer needs input teacher; teacher_states are of the student's own tokens"]
    assert "loss_top_k is of tokens that both know" in said(loss_top_k=3)[0]
    served = {"engine": "vllm_server", "urls": ["http://127.0.0.1:1"], "weights_folder": "/tmp"}
    assert any("teacher_engine sends likely tokens" in one for one in said(teacher_engine=served, loss_top_k=3))
    assert "beta is 0.5, but cross_tokenizer.loss_type is uld" in said(beta=0.5)[0]
    assert "cross_tokenizer.matched_weight is of loss_type hybrid" in said(cross={"matched_weight": 1.0})[0]
    alone = said(cross={"loss_type": "hybrid", "unmatched_weight": 1.0})
    assert alone == [
        "cross_tokenizer.unmatched_weight is given alone; give matched_weight and unmatched_weight, or neither"
    ]
    assert "with lmbda 1 there are none" in said(cross={"crossentropy_weight": 1.0})[0]
    assert said(cross={"crossentropy_weight": 1.0}, lmbda=0.5) == []


def test_without_it_other_tokenizers_are_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(StageError, match=r"different tokenizers .*: give cross_tokenizer: \{\}, or take models of one"):
        metrics(tmp_path / "run", inputs, None)
