"""Weights of few bits against tables and blocks written down here, and a model of the weights that they stand for."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from artifacts.errors import StageError
from stages.sft import Config
from stages.sharding import Whole
from stages.training.adapters import add_adapters
from stages.training.batch import Branch, Group
from stages.training.initial import switched_off
from stages.training.memory_shape import read_shape
from stages.training.memory_training import Setup, Training
from stages.training.model import load_causal_lm
from stages.training.parallel import spread
from stages.training.quantization import dequantized, is_quantized, quantized
from tests.training.conftest import packing_scorer, tiny_model
from tests.training.test_adapters import by_rows, gradients, move, scored
from tests.training.test_parallel import ALONE, take_steps

KINDS = ("nf4", "fp4", "int8")
CPU = torch.device("cpu")
BLOCK, OUTER = 64, 256
"""Weights of one constant, and constants of one constant of theirs (arXiv:2305.14314, section 3)."""
SIZES = {"hidden_size": 64, "intermediate_size": 144, "head_dim": 16}
"""Rows of whole blocks, and of two and a quarter."""


def nf4_values() -> Tensor:
    """The 16 values of the paper's appendix E: 8 quantiles of a normal distribution below 0, and 9 from it on, the
    last ones of either side at distance (1 / 32 + 1 / 30) / 2 of probability from 0 and 1; scaled to 1."""
    ends = 1 - (1 / 32 + 1 / 30) / 2
    above = [NormalDist().inv_cdf(0.5 + (ends - 0.5) * number / 8) for number in range(1, 9)]
    below = [-NormalDist().inv_cdf(0.5 + (ends - 0.5) * number / 7) for number in range(1, 8)]
    values = torch.tensor([*below, 0.0, *above], dtype=torch.float64).sort().values
    return (values / values.max()).float()


def fp4_values() -> Tensor:
    """A sign, two bits of exponent and one of mantissa, over the largest; the smallest is 1 / 192."""
    above = [0.0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0]
    return torch.tensor([*(-one for one in above), *above]).unique()


def by_blocks(weight_OI: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(each weight over its block's largest, as the nearest value; the largest [blocks])."""
    flat = weight_OI.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    nearest = (blocks / largest.clamp(min=1e-38)[:, None])[..., None].sub(values).abs().argmin(-1)
    return values[nearest], largest


