"""Weights in bfloat16 alone: rounding at random is right on average, and nothing small is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.context import Context
from stages.sft import Config
from stages.sharding import Fsdp, Whole, Zero
from stages.training.export import export
from stages.training.language_modeling import TokenLoss
from stages.training.loop import Trained, Trainer
from stages.training.memory_training import Setup, Training
from stages.training.micro_batches import backward
from stages.training.model import Scorer
from stages.training.processes import prepare_process
from stages.training.rounded_adamw import CHUNK, RoundedAdamW, round_at_random
from tests.training.conftest import tiny_model
from tests.training.test_loop import Stop, StoppingWindows, context_for, sequences
from tests.training.test_memory import shape_of

MANY = 100_000


def random_bits(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.001, -1.001, 3e-5, -0.7, 1e30, 1.9999])
def test_a_value_becomes_its_neighbours_as_often_as_it_is_near_them(value: float) -> None:
    exact = torch.full((MANY,), value)
    rounded = round_at_random(exact, random_bits()).double()
    below, above = sorted(set(rounded.tolist()))
    assert below < exact[0].item() < above
    share = (exact[0].double().item() - below) / (above - below)
    assert float((rounded == above).double().mean()) == pytest.approx(share, abs=4 * 0.5 / MANY**0.5)


def test_what_is_a_bfloat16_stays() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-130, float("inf"), -float("inf")])
    for seed in range(20):
        assert torch.equal(round_at_random(values, random_bits(seed)).float(), values)
    assert round_at_random(torch.tensor([float("nan")]), random_bits()).isnan().all()


def optimizer_for(weight: nn.Parameter, **settings: Any) -> RoundedAdamW:
    defaults: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "seed": 3}
    return RoundedAdamW([{"params": [weight], "weight_decay": 0.0}], {weight: "weight"}, **(defaults | settings))


def test_steps_below_the_resolution_add_up() -> None:
    """A hundred steps of 1e-5 from 1, next to which bfloat16s are 1/256 below: to the nearest, none would move."""
    weight = nn.Parameter(torch.ones(MANY, dtype=torch.bfloat16))
    optimizer = optimizer_for(weight)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert (torch.ones(1, dtype=torch.bfloat16) - 1e-5).item() == 1.0
    moved = 1.0 - float(weight.detach().double().mean())
    # of n weights about a quarter is one unit u = 1/256 lower: deviation of the mean sqrt(0.256 x 0.744 / n) u = 5e-6
    assert moved == pytest.approx(1e-3, abs=3e-5)


def test_second_moments_fall_where_gradients_do() -> None:
    """By a thousandth a step, less than half of a bfloat16's resolution."""
    weight = nn.Parameter(torch.ones(MANY, dtype=torch.bfloat16))
    optimizer = optimizer_for(weight)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = float(optimizer.state[weight]["exp_avg_sq"].double().mean())
    assert before == pytest.approx(1e-3, rel=1e-3)
    for _ in range(200):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    after = float(optimizer.state[weight]["exp_avg_sq"].double().mean())
    assert after == pytest.approx(before * 0.999**200, rel=1e-3)


