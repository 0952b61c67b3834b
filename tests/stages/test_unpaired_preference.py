"""The stage `unpaired_preference`: its first step where policy and reference are one model, and what it asks for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import DataError, StageError
from stages.unpaired_preference import STAGE, Config
from tests.stages.small_models import output, read_lines, run_stage, save_dataset, save_model

ROWS = [
    {"prompt": "abc", "completion": "de", "label": True},
    {"prompt": "da", "completion": "bbc", "label": False},
    {"prompt": "hgf", "completion": "e", "label": True},
    {"prompt": "hgf", "completion": "dd", "label": False},
    {"prompt": "cab", "completion": "aabb", "label": True},
    {"prompt": "cab", "completion": "ha", "label": False},
]
SETTINGS: dict[str, Any] = {"beta": 0.4, "learning_rate": 1e-3, "train_batch_size": 6, "max_steps": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "judged", "unpaired_preference", ROWS)


def train(folder: Path, model: Path, dataset: Path, inputs: dict[str, Path] | None = None, **config: Any) -> list[Any]:
    wired = {"model": model, "dataset": dataset, **(inputs or {})}
    context = run_stage("unpaired_preference", folder, wired, **(SETTINGS | config))
    return read_lines(output(context, "model") / "metrics.jsonl")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # every log-ratio, the KL term and the reward shift are 0
        ({"loss_type": "kto"}, 0.5),
        ({"loss_type": "kto", "desirable_weight": 1.2, "undesirable_weight": 0.6}, 0.45),
        ({"loss_type": "apo_zero_unpaired"}, 0.5),
        ({"loss_type": "bco"}, math.log(2)),
    ],
)
def test_first_step(tmp_path: Path, model: Path, judged: Path, settings: dict[str, Any], expected: float) -> None:
    first, second = train(tmp_path, model, judged, **settings)
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert second["loss"] < first["loss"]
    assert second["rewards/chosen"] > second["rewards/rejected"]
    assert ("kl" in first, "delta" in first) == (settings["loss_type"] == "kto", settings["loss_type"] == "bco")


def test_the_reference_from_an_artifact(tmp_path: Path, model: Path, judged: Path) -> None:
    """Gives the numbers of the one computed here; mismatched completions included."""
    inputs = {"model": model, "dataset": judged}
    kept = output(run_stage("reference_logprobs", tmp_path / "kept", inputs), "logprobs")
    in_memory = train(tmp_path / "a", model, judged)
    assert train(tmp_path / "b", model, judged, {"reference_logprobs": kept}) == in_memory


def test_an_artifact_of_more_rows_gave_other_completions(tmp_path: Path, model: Path, judged: Path) -> None:
    """A row's mismatched completion depends on all rows; equal lengths must not hide that."""
    more = [*ROWS, *({"prompt": "ab" + end, "completion": "de", "label": True} for end in "cdefgh")]
    wide = save_dataset(tmp_path / "wide", "unpaired_preference", more)
    kept = output(run_stage("reference_logprobs", tmp_path / "kept", {"model": model, "dataset": wide}), "logprobs")
    with pytest.raises(StageError, match=r"row r\d: .*(its mismatched is of other tokens|log-probabilities are of)"):
        train(tmp_path / "run", model, judged, {"reference_logprobs": kept})


def test_pairs_are_a_completion_of_each_kind(tmp_path: Path, model: Path) -> None:
    """The same rows as pairs, and judged one by one."""
    pairs = [{"prompt": "ab", "chosen": "c", "rejected": "dd"}, {"prompt": "fe", "chosen": "gh", "rejected": "a"}]
    paired = save_dataset(tmp_path / "pairs", "preference", pairs)
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    single = save_dataset(tmp_path / "single", "unpaired_preference", rows)
    settings = {"loss_type": "apo_zero_unpaired", "train_batch_size": 4}
    one, other = train(tmp_path / "a", model, paired, **settings), train(tmp_path / "b", model, single, **settings)
    for left, right in zip(one, other, strict=True):
        assert left == pytest.approx(right, rel=1e-5, abs=1e-6)
    kept = output(run_stage("reference_logprobs", tmp_path / "kept", {"model": model, "dataset": paired}), "logprobs")
    with pytest.raises(StageError, match=r"not of judged completions .*normalized to type unpaired_preference"):
        train(tmp_path / "c", model, paired, {"reference_logprobs": kept}, **settings)


def test_density_ratios_weigh_undesirable_rows(tmp_path: Path, model: Path) -> None:
    """Two kinds of prompts, each of one kind of completion alone: the ratios go to their bounds."""
    rows = [{"prompt": "aaaa", "completion": text, "label": True} for text in ("b", "c", "d")]
    rows += [{"prompt": "hhhh", "completion": text, "label": False} for text in ("b", "c", "d")]
    dataset = save_dataset(tmp_path / "rows", "unpaired_preference", rows)
    settings = {"loss_type": "bco", "use_density_ratio": True, "min_density_ratio": 0.25, "max_density_ratio": 4.0}
    first = train(tmp_path / "run", model, dataset, **settings)[0]
    # three rows at log 2, three at a quarter of it
    assert first["loss"] == pytest.approx((3 + 3 * 0.25) / 6 * math.log(2), rel=1e-4)


def test_one_prompt_is_not_enough_for_a_kl_term(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": "ab", "completion": text, "label": text == "c"} for text in "cde"]
    dataset = save_dataset(tmp_path / "rows", "unpaired_preference", rows)
    with pytest.raises(DataError, match="all 3 completions have one and the same prompt; the KL term of kto"):
        train(tmp_path / "kto", model, dataset)
    kept = output(run_stage("reference_logprobs", tmp_path / "kept", {"model": model, "dataset": dataset}), "logprobs")
    assert train(tmp_path / "bco", model, dataset, {"reference_logprobs": kept}, loss_type="bco")


@pytest.mark.parametrize(
    ("settings", "wired", "problem"),
    [
        ({"loss_type": "bco", "desirable_weight": 2.0}, (), "desirable_weight and undesirable_weight are of loss_type"),
        ({"use_density_ratio": True}, (), "use_density_ratio is of loss_type bco; kto has none"),
        ({}, ("reference", "reference_logprobs"), "inputs reference_logprobs and reference exclude each other"),
        ({"prompt_sample_size": 9}, (), "prompt_sample_size is given, but use_density_ratio is false"),
        (
            {"loss_type": "bco", "use_density_ratio": True, "min_density_ratio": 20.0},
            (),
            "min_density_ratio 20.0 is above max_density_ratio 10.0",
        ),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], wired: tuple[str, ...], problem: str) -> None:
    assert STAGE.check is not None
    problems = STAGE.check(Config(**settings), frozenset(wired))
    assert len(problems) == 1 and problems[0].startswith(problem)
