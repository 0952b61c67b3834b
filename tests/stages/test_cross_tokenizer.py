"""Distillation from a teacher of another tokenizer, whole stages: against transformers' logits, and what is equal."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.characters import IDS, ids
from tests.data.two_tokenizers import byte_level
from tests.stages.cross_tokenizer_runs import MERGES, ROWS, TEMPLATE, cross_inputs, metrics, save_teacher, talk  # noqa: F401
from tests.stages.small_models import EOS, record_samples, save_dataset, save_model

LETTERS = {place: text for text, place in IDS.items()}


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


def test_plain_text_is_compared_from_its_first_token_that_something_comes_before(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    inputs["dataset"] = save_dataset(tmp_path / "texts", "language_modeling", [{"text": "abcd"}])
    (row, *_) = metrics(tmp_path / "run", inputs, {}, train_batch_size=1)
    # ab|cd of the teacher's are a|b|c|d of the student's: the first group is out, its first token has no predecessor
    assert row["aligned_tokens"] == pytest.approx(3 / 4)
