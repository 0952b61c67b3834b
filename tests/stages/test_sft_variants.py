"""The stage `sft` with packing, weights, DFT and noise: its first step against the plain one, or by its own formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import DataError
from stages.sft import STAGE, Config
from tests.stages.small_models import labels_loss, output, read_json, read_lines, run_stage, save_dataset, save_model

ROWS = [
    {"prompt": "abc", "completion": "de", "source": "web", "w": 1.0},
    {"prompt": "da", "completion": "bbcaaa", "source": "books", "w": 3.0},
    {"prompt": "hgf", "completion": "e", "source": "web", "w": 0.0},
    {"prompt": "cab", "completion": "aabbcc", "source": "books", "w": 0.5},
    {"prompt": "b", "completion": "c", "source": "web", "w": 2.0},
]
SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "train_batch_size": 8, "max_steps": 3, "max_length": 12}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "rows", "prompt_completion", ROWS)


def train(folder: Path, model: Path, rows: Path, **config: Any) -> tuple[list[Any], Path]:
    context = run_stage("sft", folder, {"model": model, "dataset": rows}, **(SETTINGS | config))
    made = output(context, "model")
    return read_lines(made / "metrics.jsonl"), made


def test_packed_rows_see_nothing_of_each_other(tmp_path: Path, model: Path, rows: Path) -> None:
    """All rows in one step: the losses of plain rows. With one pack a step: 12 tokens at most, every row once."""
    plain, _ = train(tmp_path / "plain", model, rows, train_batch_size=5)
    packed, _ = train(tmp_path / "packed", model, rows, train_batch_size=3, packing=True)
    for one, other in zip(plain, packed, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    settings = {"packing": True, "train_batch_size": 1, "max_steps": None, "num_train_epochs": 1}
    alone, folder = train(tmp_path / "alone", model, rows, **settings)
    # 6, 9, 5, 10 and 3 tokens: 10, 9 + 3, 6 + 5
    steps = [sorted(json.loads(line)["rows"]) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert sorted(steps) == [["r0", "r2"], ["r1", "r4"], ["r3"]]
    assert [row["num_tokens"] for row in alone][-1] == 33


def test_long_rows_go_on_in_another_piece(tmp_path: Path, model: Path, rows: Path) -> None:
    """Cut at 8 tokens, 9 and 10 lose 3; in pieces they keep them, but for the one that nothing predicts."""
    settings: dict[str, Any] = {"packing": True, "max_length": 8, "train_batch_size": 4}  # four packs each
    cut, folder = train(tmp_path / "cut", model, rows, **settings)
    assert read_json(folder / "ledger.json")["truncated_tokens"] == 3
    pieces, folder = train(tmp_path / "split", model, rows, **settings, packing_strategy="bfd_split")
    assert read_json(folder / "ledger.json")["truncated_tokens"] == 0
    # r3#2 has two tokens of which one is trained; r1#2 has one, which is not
    assert (cut[0]["num_tokens"], pieces[0]["num_tokens"]) == (30, 32)
    # four pieces of 8, and a last token that nothing predicts
    wrapped, _ = train(tmp_path / "wrapped", model, rows, **settings, packing_strategy="wrapped")
    assert wrapped[0]["num_tokens"] == 32


def test_weights_of_rows_and_sources(tmp_path: Path, model: Path, rows: Path) -> None:
    """Weighted sum over weighted tokens, by transformers' own loss; rows of weight 0 are dropped and counted."""
    found = save_model(tmp_path / "same", seed=1)
    sources = {"web": 1.0, "books": 0.25}
    losses = [labels_loss(found, row["prompt"], row["completion"]) for row in ROWS]
    weights = [row["w"] * sources[row["source"]] for row in ROWS]
    total = sum(weight * loss for weight, (loss, _) in zip(weights, losses, strict=True))
    count = sum(weight * tokens for weight, (_, tokens) in zip(weights, losses, strict=True))
    settings = {"weight_column": "w", "source_weights": sources}
    metrics, folder = train(tmp_path / "weighted", model, rows, **settings)
    assert metrics[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert read_json(folder / "ledger.json")["states"] == {"filtered: weight 0": 1, "used": 4}
    with pytest.raises(DataError, match="source 'books' has no weight; source_weights names web"):
        train(tmp_path / "unnamed", model, rows, source_weights={"web": 1.0})


def test_dft_weighs_by_probability(tmp_path: Path, model: Path, rows: Path) -> None:
    plain, _ = train(tmp_path / "nll", model, rows)
    weighted, _ = train(tmp_path / "dft", model, rows, loss_type="dft")
    assert 0 < weighted[0]["loss"] < plain[0]["loss"]
    assert weighted[0]["entropy"] == pytest.approx(plain[0]["entropy"], rel=1e-5)


def test_noise_follows_from_the_seed(tmp_path: Path, model: Path, rows: Path) -> None:
    """The same whatever the micro-batch; another with another seed; none in what is not asked for it."""
    quiet, _ = train(tmp_path / "quiet", model, rows)
    noisy, _ = train(tmp_path / "noisy", model, rows, neftune_noise_alpha=5.0)
    cut, _ = train(tmp_path / "cut", model, rows, neftune_noise_alpha=5.0, micro_batch_tokens=1)
    other, _ = train(tmp_path / "other", model, rows, neftune_noise_alpha=5.0, seed=7)
    assert [row["loss"] for row in noisy] == pytest.approx([row["loss"] for row in cut], rel=1e-5)
    assert noisy[0]["loss"] != pytest.approx(quiet[0]["loss"], rel=1e-4)
    assert noisy[0]["loss"] != pytest.approx(other[0]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"packing_strategy": "wrapped"}, "packing_strategy is given, but packing is false"),
        ({"packing": True, "packing_strategy": "wrapped", "weight_column": "w"}, "weights of rows need rows"),
        ({"source_column": "origin"}, "source_column is given, but source_weights is not"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], problem: str) -> None:
    assert STAGE.check is not None
    (found,) = STAGE.check(Config(**settings), frozenset())
    assert found.startswith(problem)
