"""The stage `preference` under every loss: what its first step says where policy and reference are one model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import DataError, StageError
from stages.losses.preference import PREFERENCE_LOSSES
from stages.preference import STAGE, Config
from tests.stages.small_models import labels_loss, output, read_lines, run_stage, save_dataset, save_model

BETA = 0.4
ROWS = [
    {"prompt": "abc", "chosen": "de", "rejected": "fghab"},
    {"prompt": "da", "chosen": "bbc", "rejected": "c"},
    {"prompt": "hgf", "chosen": "e", "rejected": "dd"},
    {"prompt": "cab", "chosen": "aabb", "rejected": "ha"},
]
SETTINGS: dict[str, Any] = {"beta": BETA, "learning_rate": 1e-3, "train_batch_size": 4, "max_steps": 2}
LOG2 = math.log(2)
AT_THE_START: dict[str, tuple[dict[str, Any], float]] = {
    # where no log-probability has moved: every log-ratio, margin and score is 0
    "sigmoid": ({"label_smoothing": 0.1, "f_divergence_type": "js_divergence"}, LOG2),
    "sigmoid_norm": ({}, LOG2),
    "hinge": ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}, 1.0),
    "ipo": ({"ld_alpha": 0.5}, (1 / (2 * BETA)) ** 2),
    # halves against 0.9 and 0.1: log(1/2) - log(0.9 * 0.1)/2
    "exo_pair": ({"label_smoothing": 0.1}, -LOG2 - math.log(0.09) / 2),
    "robust": ({"label_smoothing": 0.2}, LOG2),
    # steep around 0, with its least value elsewhere: small steps
    "discopop": ({"learning_rate": 1e-5}, (LOG2 + 1) / 2),
    "aot": ({}, LOG2),
    "nca_pair": ({}, 2 * LOG2),
    "bco_pair": ({}, 2 * LOG2),
    "sppo_hard": ({}, 2 * (1 / (2 * BETA)) ** 2),
    "apo_zero": ({"ld_alpha": 0.0}, 1.0),
    "apo_down": ({}, 1.0),
}
NOT_THERE = {"aot_unpaired"}
"""Compares completions with those of other pairs: not 0 at the start only by their order. See tests/training."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "pairs", "preference", ROWS)


def train(folder: Path, model: Path, dataset: Path, inputs: dict[str, Path] | None = None, **config: Any) -> list[Any]:
    wired = {"model": model, "dataset": dataset, **(inputs or {})}
    problems = STAGE.check(Config(**(SETTINGS | config)), frozenset(wired)) if STAGE.check else []
    assert problems == []
    context = run_stage("preference", folder, wired, **(SETTINGS | config))
    return read_lines(output(context, "model") / "metrics.jsonl")


def test_every_loss_is_here() -> None:
    assert set(AT_THE_START) | NOT_THERE == {name for name, loss in PREFERENCE_LOSSES.items() if loss.reference}


@pytest.mark.parametrize("name", AT_THE_START)
def test_first_step_against_the_model_itself(tmp_path: Path, model: Path, pairs: Path, name: str) -> None:
    settings, expected = AT_THE_START[name]
    first, second = train(tmp_path, model, pairs, loss_type=name, **settings)
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["grad_norm"] > 0
    assert second["loss"] < first["loss"]


def per_token(model: Any, prompt: str, completion: str) -> tuple[float, float]:
    """(mean log-probability, sum) by transformers' own loss."""
    loss, tokens = labels_loss(model, prompt, completion)
    return -loss / tokens, -loss


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo"])
def test_first_step_without_a_reference(tmp_path: Path, pairs: Path, name: str) -> None:
    """Against the loss from transformers' own likelihoods; nothing is computed for a reference."""
    folder = tmp_path / "model"
    model, total = save_model(folder, seed=1), 0.0
    for row in ROWS:
        (chosen, chosen_sum), (rejected, rejected_sum) = (
            per_token(model, row["prompt"], row[side]) for side in ("chosen", "rejected")
        )
        odds = (chosen - rejected) - math.log((1 - math.exp(chosen)) / (1 - math.exp(rejected)))
        logits = {"simpo": BETA * (chosen - rejected) - 0.3, "orpo": odds, "cpo": BETA * (chosen_sum - rejected_sum)}
        weight, likelihood = {"simpo": (1.0, 0.0), "orpo": (BETA, 1.0), "cpo": (1.0, 1.0)}[name]
        total += weight * math.log1p(math.exp(-logits[name])) - likelihood * chosen
    settings = {"simpo_gamma": 0.3} if name == "simpo" else {}
    rows = train(tmp_path / "run", folder, pairs, loss_type=name, **settings)
    assert rows[0]["loss"] == pytest.approx(total / len(ROWS), rel=1e-5)
    assert not list((tmp_path / "run").rglob("logprobs*"))


def test_gold_completions_of_triple_preferences(tmp_path: Path) -> None:
    """TPO on rows with a column `reference`, alone and beside DPO, whose reference model sees the pair alone."""
    folder = tmp_path / "model"
    model, gold = save_model(folder, seed=1), ["aa", "bcd", "e", "ffg"]
    rows = [{**row, "reference": text} for row, text in zip(ROWS, gold, strict=True)]
    triples = save_dataset(tmp_path / "triples", "triple_preference", rows)
    likelihood = -sum(per_token(model, row["prompt"], row["reference"])[0] for row in rows) / len(rows)
    first = train(tmp_path / "tpo", folder, triples, loss_type="tpo_l", tpo_alpha=0.5, tpo_l_gamma=0.0)[0]
    assert first["nll_loss"] == pytest.approx(likelihood, rel=1e-5)
    both = train(tmp_path / "both", folder, triples, loss_type=["sigmoid", "tpo_l"], tpo_l_gamma=0.0)[0]
    assert both["losses/sigmoid"] == pytest.approx(LOG2, rel=1e-5)
    assert both["loss"] == pytest.approx(LOG2 + first["loss"] + 0.5 * likelihood, rel=1e-5)


