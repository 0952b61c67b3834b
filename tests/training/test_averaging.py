"""Averaged weights: values by hand, a closed form, what float32 keeps of small moves, and every way of spreading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from artifacts.errors import StageError
from stages.sharding import Sharding, Whole
from stages.training.averaging import Averaging, _Average, _update
from stages.training.averaging_settings import WeightAveraging
from stages.training.processes import Processes
from tests.training.test_parallel import ALONE, WAYS, assert_close, config_for, spread_out, state, take_steps, weights


class Plain:
    """A model of one tensor, which is set by hand."""

    def __init__(self, first: Tensor) -> None:
        self.tensor = first.clone()

    def shapes(self) -> Mapping[str, torch.Size]:
        return {"weight": self.tensor.shape}

    def weight(self, name: str) -> Tensor:
        return self.tensor

    def put(self, name: str, weight: Tensor) -> None:
        self.tensor.copy_(weight)

    def loaded(self) -> None:
        pass


def averaging_of(parallel: Any, processes: Processes = ALONE, **settings: Any) -> Averaging:
    context: Any = SimpleNamespace(log=lambda text: None, counts={})
    return Averaging(WeightAveraging(**settings), context, parallel, processes)


def averages(values: list[list[float]], **settings: Any) -> list[Tensor]:
    """After every step, of the weights before the first one and after each."""
    parallel = Plain(torch.tensor(values[0]))
    averaging = averaging_of(parallel, **settings)
    found = []
    for step, value in enumerate(values):
        parallel.tensor.copy_(torch.tensor(value))
        averaging.after(step)
        found.append(averaging.weight("weight").clone())
    return found


def test_an_exponential_moving_average_by_hand() -> None:
    found = averages([[1.0], [3.0], [3.0], [0.0]], kind="ema", decay=0.75)
    # 0.75 * 1 + 0.25 * 3; 0.75 * 1.5 + 0.25 * 3; 0.75 * 1.875
    assert [float(one) for one in found] == [1.0, 1.5, 1.875, 1.40625]


def test_every_second_step_after_the_first_by_hand() -> None:
    """Until it begins it is the weights of the moment, as in the paper's algorithm 1; then it changes with updates."""
    found = averages([[1.0], [3.0], [9.0], [5.0], [7.0]], kind="ema", decay=0.5, update_after=1, update_freq=2)
    assert [float(one) for one in found] == [1.0, 3.0, 3.0, 4.0, 4.0]


def test_a_corrected_average_by_hand() -> None:
    """Factors of (12 + 2 t): 16, 25 to the powers -1/2 and -1."""
    settings: dict[str, Any] = {"lag": 12, "multiplier": 2, "ema_power": 0.5, "bias_power": 1.0, "update_freq": 2}
    found = averages([[1.0], [8.0], [9.0], [0.0], [5.0]], kind="bema", **settings)
    assert [float(one) for one in found[:2]] == [1.0, 1.0]
    moving = 0.75 * 1 + 0.25 * 9
    assert float(found[2]) == pytest.approx(moving + (9 - 1) / 16, rel=1e-6)
    beta, alpha = 20**-0.5, 1 / 20
    assert float(found[4]) == pytest.approx((1 - beta) * moving + beta * 5 + alpha * (5 - 1), rel=1e-6)
    floor = averages([[1.0], [3.0]], kind="bema", update_freq=1, lag=99, bias_power=0, min_ema_multiplier=0.5)
    assert float(floor[1]) == pytest.approx(2.0 + 2.0, rel=1e-6)  # half of the way, and all of it again


def test_the_average_of_a_line() -> None:
    """Of theta_t = theta_0 + t v it is theta_0 + v (t - (1 - beta) / beta (1 - (1 - beta)^t))."""
    decay, steps = 0.9, 200
    found = averages([[2.0 + 0.25 * step] for step in range(steps + 1)], kind="ema", decay=decay)
    for step in (1, 2, 10, steps):
        lag = decay / (1 - decay) * (1 - decay**step)
        assert float(found[step]) == pytest.approx(2.0 + 0.25 * (step - lag), rel=1e-5)


