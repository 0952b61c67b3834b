"""AdamW whose weights and moments are bfloat16, rounded up or down at random.

An update is computed in float32. To the nearest bfloat16, of 8 bits, most of it would be lost: a weight would stay
where the learning rate is below 1/512 of it, and a second moment that falls by a thousandth a step would stay for
ever. Rounded at random, up as often as the lost bits say, it is right on average (Zamirai et al., arXiv:2010.06192,
section 3; Gupta et al., arXiv:1502.02551).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.seeds import derive

CHUNK = 2**22
"""Elements of a tensor that are in float32 at a time."""
_LOST = 0xFFFF
"""The bits of a float32 that a bfloat16 has not."""


class RoundedAdamW(torch.optim.Optimizer):
    """Four bytes of state for every element. `names`: of all parameters, from which with the seed and the step all
    random numbers follow: processes with the same gradients go on with the same weights."""

    grad_scale: Tensor | None = None
    """What gradients are divided by."""

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        names: Mapping[Tensor, str],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        seed: int,
    ) -> None:
        # like torch's fused optimizers this one takes a `grad_scale`
        super().__init__([dict(group) for group in groups], {"lr": lr, "betas": betas, "eps": eps, "fused": True})
        self.names, self.seed = names, seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Of every parameter with a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if "exp_avg" not in state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        state["step"] += 1
        generator = torch.Generator(parameter.device)
        generator.manual_seed(derive(self.seed, "rounding", state["step"], self.names[parameter]))
        assert parameter.grad is not None
        kept = [parameter.view(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)]
        parts = zip(*(one.split(CHUNK) for one in kept), parameter.grad.reshape(-1).split(CHUNK), strict=True)
        for weight, mean, square, gradient in parts:
            new = self._updated(weight.float(), mean.float(), square.float(), gradient.float(), state["step"], group)
            for place, value in zip((weight, mean, square), new, strict=True):
                place.copy_(round_at_random(value, generator))

    def _updated(
        self, weight: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, step: int, group: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """In float32 (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2, with the decay times the rate as in torch);
        the update is made from the moments before they are rounded."""
        (first, second), rate = group["betas"], group["lr"]
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = (square / (1 - second**step)).sqrt_().add_(group["eps"])
        weight.mul_(1 - rate * group["weight_decay"])
        weight.addcdiv_(mean, size, value=-rate / (1 - first**step))
        return weight, mean, square


def round_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 as bfloat16: one of the two neighbours, the nearer one likelier, so that the mean over many draws is the
    value. What is a bfloat16 already stays; so do infinities, and what is no number."""
    bits = torch.randint(0, _LOST + 1, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    # beyond the mantissa the sum carries into the exponent, which is the next larger number
    rounded = ((values.view(torch.int32) + bits) & ~_LOST).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
