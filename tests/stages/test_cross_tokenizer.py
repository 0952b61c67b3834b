"""Distillation from a teacher of another tokenizer, whole stages: against transformers' logits, and what is equal."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from artifacts.errors import DataError, StageError
from stages.data.dataset import read_dataset
from stages.data.ledger import RowLedger
from stages.data.readings import Reader
from stages.data.truncation import RowLimit
from stages.distill import Config, check
from stages.rollouts.requests import Completion
from stages.training.cross_rows import CrossRows, Limits
from stages.training.generation import Sampling
from tests.data.characters import IDS, ids
from tests.data.two_tokenizers import byte_level
from tests.stages.small_models import (
    EOS,
    output,
    read_json,
    read_lines,
    record_samples,
    save_dataset,
    save_model,
    states,
)
from tests.stages.test_other_engines import done

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"
MERGES = ["a b", "d e", "de f", "Ġ a", "c d"]
LETTERS = {place: text for text, place in IDS.items()}
ROWS = [("abc", "def"), ("hg", "a"), ("ab", "cab hgg"), ("eee", "bad de")]
GIVEN: dict[str, Any] = {
    "max_completion_length": 6,
    "lmbda": 0.0,
    "train_batch_size": 4,
    "max_steps": 2,
    "learning_rate": 1e-2,
}


def save_teacher(folder: Path, seed: int = 2, **settings: Any) -> Any:
    """Of another width, with bytes and MERGES for tokens."""
    torch.manual_seed(seed)
    tokenizer = byte_level(MERGES, TEMPLATE, **settings)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
        initializer_range=0.6,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def metrics(folder: Path, inputs: dict[str, Path], cross: dict[str, Any] | None, **settings: Any) -> list[Any]:
    context = done("distill", folder, inputs, cross_tokenizer=cross, **{**GIVEN, **settings})
    return read_lines(output(context, "model") / "metrics.jsonl")


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    save_model(tmp_path / "student", 1)
    save_teacher(tmp_path / "teacher")
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in ROWS]
    return {
        "model": tmp_path / "student",
        "teacher": tmp_path / "teacher",
        "dataset": save_dataset(tmp_path / "rows", "prompt_completion", rows),
    }


def distributions(model: Any, token_ids: list[int], temperature: float) -> Tensor:
    """[T, V], of each token from the second on."""
    with torch.no_grad():
        return (model(torch.tensor([token_ids])).logits[0, :-1] / temperature).softmax(-1)


def whole(probs: Tensor, token_ids: list[int], places: list[int], last: bool) -> Tensor:
    """The distribution of a group of tokens, at these places of the row."""
    kept = places[-1 if last else 0]
    value = probs[kept - 1].clone()
    for place in places:
        if place != kept:
            value *= probs[place - 1, token_ids[place]]
    return value


def distance(one: Tensor, other: Tensor) -> float:
    first, second = sorted(one.tolist(), reverse=True), sorted(other.tolist(), reverse=True)
    width = max(len(first), len(second))
    padded = ([*values, *[0.0] * (width - len(values))] for values in (first, second))
    return sum(abs(a - b) for a, b in zip(*padded, strict=True))


Split = tuple[list[str], list[int], int]
"""How a model reads a row: what each token says, the tokens, and the characters before the completion."""


def groups_of(own: Split, other: Split, length: int, ended: bool) -> list[tuple[list[int], list[int]]]:
    """Places of tokens between neighbouring characters at which tokens of both begin, and the ends, if any."""
    starts = [
        [sum(map(len, texts[:place])) - before for place in range(len(texts) + 1)] for texts, _, before in (own, other)
    ]
    common = sorted({*starts[0]} & {*starts[1]} & {*range(length + 1)})
    found = [
        tuple([place for place, start in enumerate(one) if first <= start < last] for one in starts)
        for first, last in pairwise(common)
    ]
    ends = [tuple([one.index(length)] for one in starts)] if ended else []
    return [(one, two) for one, two in [*found, *ends] if one[0] > 0 and two[0] > 0]


def expected(
    models: tuple[Any, Any],
    rows: list[tuple[Split, Split, int, bool]],
    *,
    last: bool = False,
    temperatures: tuple[float, float] = (1.0, 1.0),
) -> tuple[float, int, int]:
    """(summed distance by rank, groups, student's tokens in them) of (the row for both, the completion's characters,
    whether it ended)."""
    total, count, tokens = 0.0, 0, 0
    for own, other, length, ended in rows:
        sides = [
            (distributions(model, split[1], temperature), split[1])
            for model, split, temperature in zip(models, (own, other), temperatures, strict=True)
        ]
        for pair in groups_of(own, other, length, ended):
            merged = [whole(*side, places, last) for side, places in zip(sides, pair, strict=True)]
            total, count, tokens = total + distance(*merged), count + 1, tokens + len(pair[0])
    return total, count, tokens


def plain(tokenizer: Any, own: list[int], prompt: str, *, ended: bool) -> tuple[Split, Split, int, bool]:
    """A row of these tokens of the student's, whose text begins with the prompt."""
    letters = [LETTERS[token] for token in own]
    text = "".join(letters[: len(letters) - ended])
    pieces = tokenizer.tokenize(text) + [tokenizer.eos_token] * ended
    other = pieces, tokenizer.convert_tokens_to_ids(pieces), len(prompt)
    return (letters, own, len(prompt)), other, len(text) - len(prompt), ended