def test_moves_that_a_sum_of_whole_weights_would_round_away() -> None:
    """A weight of size 1 that moves by 1e-6 in all, of which an update takes a ten-thousandth: 2^-24 is 6e-8."""
    torch.manual_seed(0)
    start, way = 0.5 + torch.rand(1000), torch.randn(1000)
    parallel = Plain(start)
    averaging = averaging_of(parallel, kind="ema", decay=0.9999)
    exact, plain = start.double(), start.clone()
    averaging.after(0)
    for step in range(1, 501):
        parallel.tensor.copy_(start + 1e-6 * way)
        averaging.after(step)
        exact = exact.lerp(parallel.tensor.double(), 1e-4)
        plain.lerp_(parallel.tensor, 1e-4)
    (kept,) = (tensor for name, tensor in averaging.tensors().items() if "ema" in name)
    moved = exact - start.double()
    assert float((plain.double() - start - moved).norm() / moved.norm()) > 0.5
    assert float((kept.double() - moved).norm() / moved.norm()) < 1e-4


@pytest.mark.parametrize("kind", ["ema", "bema"])
def test_averages_stay_where_the_model_is(kind: str) -> None:
    """On a device from which nothing can be copied; weights of bfloat16 are averaged in float32."""
    device = torch.device("meta")
    averaging = averaging_of(
        Plain(torch.zeros(3, dtype=torch.bfloat16, device=device)), Processes(0, 1, device), kind=kind, update_freq=1
    )
    for step in range(3):
        averaging.after(step)
    kept = averaging.tensors().values()
    assert len(kept) == averaging.settings.numbers  # type: ignore[union-attr]
    assert {(one.device.type, one.dtype) for one in kept} == {("meta", torch.float32)}


def test_what_the_host_keeps_goes_up_and_comes_back() -> None:
    """The same numbers as of what is updated in place."""
    start, weights = torch.tensor([1.0, 2.0]), [torch.tensor([3.0, 0.0]), torch.tensor([2.0, 8.0])]
    here, kept = (_Average(start.clone(), torch.zeros(2), torch.zeros(2)) for _ in range(2))
    for weight in weights:
        _update([here], [weight], 0.25, 0.5)
        away = _Average(*(one.clone() for one in (kept.start, kept.ema, kept.shift)))  # type: ignore[union-attr]
        _update([away], [weight], 0.25, 0.5)
        kept.take(away)
    assert torch.equal(kept.value(), here.value()) and torch.equal(kept.ema, here.ema)
    # 0.75 * 0.25 * 2 + 0.25 * 1, and half of the way of 1
    assert float(kept.ema[0]) == 0.625 and float(kept.value()[0]) == 1 + 0.625 + 0.5


