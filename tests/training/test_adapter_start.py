"""Where adapters start, what of a start is in the weights below, and at which rates its factors are learnt."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import Tensor

from artifacts.errors import StageError
from stages.reward_model import Config as RewardConfig
from stages.sft import Config
from stages.training.adapter_settings import MOVING
from stages.training.adapter_start import SharedStart
from stages.training.adapters import add_adapters, load_adapter, write_adapter
from stages.training.memory_request import Request
from stages.training.memory_shape import read_shape
from stages.training.memory_training import Setup
from stages.training.optimization import Optimization
from stages.training.processes import Processes
from tests.training.conftest import packing_scorer, tiny_model
from tests.training.experts import EXPERTS
from tests.training.test_adapters import by_rows, move, scored
from tests.training.test_optimization import ALONE

STARTS = ("default", "gaussian", "orthogonal", *MOVING)
RANK, ALPHA = 4, 6.0


def started(start: str, **settings: Any) -> Any:
    model = tiny_model(tie_word_embeddings=False)
    given = {"lora_r": RANK, "lora_alpha": ALPHA, "init_lora_weights": start, **settings}
    return add_adapters(model, Config(**given)).eval()


def factors_at_start(model: Any) -> dict[str, Tensor]:
    return model.factors_at_start  # type: ignore[no-any-return]


def layers_of(model: Any) -> dict[str, Any]:
    """Those with adapters, by the names that they have in a model without."""
    found = {name: one for name, one in model.named_modules() if len(getattr(one, "lora_A", ()))}
    return {name.removeprefix("base_model.model."): one for name, one in found.items()}


def factors(layer: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(A [r, I], B [O, r])."""
    low, high = (one["default"].weight.detach().double().numpy() for one in (layer.lora_A, layer.lora_B))
    return low, high


def full_weight(layer: Any, scale: float) -> Tensor:
    low, high = (torch.from_numpy(one) for one in factors(layer))
    weight: Tensor = layer.base_layer.weight.detach().double() + scale * high @ low
    return weight


@pytest.mark.parametrize("start", STARTS)
def test_the_model_is_the_one_that_came(start: str) -> None:
    """Weight by weight, in what it says, and with rsLoRA's scale; the same adapters come again by the same seed."""
    base = tiny_model(tie_word_embeddings=False)
    for scale, settings in ((ALPHA / RANK, {}), (ALPHA / math.sqrt(RANK), {"use_rslora": True})):
        model = started(start, **settings)
        for name, layer in layers_of(model).items():
            weight = base.get_submodule(name).weight.detach()
            torch.testing.assert_close(full_weight(layer, scale).float(), weight, atol=1e-5, rtol=1e-5)
            assert torch.equal(layer.base_layer.weight, weight) == (start not in MOVING)
        torch.testing.assert_close(by_rows(model), by_rows(base), atol=1e-4, rtol=1e-5)
    again = dict(started(start, **settings).named_parameters())
    assert all(torch.equal(one, again[name]) for name, one in model.named_parameters())


@dataclass(frozen=True)
class Second(Processes):
    """The second of two; the first one gives these, in this order."""

    given: Iterator[Tensor]

    def give(self, values: Tensor, owner: int) -> Tensor:
        return next(self.given)


