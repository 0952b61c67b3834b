"""Merges of models against plain implementations over one flat vector, values by hand, and what must not change."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any, get_args

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from artifacts.errors import StageError
from stages.average import _SETTINGS, Config, check, check_lists
from stages.merge_methods import METHODS
from stages.merging import Dropped, Trimmed, elected, slerp, threshold
from tests.stages.small_models import output, run_stage, save_model

WEIGHTS = "model.safetensors"
TINY = {"atol": 1e-6, "rtol": 1e-6}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three models."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(4):
        save_model(folder / str(seed), seed=seed)
    return [folder / str(seed) for seed in range(4)]


def merge(folder: Path, models: list[Path], base: Path | None = None, **config: Any) -> dict[str, Tensor]:
    inputs: dict[str, Any] = {"models": models} | ({} if base is None else {"base": base})
    return load_file(output(run_stage("average", folder, inputs, **config), "model") / WEIGHTS)


def flat(tensors: dict[str, Tensor]) -> numpy.ndarray:
    return numpy.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])


def vectors(paths: list[Path]) -> list[numpy.ndarray]:
    return [flat(load_file(path / WEIGHTS)) for path in paths]


def plain_ties(base: numpy.ndarray, models: list[numpy.ndarray], weights: list[float], density: float) -> Any:
    """Element by element, from the paper's algorithm 1."""
    kept = []
    for model in models:
        tau = model - base
        order = numpy.argsort(-numpy.abs(tau), kind="stable")
        mask = numpy.zeros(len(tau), dtype=bool)
        mask[order[: round(density * len(tau))]] = True
        kept.append(numpy.where(mask, tau, 0.0))
    merged = numpy.zeros_like(base)
    for place in range(len(base)):
        total = sum(weight * tau[place] for weight, tau in zip(weights, kept, strict=True))
        agreeing = [(weight, tau[place]) for weight, tau in zip(weights, kept, strict=True) if tau[place] * total > 0]
        if agreeing:
            merged[place] = sum(weight * value for weight, value in agreeing) / sum(weight for weight, _ in agreeing)
    return merged


def test_every_method_has_its_settings() -> None:
    assert tuple(METHODS) == tuple(_SETTINGS) == get_args(Config.model_fields["method"].annotation)


def test_task_arithmetic(tmp_path: Path, folders: list[Path]) -> None:
    """With a weight below zero, which takes a task away."""
    base, *models = vectors(folders)
    found = merge(tmp_path, folders[1:], folders[0], method="task_arithmetic", weights=[1.0, -0.5, 0.25], scale=0.4)
    expected = base + 0.4 * ((models[0] - base) - 0.5 * (models[1] - base) + 0.25 * (models[2] - base))
    numpy.testing.assert_allclose(flat(found), expected, **TINY)
    alone = merge(tmp_path / "alone", folders[1:], folders[0], method="task_arithmetic")
    numpy.testing.assert_allclose(flat(alone), base + sum(one - base for one in models), **TINY)


@pytest.mark.parametrize(("weights", "density"), [([1.0, 1.0, 1.0], 0.2), ([2.0, 1.0, 0.5], 0.63)])
def test_ties(tmp_path: Path, folders: list[Path], weights: list[float], density: float) -> None:
    base, *models = vectors(folders)
    found = merge(tmp_path, folders[1:], folders[0], method="ties", weights=weights, density=density, scale=0.7)
    numpy.testing.assert_allclose(flat(found), base + 0.7 * plain_ties(base, models, weights, density), **TINY)


def test_ties_by_hand() -> None:
    """Columns: agreement; the larger sum wins; a draw; a trimmed one beside a kept one; zeros."""
    taus = torch.tensor([[1.0, 3.0, 2.0, 0.0, 0.0], [3.0, -1.0, -2.0, -4.0, 0.0], [2.0, -1.0, 0.0, 0.0, 0.0]])
    found = elected(lambda: iter(taus.double()), [1.0, 1.0, 1.0])
    assert found.tolist() == [2.0, 3.0, 0.0, -4.0, 0.0]
    weighted = elected(lambda: iter(taus.double()), [1.0, 2.0, 1.5])
    assert weighted.tolist() == [pytest.approx((1 + 6 + 3) / 4.5), -1.0, -2.0, -4.0, 0.0]


def test_ties_of_one_model_is_the_scaled_difference(tmp_path: Path, folders: list[Path]) -> None:
    base, model = vectors(folders[:2])
    found = merge(tmp_path, [folders[1]], folders[0], method="ties", density=1.0, scale=0.5)
    numpy.testing.assert_allclose(flat(found), base + 0.5 * (model - base), **TINY)


