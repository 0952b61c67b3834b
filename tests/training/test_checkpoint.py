"""Training states in shares: who writes which tensors into which files, and that any number of processes reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.context import Context
from stages.losses import products
from stages.training import checkpoint
from stages.training.checkpoint import Progress, Saver, owners, restore
from stages.training.processes import Processes
from tests.training.test_loop import context_for

ALONE = Processes(0, 1, torch.device("cpu"))


@dataclass
class Tensors:
    """A spread-out model with nothing behind it."""

    held: dict[str, tuple[Tensor, dict[str, Tensor]]]
    lockstep: bool = False
    loads: list[tuple[str, int]] = field(default_factory=list)

    @classmethod
    def random(cls, seed: int = 0) -> Tensors:
        draws = torch.Generator().manual_seed(seed)
        shapes = {"wide": (7, 5), "tall": (6, 4), "bias": (3,), "norm": (2,)}
        held = {}
        for name, shape in shapes.items():
            weight, first, second = (torch.randn(shape, generator=draws) for _ in range(3))
            held[name] = (weight, {"exp_avg": first, "exp_avg_sq": second})
        return cls(held)

    def shapes(self) -> Mapping[str, torch.Size]:
        return {name: weight.shape for name, (weight, _) in self.held.items()}

    def weight(self, name: str) -> Tensor:
        return self.held[name][0]

    def moments(self, name: str) -> dict[str, Tensor]:
        return self.held[name][1]

    def load(self, name: str, weight: Tensor, moments: Mapping[str, Tensor], steps: int) -> None:
        self.loads.append((name, steps))
        self.held[name] = (weight, dict(moments))

    def loaded(self) -> None:
        self.loads.append(("all", -1))


@dataclass(frozen=True)
class Beside(Processes):
    """One of several processes that are threads of this one: what the first shares is kept for the others."""

    shared: list[Any] = field(default_factory=list)

    def share(self, value: Any) -> Any:
        if self.rank == 0:
            self.shared.append(value)
        return self.shared[-1]


def beside(count: int) -> list[Beside]:
    shared: list[Any] = []
    return [Beside(rank, count, torch.device("cpu"), shared) for rank in range(count)]


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.held.keys() == expected.held.keys()
    for name, (weight, moments) in found.held.items():
        assert torch.equal(weight, expected.held[name][0])
        assert moments.keys() == expected.held[name][1].keys()
        assert all(torch.equal(moments[key], expected.held[name][1][key]) for key in moments)


def saved_by(context: Context, tensors: Tensors, count: int, step: int = 3) -> None:
    """Several processes save the same state together."""
    contexts = [Context(context.spec, context.store, rank=rank) for rank in range(count)]
    savers = [Saver(one, tensors, two, None) for one, two in zip(contexts, beside(count), strict=True)]
    for saver in savers:
        saver.save(Progress(step=step, num_tokens=11))
    for saver in savers:
        saver.background.wait()


def test_shares_are_balanced_largest_first() -> None:
    shapes = {"a": (10, 10), "b": (9, 10), "c": (8, 10), "d": (7, 10), "e": (1,)}
    assert owners({name: torch.Size(shape) for name, shape in shapes.items()}, 2) == {
        "a": 0,  # 100 : 0
        "b": 1,  # 100 : 90
        "c": 1,  # 100 : 170
        "d": 0,  # 170 : 170
        "e": 0,  # a tie goes to the first
    }


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_processes_writes_what_one_reads(tmp_path: Path, count: int) -> None:
    """With five processes and four tensors, one has nothing to write."""
    context, tensors = context_for(tmp_path), Tensors.random()
    saved_by(context, tensors, count)
    _, folder = context.checkpoints.latest()
    parts = sorted({path.parent.name for path in folder.rglob("*.safetensors")})
    assert len(parts) == count
    found = Tensors.random(seed=1)
    progress = restore(context, found, ALONE, {})
    assert (progress.step, progress.num_tokens, context.resumed_from) == (3, 11, 3)
    assert_equal(found, tensors)
    assert found.loads == [("wide", 3), ("tall", 3), ("bias", 3), ("norm", 3), ("all", -1)]


def test_several_processes_read_what_one_wrote(tmp_path: Path) -> None:
    context, tensors = context_for(tmp_path), Tensors.random()
    saved_by(context, tensors, 1)
    for one in beside(2):
        found = Tensors.random(seed=1)
        assert restore(Context(context.spec, context.store, rank=one.rank), found, one, {}).step == 3
        assert_equal(found, tensors)


def test_large_states_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 7 * 5 * 4)  # the widest tensor alone fills one
    context, tensors = context_for(tmp_path), Tensors.random()
    saved_by(context, tensors, 1)
    files = list(context.checkpoints.latest()[1].glob("state-*.safetensors"))
    assert len(files) > 4
    found = Tensors.random(seed=1)
    restore(context, found, ALONE, {})
    assert_equal(found, tensors)


def test_another_models_state_is_refused(tmp_path: Path) -> None:
    context, tensors = context_for(tmp_path), Tensors.random()
    saved_by(context, tensors, 1)
    found = Tensors.random()
    found.held["wide"] = (torch.zeros(5, 7), {})
    with pytest.raises(StageError, match=r"the checkpoint of step 3 in .* has no wide of shape \(5, 7\)"):
        restore(context, found, ALONE, {})


def test_the_library_of_products_counts_for_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes by the processor's vendor, which no other entry tells."""
    found = []
    for faster in (True, False):
        monkeypatch.setattr(products, "_has_faster_kernels", lambda faster=faster: faster)
        found.append(checkpoint.numerics(ALONE, "whole", 64))
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"products"}