def test_gold_completions_are_asked_for(tmp_path: Path, model: Path, pairs: Path) -> None:
    with pytest.raises(DataError, match=r"loss_type tpo takes triple preferences.* normalize the source with type"):
        train(tmp_path, model, pairs, loss_type="tpo")


def test_every_token_of_the_reference(tmp_path: Path, model: Path, pairs: Path) -> None:
    """LD-DPO from an artifact gives the bits of LD-DPO in memory; an artifact of sums alone is refused."""
    inputs, settings = {"model": model, "dataset": pairs}, {"loss_type": "sigmoid", "ld_alpha": 0.3}
    kept = output(run_stage("reference_logprobs", tmp_path / "kept", inputs, per_token=True), "logprobs")
    sums = output(run_stage("reference_logprobs", tmp_path / "sums", inputs), "logprobs")
    in_memory = train(tmp_path / "a", model, pairs, **settings)
    assert train(tmp_path / "b", model, pairs, {"reference_logprobs": kept}, **settings) == in_memory
    with pytest.raises(StageError, match="ld_alpha needs the log-probability of every token; compute them with"):
        train(tmp_path / "c", model, pairs, {"reference_logprobs": sums}, **settings)


@pytest.mark.parametrize(
    ("change", "column"),
    [
        (lambda row: row | {"prompt": "h" + row["prompt"]}, "chosen"),  # of equal lengths are the completions alone
        (lambda row: row | {"chosen": "f" * len(row["chosen"])}, "chosen"),
        (lambda row: row | {"rejected": "a" * len(row["rejected"])}, "rejected"),
    ],
    ids=["prompt", "chosen", "rejected"],
)
def test_references_of_other_tokens_are_refused(
    tmp_path: Path, model: Path, pairs: Path, change: Callable[[dict[str, str]], dict[str, str]], column: str
) -> None:
    """The same row ids and lengths: nothing else would show."""
    others = save_dataset(tmp_path / "others", "preference", [*ROWS[:2], change(ROWS[2]), ROWS[3]])
    kept = output(run_stage("reference_logprobs", tmp_path / "kept", {"model": model, "dataset": others}), "logprobs")
    message = f"row r2: the log-probability of its {column} is of other tokens; compute them on exactly these rows"
    with pytest.raises(StageError, match=message):
        train(tmp_path / "run", model, pairs, {"reference_logprobs": kept})


def test_references_of_two_models_are_refused(tmp_path: Path, model: Path, pairs: Path) -> None:
    save_model(tmp_path / "other", seed=2)
    kept = {
        name: output(run_stage("reference_logprobs", tmp_path / name, {"model": made, "dataset": pairs}), "logprobs")
        for name, made in {"reference_logprobs": model, "eval_reference_logprobs": tmp_path / "other"}.items()
    }
    with pytest.raises(StageError, match=r"of two reference models: reference_logprobs of \w+ and eval_reference_log"):
        train(tmp_path / "run", model, pairs, {**kept, "eval_dataset": pairs})


@pytest.mark.parametrize(
    ("settings", "wired", "problem"),
    [
        ({"loss_type": "hinge", "label_smoothing": 0.1}, (), "label_smoothing is of loss_type sigmoid, exo_pair, "),
        ({"loss_type": "exo_pair"}, (), "loss_type exo_pair needs label_smoothing above 0"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, (), "loss_weights has 1 numbers for 2 losses"),
        ({"loss_type": "simpo"}, ("reference",), "input reference is wired in, but simpo has no reference"),
        ({"loss_type": "simpo", "ld_alpha": 0.5}, (), "ld_alpha is of losses with a reference; simpo has none"),
        (
            {"loss_type": ["sigmoid", "apo_zero"], "f_divergence_type": "forward_kl"},
            (),
            "f_divergence_type forward_kl is of losses of the margin; not apo_zero",
        ),
        (
            {"loss_type": "aot", "use_weighting": True},
            (),
            "use_weighting weighs single pairs; aot compares the pairs of a step",
        ),
        (
            {"f_alpha_divergence_coef": 0.3},
            (),
            "f_alpha_divergence_coef is of alpha_divergence, not of rev",
        ),
        ({"ref_model_sync_steps": 3}, (), "ref_model_sync_steps is given, but sync_ref_model is false"),
        ({"sync_ref_model": True, "lora_r": 4}, (), "sync_ref_model needs the whole model trained; with lora_r only"),
        (
            {"sync_ref_model": True},
            ("reference_logprobs",),
            "sync_ref_model moves the reference, so",
        ),
        ({"sync_ref_model": True, "loss_type": "orpo"}, (), "sync_ref_model is of losses with a reference; orpo has"),
        ({"loss_type": ["aot", "sft"], "ld_alpha": 0.5}, (), "ld_alpha weighs tokens in aot, not in sft; choose one"),
        ({"loss_type": ["aot", "tpo"]}, (), "aot and the losses of triple preferences cannot be added up; choose one"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], wired: tuple[str, ...], problem: str) -> None:
    assert STAGE.check is not None
    problems = STAGE.check(Config(**settings), frozenset(wired))
    assert len(problems) == 1 and problems[0].startswith(problem)


def test_a_list_of_one_is_the_one() -> None:
    """So that equal settings have one fingerprint."""
    one = Config.model_validate_json(json.dumps({"loss_type": ["ipo"]}), strict=True)
    assert one == Config(loss_type="ipo")
