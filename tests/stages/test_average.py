"""The mean of models against the mean of their tensors by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from artifacts.errors import StageError
from stages.average import STAGE, Config
from tests.stages.small_models import output, run_stage, save_model

WEIGHTS = "model.safetensors"


def models(folder: Path, count: int = 3, *, reward: bool = False) -> list[Path]:
    for seed in range(count):
        save_model(folder / str(seed), seed=seed, reward=reward)
    return [folder / str(seed) for seed in range(count)]


def average(folder: Path, found: list[Path], **config: Any) -> Path:
    return output(run_stage("average", folder, {"models": found}, **config), config.get("kind", "model"))


def test_equal_and_unequal_shares(tmp_path: Path) -> None:
    found = models(tmp_path)
    tensors = [load_file(path / WEIGHTS) for path in found]
    even = load_file(average(tmp_path / "even", found) / WEIGHTS)
    uneven = load_file(average(tmp_path / "uneven", found, weights=[2.0, 0.0, 6.0]) / WEIGHTS)
    for name in tensors[0]:
        one, two, three = (each[name] for each in tensors)
        assert_close(even[name], (one + two + three) / 3, atol=1e-6, rtol=1e-6)
        assert_close(uneven[name], 0.25 * one + 0.75 * three, atol=1e-6, rtol=1e-6)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "even" / "job" / "out" / "model")


def test_the_mean_of_one_is_that_one(tmp_path: Path) -> None:
    (found,) = models(tmp_path, 1)
    (found / "metrics.jsonl").write_text("{}\n")
    made = average(tmp_path / "one", [found])
    assert (made / WEIGHTS).read_bytes() != b"" and not (made / "metrics.jsonl").exists()
    for name, tensor in load_file(found / WEIGHTS).items():
        assert torch.equal(load_file(made / WEIGHTS)[name], tensor)
    assert (made / "tokenizer.json").read_bytes() == (found / "tokenizer.json").read_bytes()


def test_reward_models(tmp_path: Path) -> None:
    """The score of the mean is, for equal layers, the mean of the scores."""
    found = models(tmp_path, 2, reward=True)
    first = load_file(found[0] / WEIGHTS)
    second = {**first, "score.weight": load_file(found[1] / WEIGHTS)["score.weight"]}
    save_file(second, found[1] / WEIGHTS, metadata={"format": "pt"})
    made = average(tmp_path / "mean", found, kind="reward_model")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        scores = [
            float(AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, pad_token_id=0)(ids).logits)
            for path in (*found, made)
        ]
    assert scores[2] == pytest.approx((scores[0] + scores[1]) / 2, abs=1e-5)


def test_weights_in_several_files_stay_so(tmp_path: Path) -> None:
    found = models(tmp_path, 2)
    tensors = load_file(found[0] / WEIGHTS)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, found[0] / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (found[0] / "model.safetensors.index.json").write_text(json.dumps(index))
    (found[0] / WEIGHTS).unlink()
    made = average(tmp_path / "mean", found)
    assert {path.name for path in made.glob("*.safetensors")} == set(parts)
    model, other = AutoModelForCausalLM.from_pretrained(made), load_file(found[1] / WEIGHTS)
    for name, tensor in model.state_dict().items():
        if name in other:
            assert_close(tensor, (tensors[name] + other[name]) / 2, atol=1e-6, rtol=1e-6)


def test_models_that_have_no_mean(tmp_path: Path) -> None:
    one, other = models(tmp_path, 2)
    with pytest.raises(StageError, match="weights has 1 numbers for 2 models"):
        average(tmp_path / "a", [one, other], weights=[1.0])
    tensors = load_file(other / WEIGHTS)
    narrow = {**tensors, "model.norm.weight": tensors["model.norm.weight"][:-1].clone()}
    save_file(narrow, other / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        StageError, match=r"weight model\.norm\.weight has shape \[16\] in model 1 and \[15\] in model 2"
    ):
        average(tmp_path / "b", [one, other])
    del tensors["model.norm.weight"]
    save_file(tensors, other / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        StageError, match=r"model 1 and model 2 have different weights; only one of them has model\.norm"
    ):
        average(tmp_path / "c", [one, other])
    broken = {**load_file(one / WEIGHTS)}
    broken["model.norm.weight"][3] = float("nan")
    save_file(broken, other / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"weight model\.norm\.weight is not finite"):
        average(tmp_path / "d", [one, other])
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {name: -place for name, place in tokenizer["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(StageError, match="model 1 and model 2 have different tokenizers"):
        average(tmp_path / "e", [one, other])


def test_a_kind_that_the_inputs_are_not(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="an input is a reward_model; set kind: reward_model to average several"):
        average(tmp_path / "mean", models(tmp_path, 2, reward=True))


def test_weights_that_are_all_zero() -> None:
    assert STAGE.check is not None
    assert STAGE.check(Config(weights=(0.0, 0.0)), frozenset()) == ["weights are all 0; at least one model must count"]