def test_the_second_process_starts_with_the_factors_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of another seed; its frozen weights are then without these, as if it had found them itself, but for
    rounding. What adapters add, as large as the weights, is known of one at a time."""
    first, second = (started("pissa_niter_4", seed=seed) for seed in (1, 2))
    named = [dict(model.named_parameters()) for model in (first, second)]
    factors = {name: one.detach().clone() for name, one in named[0].items() if ".lora_" in name}
    assert not any(torch.equal(one, named[1][name]) for name, one in factors.items())
    known: list[weakref.ref[Tensor]] = []
    at_once: list[int] = []
    added = Linear.get_delta_weight

    def watched(layer: Any, adapter: Any) -> Tensor:
        found: Tensor = added(layer, adapter)
        known.append(weakref.ref(found))
        at_once.append(sum(one() is not None for one in known))
        return found

    monkeypatch.setattr(Linear, "get_delta_weight", watched)
    SharedStart(Second(1, 2, torch.device("cpu"), iter(factors.values())))(second)
    assert len(known) == 2 * len(layers_of(second)) > 4 and max(at_once) == 2
    assert all(torch.equal(one, named[1][name]) for name, one in factors.items())
    for name, one in named[0].items():
        torch.testing.assert_close(named[1][name], one, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(one, factors_at_start(second)[name]) for name, one in factors_at_start(first).items())


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_random_starts(start: str) -> None:
    lows = np.concatenate([factors(one)[0].flatten() for one in layers_of(started(start)).values()])
    if start == "gaussian":  # of standard deviation 1 / r
        assert lows.std() == pytest.approx(1 / RANK, rel=0.05)
        assert all(not factors(one)[1].any() for one in layers_of(started(start)).values())
        return
    for layer in layers_of(started(start)).values():
        low, high = factors(layer)
        assert np.abs(high @ low).max() < 1e-6 < 0.01 < min(np.abs(low).max(), np.abs(high).max())


def test_pissa_holds_the_largest_singular_values() -> None:
    """arXiv:2404.02948, equations 2 to 4, by numpy in float64: A = sqrt(S) V^T and B = U sqrt(S), over LoRA's scale."""
    base, scale = tiny_model(tie_word_embeddings=False), ALPHA / RANK
    for name, layer in layers_of(started("pissa")).items():
        weight = base.get_submodule(name).weight.detach().double().numpy()
        left, values, right = np.linalg.svd(weight, full_matrices=False)
        low, high = factors(layer)
        np.testing.assert_allclose(scale * high @ low, left[:, :RANK] * values[:RANK] @ right[:RANK], atol=1e-5)
        for gram in (high.T @ high, low @ low.T):
            np.testing.assert_allclose(gram, np.diag(values[:RANK]) / scale, atol=1e-5)
        rest = layer.base_layer.weight.detach().double().numpy()
        np.testing.assert_allclose(np.linalg.norm(rest, 2), values[RANK], rtol=1e-5)


@pytest.mark.parametrize(("start", "most"), [("pissa_niter_4", 1.02), ("pissa_niter_16", 1.005)])
def test_fast_pissa_is_near_to_it(start: str, most: float) -> None:
    """What is left is hardly larger than with the best factors of that rank."""
    exact, fast = layers_of(started("pissa")), layers_of(started(start))
    for name, layer in fast.items():
        left, least = (float(one.base_layer.weight.norm()) for one in (layer, exact[name]))
        assert least * (1 - 1e-6) <= left <= most * least


def test_olora_is_a_part_of_the_qr() -> None:
    """arXiv:2406.01775, section 3: B the first columns of Q, A the first rows of R, by numpy in float64."""
    base = tiny_model(tie_word_embeddings=False)
    for name, layer in layers_of(started("olora")).items():
        weight = base.get_submodule(name).weight.detach().double().numpy()
        orthogonal, upper = np.linalg.qr(weight)
        low, high = factors(layer)
        signs = np.sign((orthogonal[:, :RANK] * high).sum(0))  # each pair of a column and a row has one of its own
        np.testing.assert_allclose(high * signs, orthogonal[:, :RANK], atol=1e-5)
        np.testing.assert_allclose(low * signs[:, None], upper[:RANK], atol=1e-4)


PLAIN: list[dict[str, Any]] = [
    {},
    {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"layers.1.*": 3}, "modules_to_save": ["norm"]},
    {"lora_target_modules": ["lm_head", "v_proj"]},
]


