"""Averaged weights of a run: what it leaves, and what its held-out rows are measured with, in place of the last ones.

An exponential moving average (EMA), and BEMA (Block and Zhang, arXiv:2508.00180, algorithm 1): with theta_0 the weights
at the beginning, an update after step t is

    EMA <- (1 - beta_t) EMA + beta_t theta_t        BEMA = EMA + alpha_t (theta_t - theta_0)

Kept in float32 are theta_0 and what the others are away from it: post-training moves weights by a thousandth of their
size or less, of which a sum in float32 of whole weights would round most away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from artifacts.errors import StageError
from stages.context import Context
from stages.training.averaging_settings import WeightAveraging
from stages.training.checkpoint import owners
from stages.training.model import Scorer
from stages.training.parallel import Parallel, float_weights
from stages.training.processes import Processes

_KEY = "average|"


@dataclass
class _Average:
    """Of one tensor, in float32."""

    start: Tensor
    """theta_0."""
    ema: Tensor
    """EMA - theta_0."""
    shift: Tensor | None = None
    """BEMA - theta_0; None: there is no correction."""

    def on(self, device: torch.device) -> _Average:
        """The same where it is computed with; where it is kept there, the same tensors."""
        parts = {key: one.to(device, non_blocking=True) for key, one in vars(self).items() if one is not None}
        return _Average(**parts)

    def take(self, updated: _Average) -> None:
        """What has moved there, back to where it is kept."""
        for kept, moved in ((self.ema, updated.ema), (self.shift, updated.shift)):
            if kept is not None and moved is not None and moved is not kept:
                kept.copy_(moved, non_blocking=True)

    def value(self) -> Tensor:
        """The averaged weights."""
        return self.start + (self.ema if self.shift is None else self.shift)


def _update(averages: list[_Average], weights: list[Tensor], beta: float, alpha: float) -> None:
    """With the weights of the moment."""
    emas = [one.ema for one in averages]
    moved = torch._foreach_sub(weights, [one.start for one in averages])
    torch._foreach_lerp_(emas, moved, beta)
    shifts = [one.shift for one in averages if one.shift is not None]
    if shifts:
        torch._foreach_copy_(shifts, torch._foreach_add(emas, moved, alpha=alpha))


class Averaging:
    """The averages of all trained tensors, each in the memory of one process; without settings it does nothing.

    Whole tensors are averaged, so sharded models are as those of one process. Nothing here waits for the device until
    weights are measured or saved.
    """

    def __init__(
        self, settings: WeightAveraging | None, context: Context, parallel: Parallel, processes: Processes
    ) -> None:
        self.settings, self.context, self.parallel, self.processes = settings, context, parallel, processes
        self._shapes = {} if settings is None else dict(parallel.shapes())
        self._owners = owners(self._shapes, processes.size)
        self._averages: dict[str, _Average] = {}
        self._begun = False
        self._on_host = settings is not None and settings.device == "cpu" and processes.device.type == "cuda"
        self._now = 0
        """Steps behind the present weights."""
        self.is_in_place = False
        """Whether the model has the averaged weights at the moment."""

    def load(self, tensors: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Take up what the state saved after `step` steps has; gives back what else is among the tensors."""
        if self.settings is None:
            return dict(tensors)
        kept: dict[str, dict[str, Tensor]] = {name: {} for name in self._own()}
        rest: dict[str, Tensor] = {}
        for key in tensors:  # those of other processes are not even read
            if not key.startswith(_KEY):
                rest[key] = tensors[key]
            elif (place := key.split("|", 2))[2] in kept:
                kept[place[2]][place[1]] = tensors[key]
        self._begun = step > 0 and step >= self.settings.update_after
        self._averages = {name: self._taken_up(parts) for name, parts in kept.items() if parts}
        self._now = step
        return rest

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint needs of this process."""
        if self._on_host:  # what was sent there may be on its way
            torch.cuda.synchronize(self.processes.device)
        return {
            f"{_KEY}{part}|{name}": tensor
            for name, one in self._averages.items()
            for part, tensor in vars(one).items()
            if tensor is not None
        }

    def begin(self, step: int, total: int, stops_every: int | None) -> None:
        """Before the first step that is taken. `stops_every`: steps between measurements by which the run may end.

        Raises StageError where the run could end with the weights that the average begins with.
        """
        if (settings := self.settings) is None:
            return
        if problem := settings.problem(total, stops_every):
            raise StageError(problem)
        updates, share = settings.updates(total), settings.share_of_first(total)
        self.context.log(
            f"the output has averaged weights ({settings.kind}, {len(updates)} updates); the moving average has "
            f"{share:.3g} of the weights that it begins with"
        )
        if step == 0:
            self.after(0)

    @torch.no_grad()
    def after(self, step: int) -> None:
        """So many steps are done. Collective."""
        settings = self.settings
        if settings is None:
            return
        if step == settings.update_after:
            for bucket in self._present():
                self._averages |= {name: self._taken_up({"start": weight}) for name, weight in bucket.items()}
            self._begun = True
        elif step in settings.updates(step):
            for bucket in self._present():
                kept = [self._averages[name] for name in bucket]
                working = [one.on(self.processes.device) for one in kept]
                _update(working, list(bucket.values()), settings.beta(step), settings.alpha(step))
                for one, updated in zip(kept, working, strict=True):
                    one.take(updated)
        self._now = step

    def weight(self, name: str) -> Tensor:
        """A whole tensor of the averaged weights; of the present ones before there are such. Collective."""
        if not self._begun:
            return self.parallel.weight(name)
        own = self._averages[name].on(self.processes.device).value() if name in self._averages else None
        return self._given(name, own, torch.float32)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights; afterwards it has its own again, bit for bit. Collective.

        After an error it stays as it is: other processes may not be there to give it back.
        """
        if self.settings is None or self._now <= self.settings.update_after:
            yield  # they are the same
            return
        present: dict[str, Tensor] = {}
        types: dict[str, torch.dtype] = {}
        for name in self._shapes:
            weight = self.parallel.weight(name).detach()
            types[name] = weight.dtype
            if self._owners[name] == self.processes.rank:
                present[name] = weight.to("cpu", copy=True)
        self._put(self.weight)
        self.is_in_place = True
        yield
        self._put(lambda name: self._given(name, present.get(name), types[name]))
        self.is_in_place = False

    @torch.no_grad()
    def put_into(self, scorer: Scorer | None) -> None:
        """The averaged weights, where there are any, into a Scorer of the same model, if there is one. Collective."""
        if (settings := self.settings) is None:
            return
        if self._now < settings.first_update:
            self.context.log(
                f"the run ended after step {self._now}, before the first update of its averaged weights, after step "
                f"{settings.first_update}: the output has the weights of step {min(self._now, settings.update_after)}"
            )
        if not self._begun:
            return
        since = (self._now - settings.update_after) % settings.steps_between
        self.context.counts["averaged_step"] = self._now - since
        parameters = {} if scorer is None else dict(scorer.named_parameters())
        for name in self._shapes:
            weight = self.weight(name)
            if name in parameters:
                parameters[name].copy_(weight)

    def _own(self) -> list[str]:
        return [name for name, owner in self._owners.items() if owner == self.processes.rank]

    def _present(self) -> Iterator[dict[str, Tensor]]:
        """Every present weight that this process averages."""
        return float_weights(self._shapes, self.parallel.weight, lambda name: self._owners[name] == self.processes.rank)

    def _taken_up(self, parts: Mapping[str, Tensor]) -> _Average:
        """Copies of what there is of an average, and zeros for the rest, where they are kept."""
        assert self.settings is not None
        names = ("start", "ema", "shift")[: self.settings.numbers]
        zeros = torch.zeros_like(parts["start"])
        return _Average(**{name: self._kept(parts.get(name, zeros)) for name in names})

    def _kept(self, tensor: Tensor) -> Tensor:
        if not self._on_host:
            return tensor.to(self.processes.device, torch.float32, copy=True)
        return torch.empty(tensor.shape, pin_memory=True).copy_(tensor, non_blocking=True)

    def _given(self, name: str, own: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The tensor that one process has, on all of them and their devices."""
        device = self.processes.device
        # what is handed over is memory as it lies
        tensor = torch.empty(self._shapes[name], dtype=dtype, device=device) if own is None else own.to(device)
        tensor = tensor.contiguous()
        return self.processes.give(tensor, self._owners[name])

    def _put(self, weight_of: Callable[[str], Tensor]) -> None:
        for name in self._shapes:
            self.parallel.put(name, weight_of(name))
        self.parallel.loaded()