def four_bits(weight_OI: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(what 4 bits make of a weight, how far the constants in 8 bits may lie from their own values)."""
    chosen, largest = by_blocks(weight_OI, values)
    centred = nn.functional.pad(largest - largest.mean(), (0, -len(largest) % OUTER)).view(-1, OUTER)
    # of 8 bits with a dynamic exponent, the widest gap is 1 / 64 of the range to either side
    slack = (centred.abs().amax(1, keepdim=True) / 100).expand(-1, OUTER).flatten()[: len(largest)]
    size = weight_OI.numel()
    exact = (chosen * largest[:, None]).flatten()[:size].view_as(weight_OI)
    return exact, (chosen.abs() * slack[:, None]).flatten()[:size].view_as(weight_OI) + 1e-6


def eight_bits(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A row over its largest, in 127ths, of weights in float16 (arXiv:2208.07339, section 2.2)."""
    halves = weight_OI.half().float()
    largest = halves.abs().amax(1, keepdim=True)
    levels = (halves * (127 / largest)).round().nan_to_num(0)
    return levels * largest / 127, torch.full_like(weight_OI, 1e-6)


EXPECTED = {
    "nf4": lambda weight: four_bits(weight, nf4_values()),
    "fp4": lambda weight: four_bits(weight, fp4_values()),
    "int8": eight_bits,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantization") / "model"
    model: Any = tiny_model("qwen2", **SIZES)  # with biases
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_(generator=torch.Generator().manual_seed(1))
            layer.mlp.up_proj.weight[3] = 0  # what has no largest weight
    model.save_pretrained(path)
    return path


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if is_quantized(layer)}


def load(folder: Path, kind: str) -> Any:
    return load_causal_lm(folder, **quantized(kind, CPU))


def stand_in(folder: Path, kind: str) -> Any:
    """The model in float32 of the weights that those of few bits stand for."""
    model = load_causal_lm(folder)
    with torch.no_grad():
        for name, layer in layers_of(load(folder, kind)).items():
            model.get_submodule(name).weight.copy_(dequantized(layer))
    return model


LORA: dict[str, Any] = {"lora_r": 3, "lora_alpha": 7, "learning_rate": 1e-2}


def adapted(model: Any, **settings: Any) -> Any:
    found = add_adapters(model, Config(**LORA, **settings))
    move(found)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_the_nearest_value_of_its_block(folder: Path, kind: str) -> None:
    full, found = load_causal_lm(folder), layers_of(load(folder, kind))
    assert len(found) == 14 and all(name.endswith("_proj") for name in found)
    for name, layer in found.items():
        weight = full.get_submodule(name).weight.detach()
        expected, slack = EXPECTED[kind](weight)
        apart = (dequantized(layer) - expected).abs()
        assert bool((apart <= slack).all()), f"{name} is {float((apart - slack).max())} further off than may be"
        assert 0.001 < float((expected - weight).norm() / weight.norm()) < 0.15
        bits = layer.weight.nbytes * 8 / weight.numel()
        assert bits == (8 if kind == "int8" else 4)


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True, "lora_target_modules": ("q_proj", "up_proj")}, {"use_rslora": True}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_as_the_model_of_these_weights(folder: Path, kind: str, settings: dict[str, Any]) -> None:
    """Log-probabilities and all gradients, in packs with shared prefixes against rows; without a gradient, the same."""
    ours, theirs = adapted(load(folder, kind), **settings), adapted(stand_in(folder, kind), **settings)
    scorer = packing_scorer(ours)
    expected = by_rows(theirs)
    with torch.no_grad():
        torch.testing.assert_close(scored(scorer.eval()), expected, atol=2e-5, rtol=1e-5)
    found = scored(scorer.train())
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    of_theirs = gradients(theirs, expected)
    for name, gradient in gradients(ours, found).items():
        torch.testing.assert_close(gradient, of_theirs[name], atol=2e-4, rtol=2e-4, msg=lambda text, n=name: n + text)
    full = adapted(load_causal_lm(folder), **settings)
    assert (by_rows(full) - expected).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_model_of_these_weights(folder: Path, kind: str) -> None:
    """And the reference, adapters switched off, stays the quantized base."""
    scorers = [packing_scorer(adapted(model)) for model in (load(folder, kind), stand_in(folder, kind))]
    base = packing_scorer(stand_in(folder, kind))
    if kind == "nf4":  # layers computed again give the same
        scorers[0].transformers_model.gradient_checkpointing_enable({"use_reentrant": False})
    ours, theirs = (spread(scorer, Config(**LORA), ALONE, Whole()) for scorer in scorers)
    for _ in range(3):
        for (loss, norm), (same_loss, same_norm) in zip(
            take_steps(scorers[0], ours, 1), take_steps(scorers[1], theirs, 1), strict=True
        ):
            assert (same_loss, same_norm) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))
        with switched_off(scorers[0])() as reference, torch.no_grad():
            torch.testing.assert_close(scored(reference.eval()), scored(base), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_computed_alike_in_any_company(folder: Path, kind: str) -> None:
    """LLM.int8()'s columns of outliers would depend on the other tokens of a pass."""
    scorer = packing_scorer(load(folder, kind))
    ids = [7 * number % 61 for number in range(40)]
    groups = [
        Group(str(number), ids[number : number + 6], (Branch(ids[20 + number : 24 + number]),)) for number in range(9)
    ]
    with torch.no_grad():
        together = scored(scorer, groups)
        alone = torch.cat([scored(scorer, [group]) for group in groups])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_a_product_is_of_the_rounded_weight(folder: Path, kind: str) -> None:
    """Loss of a step near the one of float32, whose weights and states have two digits more."""
    losses = []
    for bf16 in (False, True):
        scorer = packing_scorer(adapted(load(folder, kind)))
        parallel = spread(scorer, Config(**LORA, bf16=bf16), ALONE, Whole())
        losses.append(take_steps(scorer, parallel, 2))
    for (loss, norm), (rounded, rounded_norm) in zip(*losses, strict=True):
        assert loss != rounded and rounded == pytest.approx(loss, rel=0.02)
        assert rounded_norm == pytest.approx(norm, rel=0.1)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("kind", KINDS)
def test_its_memory_is_predicted(tmp_path: Path, kind: str, family: str) -> None:
    """All tensors that a loaded model holds, apart from the tables of 16 and 256 values that all layers have. Experts
    stay as they are."""
    wide = {**SIZES, "hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 4}
    more = {"num_local_experts": 4} if family == "mixtral" else {}
    tiny_model(family, **wide, **more).save_pretrained(tmp_path)
    model, held = load(tmp_path, kind), 0
    for parameter in model.parameters():
        held += parameter.nbytes
        if kind == "int8":
            held += 0 if (scales := getattr(parameter, "SCB", None)) is None else scales.nbytes
        elif (state := getattr(parameter, "quant_state", None)) is not None:
            held += state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes
    shape = read_shape(model.config.to_dict())
    training = Training.of(Config(**LORA, quantization=kind), shape, Setup())
    adapters = 4 * training.trained
    assert training.state()["weights"] == pytest.approx(held + adapters, rel=1e-3)
    # beside it a weight in float32 for each product, and in the end the whole model
    assert training.dequantized == 4 * 256 * (256 if family == "llama" else 64)
    assert training.exported == 4 * shape.parameters + adapters


def test_what_is_not_finite_is_seen_before_it_is_rounded(tmp_path: Path) -> None:
    """The values of few bits are finite, whatever they were made of."""
    model: Any = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    model.save_pretrained(tmp_path)
    for kind in KINDS:
        with pytest.raises(
            StageError, match=r"1 of 1536 values of model\.layers\.1\.mlp\.up_proj\.weight are not finite"
        ):
            load(tmp_path, kind)


def test_what_is_quantized_already_is_not_taken(folder: Path, tmp_path: Path) -> None:
    load(folder, "nf4").save_pretrained(tmp_path)
    with pytest.raises(StageError, match=r"weights are quantized already .* take the model that it was made of"):
        load_causal_lm(tmp_path)


def test_a_quantized_module_is_not_trained_whole(folder: Path) -> None:
    with pytest.raises(StageError, match="modules_to_save: 'v_proj' is quantized, so it cannot be trained whole"):
        adapted(load(folder, "int8"), lora_target_modules=["q_proj"], modules_to_save=["v_proj"])
    assert isinstance(adapted(load(folder, "nf4"), modules_to_save=["norm"]), nn.Module)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_lengths_of_rows_that_are_no_whole_blocks(folder: Path, kind: str) -> None:
    """bitsandbytes gives a wrong weight to whom asks it on a CPU; once it does not, the refusal can go."""
    from bitsandbytes.functional import dequantize_4bit

    down = load(folder, kind).model.layers[0].mlp.down_proj
    assert not torch.allclose(dequantize_4bit(down.weight.data, down.weight.quant_state), dequantized(down), atol=0.01)
    with pytest.raises(StageError, match=rf"use_dora with quantization {kind} on a CPU: rows of 144 weights are"):
        adapted(load(folder, kind), use_dora=True)