@pytest.mark.parametrize("linear", [True, False])
def test_dare(tmp_path: Path, folders: list[Path], linear: bool) -> None:
    """Every element of a model's difference is zero or divided by density; the same seed gives the same bytes."""
    method = "dare_linear" if linear else "dare_ties"
    base, model = vectors(folders[:2])
    found = flat(merge(tmp_path / "a", [folders[1]], folders[0], method=method, density=0.25)) - base
    tau = model - base
    dropped = numpy.abs(found) < 1e-6
    numpy.testing.assert_allclose(found[~dropped], (tau / 0.25)[~dropped], atol=1e-5, rtol=1e-5)
    assert abs(dropped.mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / len(tau)) + (numpy.abs(tau) < 1e-6).mean()
    again, other = (
        flat(merge(tmp_path / str(seed), [folders[1]], folders[0], method=method, density=0.25, seed=seed)) - base
        for seed in (42, 43)
    )
    assert numpy.array_equal(found, again) and not numpy.array_equal(found, other)


def test_dare_that_drops_nothing(tmp_path: Path, folders: list[Path]) -> None:
    """Is task arithmetic, or TIES that trims nothing, bit for bit."""
    for number, (one, other) in enumerate([("dare_linear", "task_arithmetic"), ("dare_ties", "ties")]):
        settings = {"weights": [1.0, 0.5], "scale": 0.8}
        more = {"density": 1.0} if other == "ties" else {}
        left = merge(tmp_path / f"{number}l", folders[1:3], folders[0], method=one, density=1.0, **settings)
        right = merge(tmp_path / f"{number}r", folders[1:3], folders[0], method=other, **settings, **more)
        assert all(torch.equal(left[name], right[name]) for name in right)


def test_dare_keeps_what_is_expected() -> None:
    """The mean over many seeds, of numbers of which each mean has a deviation of |tau| sqrt((1 - p) / p / n)."""
    tau = torch.linspace(-2, 2, 50, dtype=torch.float64)
    drawn = [Dropped(0.3, seed)(0, "w", tau) for seed in range(2000)]
    mean = torch.stack(drawn).mean(0)
    assert bool(((mean - tau).abs() <= 4.5 * tau.abs() * math.sqrt(0.7 / 0.3 / 2000) + 1e-12).all())
    masks = {(number, name): Dropped(0.3, 1)(number, name, tau) != 0 for number in (0, 1) for name in ("v", "w")}
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(masks.values(), 2))


def test_slerp_by_hand() -> None:
    """A right angle: at half of the way both count 1 / sqrt(2); of unequal lengths each keeps its own."""
    first, second = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 3.0]).double()
    root = math.sqrt(0.5)
    torch.testing.assert_close(slerp(first, second, 0.5), torch.tensor([root, 3 * root]).double())
    third = slerp(first, second, 1 / 3)
    torch.testing.assert_close(third, torch.tensor([math.sqrt(0.75), 1.5]).double())
    assert torch.equal(slerp(first, -first, 0.25), first * 0.5)  # there is no arc
    assert torch.equal(slerp(first, torch.zeros(2).double(), 0.25), first * 0.75)


def test_slerp_of_models(tmp_path: Path, folders: list[Path]) -> None:
    """Of every tensor; points of an arc between equal lengths have that length."""
    one, other = (load_file(path / WEIGHTS) for path in folders[:2])
    for number, t in enumerate((0.0, 0.3, 1.0)):
        found = merge(tmp_path / str(number), folders[:2], method="slerp", t=t)
        for name, tensor in found.items():
            a, b = one[name].double().numpy().ravel(), other[name].double().numpy().ravel()
            cosine = float(a @ b / numpy.linalg.norm(a) / numpy.linalg.norm(b))
            angle = math.acos(min(1.0, cosine))
            line = angle < 1e-3
            left = 1 - t if line else math.sin((1 - t) * angle) / math.sin(angle)
            right = t if line else math.sin(t * angle) / math.sin(angle)
            numpy.testing.assert_allclose(tensor.numpy().ravel(), left * a + right * b, **TINY)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    assert float(slerp(a / a.norm(), b / b.norm(), 0.37).norm()) == pytest.approx(1.0)


EQUAL: list[dict[str, Any]] = [
    {"method": "linear"},
    {"method": "slerp", "t": 0.3},
    {"method": "task_arithmetic", "weights": [0.5, 0.5]},
    {"method": "ties", "density": 1.0},
    {"method": "dare_ties", "density": 1.0},
    {"method": "dare_linear", "density": 1.0, "weights": [0.25, 0.75]},
]