@pytest.mark.parametrize(
    ("settings", "temperatures"),
    [
        ({}, (1.0, 1.0)),
        ({"token_merge_strategy": "bayesian"}, (0.7, 0.7)),
        ({"student_temperature": 0.8, "teacher_temperature": 1.5}, (0.8, 1.5)),
    ],
)
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_the_first_loss(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inputs: dict[str, Path],
    lmbda: float,
    settings: dict[str, Any],
    temperatures: tuple[float, float],
) -> None:
    """Of given completions and of the student's own, by hand on transformers' distributions; whatever the
    micro-batches."""
    student, (teacher, tokenizer) = save_model(tmp_path / "again", 1), save_teacher(tmp_path / "again2")
    sampled = record_samples(monkeypatch)
    given = {"lmbda": lmbda, "temperature": 0.7 if temperatures == (0.7, 0.7) else 1.0}
    rows = metrics(tmp_path / "run", inputs, settings, **given)
    taught = [plain(tokenizer, [*ids(prompt + words), EOS], prompt, ended=True) for prompt, words in ROWS]
    if lmbda:
        prompts = {tuple(ids(prompt)): prompt for prompt, _ in ROWS}
        taught = [
            plain(tokenizer, [*prompt, *words], prompts[tuple(prompt)], ended=words[-1] == EOS)
            for prompt, words in sampled[:4]
        ]
    last = settings.get("token_merge_strategy") == "bayesian"
    total, count, tokens = expected((student, teacher), taught, last=last, temperatures=temperatures)
    assert rows[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert rows[0]["divergence"] == pytest.approx(total / count, rel=1e-5)
    written = sum(len(own[1]) - own[2] for own, *_ in taught)
    assert rows[0]["aligned_tokens"] == pytest.approx(tokens / written)
    (cut,) = metrics(tmp_path / "cut", inputs, settings, **given, micro_batch_tokens=4, max_steps=1)
    assert (cut["loss"], cut["grad_norm"]) == pytest.approx((rows[0]["loss"], rows[0]["grad_norm"]), rel=1e-5)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_equal_tokenizers(tmp_path: Path, inputs: dict[str, Path], lmbda: float, beta: float) -> None:
    """Every token is a group, and every one matched: what the way of one tokenizer learns."""
    save_model(tmp_path / "other", 7)
    inputs["teacher"] = tmp_path / "other"
    given = {"lmbda": lmbda, "beta": beta}
    known = metrics(tmp_path / "known", inputs, None, **given)
    cross = {"loss_type": "hybrid", "matched_weight": 1.0, "unmatched_weight": 0.0}
    crossed = metrics(tmp_path / "crossed", inputs, cross, **given)
    for row, other in zip(known, crossed, strict=True):
        for name in ("loss", "divergence", "grad_norm"):
            assert other[name] == pytest.approx(row[name], rel=1e-4)
        assert other["matched_loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert (other["unmatched_loss"], other["aligned_tokens"]) == (0.0, 1.0)


def test_a_teacher_that_is_the_student_has_nothing_to_teach(tmp_path: Path, inputs: dict[str, Path]) -> None:
    inputs["teacher"] = inputs["model"]
    for cross in ({}, {"loss_type": "hybrid"}):
        first = metrics(tmp_path / str(len(cross)), inputs, cross)[0]
        assert first["loss"] == pytest.approx(0.0, abs=1e-6)


def test_the_cross_entropy_of_given_completions(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Beside the divergence, in steps on given completions alone."""
    bare = metrics(tmp_path / "bare", inputs, {})
    weighed = metrics(tmp_path / "weighed", inputs, {"crossentropy_weight": 0.5})
    student, tokenizer = save_model(tmp_path / "again", 1), byte_level(MERGES, TEMPLATE)
    total, count = 0.0, 0
    for prompt, words in ROWS:
        own = [*ids(prompt + words), EOS]
        groups = groups_of(*plain(tokenizer, own, prompt, ended=True))
        probs = distributions(student, own, 1.0)
        total -= sum(float(probs[place - 1, own[place]].log()) for group, _ in groups for place in group)
        count += len(groups)
    assert weighed[0]["crossentropy"] == pytest.approx(total / count, rel=1e-5)
    assert weighed[0]["loss"] == pytest.approx(bare[0]["loss"] + 0.5 * total / count, rel=1e-5)
    assert "crossentropy" not in bare[0]
    mixed = metrics(tmp_path / "mixed", inputs, {"crossentropy_weight": 0.5}, lmbda=0.5, max_steps=6)
    assert {row["on_policy"] for row in mixed} == {0.0, 1.0}
    for row in mixed:
        assert (row["on_policy"] == 0.0) == ("crossentropy" in row)
        assert row["loss"] == pytest.approx(row["divergence"] + 0.5 * row.get("crossentropy", 0.0), rel=1e-5)


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_conversations_in_templates_of_their_own(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """What both show of the completion is compared, and the ends of the turns; the templates are not."""
    rows = [{"prompt": talk(prompt), "completion": [talk("", words)[1]]} for prompt, words in ROWS]
    inputs["dataset"] = save_dataset(tmp_path / "talks", "prompt_completion", rows, conversational=True)
    (row, *_) = metrics(tmp_path / "run", inputs, {})
    teacher, tokenizer = save_teacher(tmp_path / "again")
    taught = []
    for prompt, words in ROWS:
        begin = f"user: {prompt}<end>assistant: "
        own, other = ids(f"<{prompt}>{words}$"), tokenizer.encode(f"{begin}{words}<end>")
        pieces = tokenizer.convert_ids_to_tokens(other)
        letters = [LETTERS[token] for token in own]
        taught.append(((letters, own, len(prompt) + 2), (pieces, other, len(begin)), len(words), True))
    total, count, _ = expected((save_model(tmp_path / "again2", 1), teacher), taught)
    assert "Ġa" in tokenizer.tokenize(": a")  # reaches over the edge of the second row's completion: its end is left
    assert row["loss"] == pytest.approx(total / count, rel=1e-5)
    (own, *_) = metrics(tmp_path / "own", inputs, {}, lmbda=1.0)
    assert own["aligned_tokens"] > 0
    inputs["eval_dataset"] = save_dataset(tmp_path / "apart", "prompt", [{"prompt": "abc"}, {"prompt": "b"}])
    (apart, *_) = metrics(tmp_path / "measured", inputs, {}, lmbda=1.0)  # held-out prompts, which the student completes
    assert apart["eval/loss"] == apart["eval/divergence"] > 0 and apart["eval/aligned_tokens"] > 0


def test_what_the_generation_prompt_says_is_not_learnt(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """A student whose template opens a completion's thoughts itself, and a teacher that has to: of equal tokens, all
    behind the opening are compared, and none of it."""
    _, tokenizer = save_teacher(tmp_path / "thinking", 1)
    tokenizer.chat_template = TEMPLATE.replace("assistant: ", "assistant: <x>")
    tokenizer.save_pretrained(tmp_path / "thinking")
    inputs["model"] = tmp_path / "thinking"
    rows = [{"prompt": talk("b"), "completion": [talk("", "<x>deb")[1]]}]
    inputs["dataset"] = save_dataset(tmp_path / "talks", "prompt_completion", rows, conversational=True)
    (row,) = metrics(tmp_path / "run", inputs, {}, train_batch_size=1, max_steps=1)
    assert row["aligned_tokens"] == 1.0


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


def test_rows_of_another_type(tmp_path: Path, inputs: dict[str, Path]) -> None:
    inputs["dataset"] = save_dataset(tmp_path / "prompts", "prompt", [{"prompt": "abc"}])
    with pytest.raises(DataError, match=r"the dataset is of type prompt; this stage takes .* or prompt_completion"):
        metrics(tmp_path / "run", inputs, {}, lmbda=0.5)


def test_plain_text_is_compared_from_its_first_token_that_something_comes_before(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    inputs["dataset"] = save_dataset(tmp_path / "texts", "language_modeling", [{"text": "abcd"}])
    (row, *_) = metrics(tmp_path / "run", inputs, {}, train_batch_size=1)
    # ab|cd of the teacher's are a|b|c|d of the student's: the first group is out, its first token has no predecessor
    assert row["aligned_tokens"] == pytest.approx(3 / 4)


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


def made(folder: Path, stage: str, inputs: dict[str, Path], name: str = "model", **settings: Any) -> Path:
    return output(done(stage, folder, inputs, **settings), name)


@pytest.mark.parametrize(
    ("cross", "merges", "settings"),
    [
        # ranks alone do not say which token is likely; beside the cross-entropy, as in the paper
        ({"crossentropy_weight": 1.0}, 29, {"lmbda": 0.0}),
        (
            {
                "loss_type": "hybrid",
                "token_merge_strategy": "bayesian",
                "matched_weight": 1.0,
                "unmatched_weight": 0.2,
            },
            5,
            {"lmbda": 0.3, "beta": 0.5},
        ),
    ],
)
def test_a_student_learns_what_is_held_out(
    tmp_path: Path, cross: dict[str, Any], merges: int, settings: dict[str, Any]
) -> None:
    """Both tokenizers are trained on the rows: bytes with merges, and characters. The teacher has learnt to turn two
    words around."""
    words = ["été", "blue", "zwölf", "red"]
    rows = [
        {"prompt": talk(f"{one} {two}"), "completion": [talk("", f"{two} {one}")[1]]} for one in words for two in words
    ]
    apart = [3, 9, 14]
    sets = {
        "dataset": save_dataset(
            tmp_path / "rows",
            "prompt_completion",
            [row for place, row in enumerate(rows) if place not in apart],
            conversational=True,
        ),
        "eval_dataset": save_dataset(
            tmp_path / "apart", "prompt_completion", [rows[place] for place in apart], conversational=True
        ),
    }
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {"bytes": {"vocab_size": 261 + merges}, "characters": {"tokenizer": "characters", "seed": 3}}
    given = {"dataset": sets["dataset"]}
    bases = {name: made(tmp_path / name, "init_model", given, **sizes, **one) for name, one in own.items()}
    training = {"learning_rate": 1e-2, "train_batch_size": 13, "max_steps": 50}
    teacher = made(tmp_path / "sft", "sft", {"model": bases["bytes"], **sets}, **training)
    student = made(
        tmp_path / "student",
        "distill",
        {"model": bases["characters"], "teacher": teacher, **sets},
        cross_tokenizer=cross,
        max_completion_length=16,
        eval_steps=10,
        **training,
        **settings,
    )
    for folder in (teacher, student):
        measured = [row["eval/loss"] for row in read_lines(folder / "metrics.jsonl") if "eval/loss" in row]
        assert measured[-1] < 0.5 * measured[0]