@pytest.mark.parametrize("settings", PLAIN)
@pytest.mark.parametrize("start", ["orthogonal", *MOVING[:2]])
def test_an_adapter_is_written_for_the_weights_as_they_came(
    start: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """By peft alone, by us, and merged: it says what the trained model says, and knows of no start."""
    model = started(start, **settings)
    move(model)
    expected = by_rows(model).detach()
    write_adapter(model, tmp_path / "a", None)
    write_adapter(model, tmp_path / "b", None)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (values["init_lora_weights"], values["r"]) == (True, 2 * RANK if start in MOVING else RANK)
    ours = load_adapter(tiny_model(tie_word_embeddings=False), tmp_path / "a").eval()
    alone = PeftModel.from_pretrained(tiny_model(tie_word_embeddings=False), tmp_path / "a").eval()
    merged = model.merge_and_unload()
    for one in (ours, alone, merged):
        torch.testing.assert_close(by_rows(one).detach(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scored(packing_scorer(merged)).detach(), expected, atol=1e-4, rtol=1e-4)
    assert (expected - by_rows(tiny_model(tie_word_embeddings=False)).detach()).abs().max() > 0.01


def test_starts_that_cannot_be() -> None:
    with pytest.raises(
        StageError, match=r"init_lora_weights: .*k_proj has a weight of rank 16 at most, and its adapter"
    ):
        started("pissa", lora_r=20)
    with pytest.raises(StageError, match="embed_tokens is an embedding, which is no product"):
        started("olora", lora_target_modules=["embed_tokens"])
    for settings, message in (
        ({"init_lora_weights": "pissa"}, "init_lora_weights is of LoRA adapters; give lora_r too"),
        ({"init_lora_weights": "pissa", "lora_r": 2, "lora_dropout": 0.1}, "which lora_dropout would change from the"),
        ({"init_lora_weights": "olora", "lora_r": 2, "use_dora": True}, "which use_dora would change from the start"),
        ({"init_lora_weights": "olora", "lora_r": 2, "quantization": "nf4"}, "and would be rounded anew"),
        ({"init_lora_weights": "orthogonal", "lora_r": 3}, "which takes even ranks, found 3"),
        ({"init_lora_weights": "orthogonal", "lora_r": 2, "quantization": "int8"}, "into the few bits of the weights"),
        ({"lora_r": 2, "layers_to_transform": [1, 1]}, r"numbers of layers from 0, each once, found \[1, 1\]"),
        ({"lora_r": 2, "rank_pattern": {"(q": 2}}, r"'\(q' is no regular expression"),
        ({"lora_r": 2, "alpha_pattern": {"q": 0}}, "'q' is given 0.0; it is a number above 0"),
        ({"lora_r": 2, "alpha_pattern": {"q": math.inf}}, "Input should be a finite number"),
        ({"lora_r": 2, "alpha_pattern": {"q": math.nan}}, "Input should be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**settings)
    with pytest.raises(ValueError, match="loraplus_lr_ratio is of LoRA adapters; give lora_r too"):
        RewardConfig(loraplus_lr_ratio=16)  # there is no adapter that it goes on from


@pytest.mark.parametrize(
    "settings",
    [{"layers_to_transform": [0]}, {"rank_pattern": {"q_proj": 2}}, {"init_lora_weights": "pissa"}, {"use_dora": True}],
)
def test_experts_take_adapters_of_one_kind(settings: dict[str, Any]) -> None:
    model = tiny_model("mixtral", **EXPERTS["mixtral"])
    with pytest.raises(
        StageError, match="this model's experts are stacked weights, which do not take it; leave it out"
    ):
        add_adapters(model, Config(lora_r=2, **settings))


RATES = [1e-2, 7e-3, 3e-3]


def adamw_by_hand(weight: Tensor, gradients: list[Tensor], ratio: float) -> Tensor:
    """arXiv:1711.05101, algorithm 2, in float64, at `ratio` times the rates; decay of matrices alone."""
    decay = 0.1 if weight.ndim > 1 else 0.0
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for number, (rate, gradient) in enumerate(zip(RATES, gradients, strict=True), start=1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = first / (1 - 0.9**number) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
        weight = weight * (1 - ratio * rate * decay) - ratio * rate * update
    return weight


def test_lora_plus_learns_b_at_a_rate_of_its_own() -> None:
    """arXiv:2402.12354, section 4, step by step: 16 times the rate for B, and the rate for A and what else is
    trained. An embedding's factors have the other order, and one rate."""
    config = Config(
        lora_r=2,
        loraplus_lr_ratio=16,
        weight_decay=0.1,
        max_grad_norm=None,
        modules_to_save=["norm"],
        lora_target_modules=["q_proj", "embed_tokens", "lm_head"],
    )
    model = add_adapters(tiny_model(tie_word_embeddings=False), config)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    before = {name: one.detach().double() for name, one in trained.items()}
    draws = torch.Generator().manual_seed(5)
    given: dict[str, list[Tensor]] = {name: [] for name in trained}
    optimization = Optimization(trained, config, ALONE)
    for rate in RATES:
        for name, parameter in trained.items():
            parameter.grad = torch.randn(parameter.shape, generator=draws)
            given[name].append(parameter.grad.double())
        optimization.step(rate)
    kinds = {"lora_B.": 0, "lora_A.": 0, "lora_embedding": 0, "norm": 0}
    for name, parameter in trained.items():
        ratio = 16 if ".lora_B." in name else 1
        expected = adamw_by_hand(before[name], given[name], ratio)
        torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-6, rtol=1e-5)
        kinds[next(kind for kind in kinds if kind in name)] += 1
    assert kinds == {"lora_B.": 3, "lora_A.": 3, "lora_embedding": 2, "norm": 5}


@pytest.mark.parametrize("start", ["default", "pissa", "orthogonal"])
def test_the_reference_of_a_start_takes_memory(start: str) -> None:
    """The adapters as they came, in float32, where the weights below are without them."""
    model = started(start)
    shape = read_shape(model.get_base_model().config.to_dict())
    config = Config(lora_r=RANK, init_lora_weights=start)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    request = Request(config, {"model": shape}, frozenset(), Setup())
    assert request.kept_adapters == (0 if start == "default" else 4 * trained)
