"""The gradient of the head's weight and bias, added up over chunks of positions, and over a step's micro-batches.

N positions, C positions of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stages.losses.head import Head
from stages.losses.products import add_product, product_in_blocks


class GradientTotal:
    """A weight's gradient over the micro-batches of a step, to which heads add in place.

    A gradient of their own would be as large as the weight, and there when most memory is in use. What a forward pass
    forms is multiplied only later by what comes in; but where a step's loss is divided by its items, all that comes in
    is one factor. So once the first pass of a step has come back with it, the others multiply by it at once.
    """

    def __init__(self, weight_VH: nn.Parameter) -> None:
        self.weight_VH = weight_VH
        self._factors: set[float] = set()

    def grad(self, kind: torch.dtype) -> Tensor | None:
        """What the passes before have left, to be added to, where it is of this type."""
        grad_VH = self.weight_VH.grad
        return grad_VH if grad_VH is not None and grad_VH.dtype == kind else None

    def factor(self) -> float | None:
        """What comes in, where the passes of this step agree on it."""
        if self.weight_VH.grad is None:  # a new step
            self._factors.clear()
        return next(iter(self._factors)) if len(self._factors) == 1 else None

    def came_in(self, factor: float) -> None:
        """A gradient that a forward pass had formed was multiplied by this."""
        self._factors.add(factor)


class HeadGradient:
    """d loss / d weight and bias, added up over chunks in the head's `sum_type`.

    `factor`: what it is multiplied by, where that is known; None: the head's `total` may know it. Where it does, the
    weight's is added there, and none is returned.
    """

    def __init__(self, head: Head, *, weight: bool, bias: bool, factor: float | None = None) -> None:
        # nothing holds on to the weight itself: where it is sharded, it is given back after the forward pass
        self.shape, self.product_type, self.wants_weight = head.weight_VH.shape, head.product_type, weight
        self.types = head.weight_VH.dtype, None if head.bias_V is None else head.bias_V.dtype
        self.nothing = head.weight_VH.new_empty(0, dtype=head.sum_type)
        self.bias_V = self.nothing.new_zeros(head.vocabulary) if bias else None
        self.total = head.total if weight else None
        self.factor = self.total.factor() if factor is None and self.total is not None else factor
        self.weight_VH: Tensor | None = None
        if self.factor is not None and self.total is not None:
            self.weight_VH = self.total.grad(head.sum_type)
        self.in_place = self.weight_VH is not None
        self.rows: list[tuple[Tensor, Tensor]] = []
        """(index [C], what is added there [C, H]), chunk by chunk."""

    def add(self, slopes_CV: Tensor, scales_C: Tensor, hidden_CH: Tensor) -> None:
        """weight += (scales slopes)^T hidden."""
        if self.bias_V is not None:
            self.bias_V.addmv_(slopes_CV.t(), scales_C)
        if not self.wants_weight:
            return
        kind = self.product_type
        slopes_CV, scaled_CH = slopes_CV.to(kind), self._scaled(hidden_CH, scales_C).to(kind)
        if self.weight_VH is None:  # written, not added: zeros would have to be written first
            self.weight_VH = product_in_blocks(slopes_CV.t(), scaled_CH, self.nothing.dtype)
        else:
            self.weight_VH = add_product(self.weight_VH, slopes_CV.t(), scaled_CH)

    def add_rows(self, rows_C: Tensor, scales_C: Tensor, hidden_CH: Tensor) -> None:
        """weight[rows] += scales hidden."""
        if self.bias_V is not None:
            self.bias_V.index_add_(0, rows_C, scales_C)
        if self.wants_weight:
            self.rows.append((rows_C, self._scaled(hidden_CH, scales_C).to(self.nothing.dtype)))

    def _scaled(self, hidden_CH: Tensor, scales_C: Tensor) -> Tensor:
        if self.in_place and self.factor is not None and self.factor != 1.0:
            scales_C = scales_C * self.factor
        return hidden_CH * scales_C[:, None]

    def result(self, scale: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """(weight's, bias's) gradient times `scale` in the types of what they belong to; None where not wanted, and
        for a weight whose gradient was added in place. Raises RuntimeError where it was with another factor.

        For once: the memory is given away, so that autograd need not copy it.
        """
        weight_VH, bias_V = self._weight(), self.bias_V
        self.weight_VH = self.bias_V = None
        if self.in_place:
            self._check_factor(scale)
            weight_VH = None
        for grad in (weight_VH, bias_V):
            if grad is not None and scale is not None:
                grad.mul_(scale)
        return (
            None if weight_VH is None else weight_VH.to(self.types[0]),
            None if bias_V is None else bias_V.to(self.types[1]),
        )

    def _weight(self) -> Tensor | None:
        if not self.wants_weight:
            return None
        weight_VH = self.nothing.new_zeros(self.shape) if self.weight_VH is None else self.weight_VH
        for rows_C, added_CH in self.rows:
            weight_VH.index_add_(0, rows_C, added_CH)
        return weight_VH

    def _check_factor(self, scale: Tensor | None) -> None:
        came = 1.0 if scale is None else scale.item()
        if came != self.factor:
            raise RuntimeError(
                f"a head's gradient was multiplied by {self.factor}, as in the passes before, but {came} came in; "
                "losses of one step must be divided by one number"
            )


class FormedGradient:
    """Gradients that the forward pass has formed: the backward pass multiplies them by what comes in, once."""

    def __init__(self, hidden_NH: Tensor | None, head: HeadGradient) -> None:
        self.hidden_NH, self.head = hidden_NH, head
        self.taken = False

    def take(self, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias. Raises RuntimeError the second time."""
        if self.taken:
            raise RuntimeError("this loss forms its gradient once, and it was taken before; compute the loss again")
        self.taken = True
        scale: Tensor | None = grad
        if grad.device.type == "cpu":  # on others, looking at the number would wait for them
            scale = None if grad.item() == 1.0 else grad
            if self.head.total is not None:
                self.head.total.came_in(grad.item())
        hidden_NH, self.hidden_NH = self.hidden_NH, None
        if hidden_NH is not None and scale is not None:
            hidden_NH.mul_(scale)
        return hidden_NH, *self.head.result(scale)
