"""Every way of spreading a model takes the steps of the whole model; here with a single process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from artifacts.errors import StageError
from stages.sft import Config
from stages.sharding import Fsdp, Sharding, Whole, Zero
from stages.training.adapters import add_adapters
from stages.training.batch import Group
from stages.training.language_modeling import TokenLoss
from stages.training.model import Scorer
from stages.training.parallel import Parallel, PolicyCopy, copy_weights, spread
from stages.training.probes import settle_layout
from stages.training.processes import Processes
from stages.training.quantization import quantized
from tests.training.conftest import VOCABULARY, tiny_model
from tests.training.test_loop import sequences

pytestmark = pytest.mark.usefixtures("process_group")
WAYS = [Fsdp(), Zero(2), Zero(3, {"stage3_param_persistence_threshold": 0})]
"""Small parameters stay gathered in ZeRO-3, and all of these are small."""
ALONE = Processes(0, 1, torch.device("cpu"))
ITEMS = 40.0


def config_for(**settings: Any) -> Config:
    return Config(**{"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5, **settings})


def fresh(config: Config) -> Scorer:
    """The same weights every time."""
    return Scorer(add_adapters(tiny_model(), config))


def spread_out(way: Sharding, config: Config) -> tuple[Scorer, Parallel]:
    scorer = fresh(config)
    settle_layout(scorer)
    if config.gradient_checkpointing:
        scorer.transformers_model.gradient_checkpointing_enable({"use_reentrant": False})
    return scorer, spread(scorer, config, ALONE, way)


def accumulate(scorer: Scorer, parallel: Parallel, parts: Sequence[list[Group]]) -> float:
    """The gradient of a step in micro-batches; the summed loss."""
    scorer.train()
    total = 0.0
    for number, part in enumerate(parts):
        loss, _ = TokenLoss()(parallel.forward, scorer.layout(part))
        parallel.backward(loss / ITEMS, last=number == len(parts) - 1)
        total += float(loss.detach())
    return total


def take_steps(scorer: Scorer, parallel: Parallel, count: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each; two micro-batches a step."""
    groups, seen = sequences(), []
    for _ in range(count):
        loss = accumulate(scorer, parallel, [groups[:5], groups[5:]])
        seen.append((loss, float(parallel.gradient_norm())))
        parallel.step(1e-2)
    return seen


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.name}{getattr(way, 'stage', '')}")
def test_the_vocabulary_is_known_however_it_is_spread(way: Sharding) -> None:
    """Given token ids are compared with it after the model was spread; ZeRO-3 leaves the embedding empty by then."""
    scorer, _ = spread_out(way, config_for())
    assert scorer.vocabulary == VOCABULARY


class Quantized(nn.Linear):
    """As bitsandbytes' layers: products in a type of their own, whatever the states are in."""

    compute_dtype: torch.dtype

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        product = nn.functional.linear(states.to(self.compute_dtype), self.weight.to(self.compute_dtype))
        return product.to(states.dtype)


def test_quantized_layers_use_bfloat16_once_the_model_has_been_probed() -> None:
    """Before, its rounding would look as if shared prefixes changed the model, and every row would have its own."""
    scorer = Scorer(tiny_model())
    layers: list[Any] = [one for one in scorer.transformers_model.model.modules() if type(one) is nn.Linear]
    for layer in layers:
        layer.__class__ = Quantized
        layer.compute_dtype = quantized("nf4", torch.device("cpu"))["quantization_config"].bnb_4bit_compute_dtype
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    assert settle_layout(scorer) is None
    spread(scorer, config_for(bf16=True), ALONE, Whole())
    assert len(layers) == 14 and {layer.compute_dtype for layer in layers} == {torch.bfloat16}


def weights(parallel: Parallel) -> dict[str, torch.Tensor]:
    return {name: parallel.weight(name).clone() for name in parallel.shapes()}