@pytest.mark.parametrize("settings", EQUAL, ids=lambda one: one["method"])
def test_equal_models_give_that_model(tmp_path: Path, folders: list[Path], settings: dict[str, Any]) -> None:
    base = None if settings["method"] in ("linear", "slerp") else folders[0]
    found, model = merge(tmp_path, [folders[1]] * 2, base, **settings), load_file(folders[1] / WEIGHTS)
    assert all(torch.equal(found[name], tensor) for name, tensor in model.items())


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999, 1.0])
def test_the_threshold_of_a_whole_model(density: float) -> None:
    """The element that a sort finds, over tensors of unequal size, among them equal ones and zeros; and of those of its
    size how many the share of all is."""
    draws = torch.Generator().manual_seed(2)
    tensors = [
        torch.randn(size, generator=draws, dtype=torch.float64) * 10.0**power
        for size, power in ((700, -3), (31, 2), (1, 0), (268, -9))
    ]
    tensors += [torch.zeros(40, dtype=torch.float64), torch.full((60,), 0.125, dtype=torch.float64)]
    found = threshold(lambda: iter(tensors), density)
    magnitudes = sorted(torch.cat([one.flatten() for one in tensors]).abs().float().tolist(), reverse=True)
    expected = magnitudes[round(density * len(magnitudes)) - 1] if density < 1 else 0.0
    assert found.magnitude == expected
    wanted = round(density * len(magnitudes)) - sum(size > expected for size in magnitudes)
    assert found.share == pytest.approx(wanted / magnitudes.count(expected) if density < 1 else 1.0)


def test_ties_keeps_the_share_where_many_are_of_one_size() -> None:
    """As of models in bfloat16, which differ by few steps of it: 1,000 of 0.5, 9,000 of 0.25; 3,000 are kept."""
    sizes = torch.cat([torch.full((1000,), 0.5), torch.full((9000,), 0.25)]).double()
    taus = dict(enumerate(sizes[torch.randperm(10_000, generator=torch.Generator().manual_seed(1))].split(2500)))
    trimmed = Trimmed([threshold(lambda: iter(taus.values()), 0.3)])
    kept = torch.cat([trimmed(0, str(name), tau) for name, tau in taus.items()])
    assert int((kept == 0.5).sum()) == 1000
    # a draw of 9,000 with chance 2 / 9, whose deviation is 39
    assert abs(int((kept == 0.25).sum()) - 2000) < 4 * 39.5
    assert torch.equal(trimmed(0, "1", taus[1]), trimmed(0, "1", taus[1]))


def test_models_that_cannot_be_merged(tmp_path: Path, folders: list[Path]) -> None:
    said = "method slerp is of two models, and input models has 3"
    with pytest.raises(StageError, match=said):
        merge(tmp_path / "a", folders[:3], method="slerp")
    assert [check_lists(Config(method="slerp"), {"models": count}) for count in (0, 2, 3)] == [[], [], [said]]
    large = {**load_file(folders[0] / WEIGHTS)}
    large["model.norm.weight"] = torch.full_like(large["model.norm.weight"], 3e38)
    save_model(tmp_path / "large", seed=1)
    save_file(large, tmp_path / "large" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"weight model\.norm\.weight: the merge has numbers that torch\.float32"):
        merge(tmp_path / "e", [tmp_path / "large"] * 2, folders[1], method="task_arithmetic")
    with pytest.raises(StageError, match="weights has 1 numbers for 2 models"):
        merge(tmp_path / "b", folders[:2], folders[2], method="ties", density=0.5, weights=[1.0])
    other = tmp_path / "other"
    save_model(other, seed=9)
    tensors = load_file(other / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, other / WEIGHTS, metadata={"format": "pt"})
    said = "weight model.norm.weight has shape [16] in model 1 and [15] in input base; a mean needs one shape"
    with pytest.raises(StageError, match=re.escape(said)):
        merge(tmp_path / "c", folders[:2], other, method="task_arithmetic")
    save_model(tmp_path / "judge", seed=1, reward=True)
    with pytest.raises(StageError, match="an input is a reward_model; set kind: reward_model"):
        merge(tmp_path / "d", folders[:2], tmp_path / "judge", method="task_arithmetic")


NEEDS_BASE = "works on what the models are away from a base; wire input base"


@pytest.mark.parametrize(
    ("settings", "wired", "said"),
    [
        ({"density": 0.5}, False, ["density is of method ties, dare_linear, dare_ties; linear has none"]),
        (
            {"method": "slerp", "weights": [1, 2]},
            False,
            ["weights is of method linear, task_arithmetic, ties, dare_linear, dare_ties; slerp has none"],
        ),
        ({"t": 0.2}, False, ["t is of method slerp; linear has none"]),
        ({"method": "ties", "density": 0.5}, False, [f"method ties {NEEDS_BASE}"]),
        ({"method": "ties"}, True, ["method ties needs density, the share of the differences that it keeps"]),
        ({}, True, ["input base is wired in, but method linear has none, so it would not be used"]),
        (
            {"weights": [1, -1]},
            False,
            ["a weight is below 0; that is of method task_arithmetic, dare_linear, not of linear"],
        ),
        ({"method": "task_arithmetic", "weights": [1, -1]}, True, []),
        (
            {"method": "ties", "density": 0.5, "seed": 1},
            True,
            ["seed is of method dare_linear, dare_ties; ties has none"],
        ),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], wired: bool, said: list[str]) -> None:
    inputs = {"models", "base"} if wired else {"models"}
    assert check(Config.model_validate(settings), frozenset(inputs)) == said