def test_a_saved_state_goes_on() -> None:
    values = torch.randn(9, 3, generator=torch.Generator().manual_seed(1)).tolist()
    settings: dict[str, Any] = {"kind": "bema", "update_freq": 2, "update_after": 1}
    whole = averages(values, **settings)
    for end in range(9):
        parallel = Plain(torch.tensor(values[0]))
        first = averaging_of(parallel, **settings)
        for step in range(end + 1):
            parallel.tensor.copy_(torch.tensor(values[step]))
            first.after(step)
        saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
        again = averaging_of(parallel, **settings)
        assert again.load({**saved, "other": torch.ones(1)}, end) == {"other": torch.ones(1)}
        assert torch.equal(again.weight("weight"), whole[end])
        for step in range(end + 1, 9):
            parallel.tensor.copy_(torch.tensor(values[step]))
            again.after(step)
            assert torch.equal(again.weight("weight"), whole[step])


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("way", "settings"),
    [
        *((way, {}) for way in (Whole(), *WAYS)),
        *((way, {"bf16": True}) for way in (Whole(), WAYS[0], WAYS[2])),
        (WAYS[1], {"lora_r": 2}),
    ],
    ids=lambda one: f"{one.name}{getattr(one, 'stage', '')}" if isinstance(one, Sharding) else " ".join(one),
)
def test_in_place_and_back(way: Sharding, settings: dict[str, Any]) -> None:
    """Passes see the average; then weights, moments and later steps are those of a run without one, bit for bit."""
    scorer, parallel = spread_out(way, config_for(**settings))
    alone_scorer, alone = spread_out(way, config_for(**settings))
    averaging = averaging_of(parallel, kind="ema", decay=0.5)
    averaging.after(0)
    expected = weights(parallel)
    for step in (1, 2):
        take_steps(scorer, parallel, 1), take_steps(alone_scorer, alone, 1)
        averaging.after(step)
        expected = {name: (expected[name] + weight) / 2 for name, weight in weights(parallel).items()}
    with averaging.in_place():
        assert averaging.is_in_place
        assert_close(weights(parallel), expected, 1e-6)
        other_scorer, other = spread_out(way, config_for(**settings))
        for name, weight in weights(parallel).items():
            other.put(name, weight)
        other.loaded()
        seen = [passed(one, spread) for one, spread in ((scorer, parallel), (other_scorer, other))]
        assert seen[0] == seen[1] != passed(alone_scorer, alone)
    assert not averaging.is_in_place
    found, wanted = state(parallel), state(alone)
    for name, (weight, moments) in found.items():
        assert torch.equal(weight, wanted[name][0])
        assert_close(moments, wanted[name][1], 0.0)
    assert take_steps(scorer, parallel, 2) == take_steps(alone_scorer, alone, 2)


def passed(scorer: Any, parallel: Any) -> float:
    from stages.training.language_modeling import TokenLoss
    from tests.training.test_loop import sequences

    scorer.eval()
    with torch.no_grad():
        loss, _ = TokenLoss()(parallel.forward, scorer.layout(sequences()))
    return float(loss)


def test_weights_of_bfloat16_are_averaged_in_float32() -> None:
    _, parallel = spread_out(Whole(), config_for(bf16=True, pure_bf16=True))
    averaging = averaging_of(parallel, kind="ema", decay=0.5)
    averaging.after(0)
    name = next(iter(parallel.shapes()))
    before = parallel.weight(name).clone()
    parallel.put(name, before * 2)
    averaging.after(1)
    assert before.dtype == torch.bfloat16
    assert torch.equal(averaging.weight(name), before.float() * 1.5)
    with averaging.in_place():
        assert torch.equal(parallel.weight(name), (before.float() * 1.5).bfloat16())
    assert torch.equal(parallel.weight(name), before * 2)


def test_runs_that_would_leave_the_weights_that_they_began_with() -> None:
    averaging = averaging_of(Plain(torch.ones(1)), kind="bema", update_after=3)
    with pytest.raises(StageError, match=re.escape("the first update is after step 403 (update_after + update_freq)")):
        averaging.begin(0, 402, None)
    averaging.begin(0, 403, None)
    with pytest.raises(StageError, match="updated every 400 steps and measured every 50"):
        averaging.begin(0, 1000, 50)
    averaging.begin(0, 1000, 400)


def test_what_is_left_of_the_first_weights() -> None:
    assert WeightAveraging(kind="ema", decay=0.5, update_freq=2, update_after=1).share_of_first(8) == 0.5**3
    found = WeightAveraging(kind="bema", update_freq=1, lag=3, ema_power=1, bias_power=0).share_of_first(3)
    assert found == pytest.approx(3 / 4 * 4 / 5 * 5 / 6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "ema", "lag": 3}, "lag is of kind bema, found ema"),
        ({"kind": "bema", "decay": 0.9}, "decay is of kind ema, found bema"),
        ({"kind": "bema", "lag": 0, "multiplier": 0.001}, "below 1 it would take more than all"),
        ({}, "kind"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        WeightAveraging(**settings)