def test_steps_are_adamws_but_for_the_rounding() -> None:
    """Against torch in float32 from the same bfloat16 weights, over more than one chunk, with clipping and decay."""
    torch.manual_seed(0)
    start = torch.randn(3, CHUNK // 2).bfloat16()
    gradients = [torch.randn_like(start) for _ in range(3)]
    low, high = nn.Parameter(start.clone()), nn.Parameter(start.float())
    group = {"params": [low], "weight_decay": 0.1}
    ours = RoundedAdamW([group], {low: "low"}, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, seed=0)
    theirs = torch.optim.AdamW([high], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for gradient in gradients:
        ours.grad_scale = torch.tensor(2.0)
        low.grad, high.grad = gradient.clone(), gradient.float() / 2
        ours.step()
        theirs.step()
    difference = (low.detach().float() - high.detach()).double()
    unit = high.detach().abs().clamp(min=1e-2) / 128
    assert float((difference.abs() / unit).max()) < 4  # three roundings of weights, and of what they are moved by
    assert abs(float(difference.mean())) < 1e-5 < float(difference.abs().mean())
    assert low.dtype == torch.bfloat16


def trained(folder: Path, stop_before: int = -1, **settings: Any) -> tuple[Trainer, Trained, Context]:
    config = {"bf16": True, "pure_bf16": True, "checkpoint_steps": 2, "micro_batch_tokens": 20, **settings}
    tiny_model().save_pretrained(folder / "model")  # which the export looks at
    context = context_for(folder, **config)
    make = lambda: Scorer(tiny_model())  # noqa: E731 - said twice
    trainer = Trainer(context, context.config, prepare_process(context), make(), TokenLoss(), make)
    windows = StoppingWindows(sequences(), context.config)
    windows.stop_before = stop_before
    return trainer, trainer.run(windows), context


def test_resume_gives_the_same_bits_and_the_export_is_what_was_trained(tmp_path: Path) -> None:
    trainer, whole, context = trained(tmp_path / "whole")
    with pytest.raises(Stop):
        trained(tmp_path / "interrupted", 5)
    _, resumed, other = trained(tmp_path / "interrupted")
    assert other.resumed_from == 4 and resumed.metrics == whole.metrics
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)
    export(context, whole, {})
    written = load_file(Path(context.spec.job) / "out" / "model" / "model.safetensors")
    weights = {name.partition(".")[2]: trainer.parallel.weight(name) for name in trainer.parallel.shapes()}
    for name, tensor in written.items():
        assert torch.equal(tensor.float(), weights[name].float())
    for name in trainer.parallel.shapes():
        kept = [trainer.parallel.weight(name), *trainer.parallel.moments(name).values()]
        assert len(kept) == 3 and all(tensor.dtype == torch.bfloat16 for tensor in kept)


def test_it_learns_as_masters_in_float32_do(tmp_path: Path) -> None:
    _, pure, _ = trained(tmp_path / "pure")
    _, masters, _ = trained(tmp_path / "masters", pure_bf16=False)
    assert pure.metrics[-1]["loss"] < 0.8 * pure.metrics[0]["loss"]
    for left, right in zip(pure.metrics, masters.metrics, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=0.02)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=0.1)
        assert left["learning_rate"] == right["learning_rate"]


def test_gradients_stay_bfloat16_over_micro_batches(tmp_path: Path) -> None:
    """And their norm is that of float32 passes, to the rounding of the passes."""
    found: dict[bool, tuple[Any, float]] = {}
    for low in (False, True):
        context = context_for(tmp_path / str(low), bf16=low, pure_bf16=low)
        make = lambda: Scorer(tiny_model())  # noqa: E731
        trainer = Trainer(context, context.config, prepare_process(context), make(), TokenLoss(), make)
        backward(trainer, 0, sequences(), 40.0, 20)
        norm = float(trainer.parallel.gradient_norm())
        parameters = dict(trainer.scorer.named_parameters())
        found[low] = ({name: one.grad for name, one in parameters.items()}, norm)
        assert {one.grad.dtype for one in parameters.values()} == {torch.bfloat16 if low else torch.float32}
    exact, rounded = found[False], found[True]
    assert rounded[1] == pytest.approx(exact[1], rel=0.02)
    for name, gradient in exact[0].items():
        assert float((rounded[0][name] - gradient).norm()) < 0.1 * max(float(gradient.norm()), 0.1 * exact[1]), name


def test_the_predicted_state_is_what_is_held(tmp_path: Path) -> None:
    trainer, _, _ = trained(tmp_path, max_steps=1)
    parallel = trainer.parallel
    held: list[Tensor] = [one for name in parallel.shapes() for one in parallel.moments(name).values()]
    weights = sum(parallel.weight(name).nbytes for name in parallel.shapes())
    predicted = Training.of(trainer.config, shape_of(tiny_model()), Setup()).state()
    assert predicted == {"weights": weights, "gradients": weights, "optimizer": sum(one.nbytes for one in held)}


def test_where_it_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="pure_bf16 is given, but bf16 is false"):
        Config(pure_bf16=True)
    with pytest.raises(ValidationError, match="pure_bf16 is given, but optim is muon: only adamw"):
        Config(pure_bf16=True, bf16=True, optim="muon")
    config = Config(pure_bf16=True, bf16=True)
    assert config.against(Whole()) == {}
    for way in (Fsdp(), Zero(2)):
        assert "exclude each other: launch with ddp" in config.against(way)["pure_bf16"]