def state(parallel: Parallel) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    return {
        name: (parallel.weight(name).clone(), {key: one.clone() for key, one in parallel.moments(name).items()})
        for name in parallel.shapes()
    }


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("settings", [{}, {"lora_r": 4, "gradient_checkpointing": True}], ids=["full", "lora"])
def test_steps_are_those_of_the_whole_model(way: Sharding, settings: dict[str, Any]) -> None:
    config = config_for(**settings)
    whole_scorer, whole = spread_out(Whole(), config)
    scorer, parallel = spread_out(way, config)
    expected = take_steps(whole_scorer, whole, 3)
    for found, wanted in zip(take_steps(scorer, parallel, 3), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    assert_close(weights(parallel), weights(whole), 1e-4)


@pytest.mark.parametrize("way", [Whole(), *WAYS], ids=lambda way: way.name)
def test_state_moves_between_ways(way: Sharding) -> None:
    """Two steps here, the third there, and the other way round."""
    config = config_for()
    whole_scorer, whole = spread_out(Whole(), config)
    take_steps(whole_scorer, whole, 2)
    scorer, parallel = spread_out(way, config)
    for name, (weight, moments) in state(whole).items():
        parallel.load(name, weight, moments, 2)
    parallel.loaded()
    expected = take_steps(whole_scorer, whole, 1)
    assert take_steps(scorer, parallel, 1)[0] == pytest.approx(expected[0], rel=1e-4)
    found, wanted = state(parallel), state(whole)
    for name, (weight, moments) in found.items():
        torch.testing.assert_close(weight, wanted[name][0], atol=1e-4, rtol=1e-4)
        assert_close(moments, wanted[name][1], 1e-4)


@pytest.mark.parametrize("way", [Whole(), *WAYS], ids=lambda way: way.name)
def test_bfloat16_passes_over_float32_masters(way: Sharding) -> None:
    config = config_for(bf16=True)
    scorer, parallel = spread_out(way, config)
    exact = dict(fresh(config).named_parameters())
    start = weights(parallel)
    assert all(torch.equal(start[name], exact[name]) for name in start)  # not rounded
    whole_scorer, whole = spread_out(Whole(), config_for())
    expected = take_steps(whole_scorer, whole, 4)
    found = take_steps(scorer, parallel, 4)
    assert found != expected
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=0.02)
        assert norm == pytest.approx(wanted_norm, rel=0.1)
    for tensor in weights(parallel).values():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float())


def test_masters_keep_what_bfloat16_would_lose() -> None:
    """A step of 1e-5 on weights of size 1 is below bfloat16's resolution; a hundred of them are not."""
    config = config_for(bf16=True, weight_decay=0.0, max_grad_norm=None)
    scorer, parallel = spread_out(Whole(), config)
    name = next(iter(parallel.shapes()))
    start, low = parallel.weight(name).clone(), dict(scorer.named_parameters())[name]
    accumulate(scorer, parallel, [sequences()])
    parallel.gradient_norm()
    parallel.step(1e-5)
    moved = parallel.weight(name) - start
    assert 0.5e-5 < float(moved.abs().max()) < 1.5e-5
    assert low.dtype == torch.bfloat16 and torch.equal(low, parallel.weight(name).bfloat16())


@pytest.mark.parametrize("way", [Whole(), *WAYS], ids=lambda way: way.name)
def test_discarded_gradients_leave_nothing(way: Sharding) -> None:
    groups, config = sequences(), config_for()
    scorer, parallel = spread_out(way, config)
    accumulate(scorer, parallel, [groups[:3], groups[3:4]])
    parallel.gradient_norm()
    parallel.discard()
    other_scorer, other = spread_out(way, config)
    assert take_steps(scorer, parallel, 1) == take_steps(other_scorer, other, 1)
    assert_close(weights(parallel), weights(other), 0.0)


@pytest.mark.parametrize("way", [Whole(), *WAYS], ids=lambda way: way.name)
def test_a_gradient_that_is_no_number_shows_in_the_norm(way: Sharding) -> None:
    scorer, parallel = spread_out(way, config_for())
    before = weights(parallel)
    loss, _ = TokenLoss()(parallel.forward, scorer.layout(sequences()))
    parallel.backward(loss * float("inf"), last=True)
    assert not torch.isfinite(parallel.gradient_norm())
    parallel.discard()
    assert_close(weights(parallel), before, 0.0)


def test_a_copy_follows_the_shards(tmp_path: Path) -> None:
    config = config_for()
    scorer, parallel = spread_out(Fsdp(), config)
    copy = PolicyCopy(parallel, lambda: fresh(config), torch.device("cpu"), bf16=False)
    take_steps(scorer, parallel, 2)
    copy.refresh()
    target = fresh(config)
    copy_weights(parallel, target)
    for left, right in zip(copy.scorer.parameters(), target.parameters(), strict=True):
        assert torch.equal(left, right) and not left.requires_grad
    batch = copy.scorer.layout(sequences())
    with torch.no_grad():
        whole, _ = TokenLoss()(copy.scorer, batch)
        sharded, _ = TokenLoss()(parallel.forward, batch)
    assert float(whole) == pytest.approx(float(sharded), rel=1e-5)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(StageError, match=r"LlamaForCausalLM has no layers of class Nothing, to gather one at a time"):
        spread_out(Fsdp(frozenset({"Nothing"})), config_for())
