"""A weight that is input embedding and head at once: its two gradients in one tensor.

autograd would make a second gradient as large as the weight, of zeros but for the rows of the batch's tokens, and add
it to the head's, which it would hold until the backward pass has come to the embedding. Here the head's is added to
the weight's as soon as it is known, and rows are added in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stages.training.trunk import trunk_of


class TiedEmbedding:
    """The input embedding of a model whose head has the same weight.

    Its gradient is sparse from now on, for all who use the module: every pass with gradients must go through `call`.
    """

    def __init__(self, trunk: nn.Module, embedding: nn.Embedding) -> None:
        self.trunk, self.embedding = trunk, embedding
        embedding.sparse = True
        self._name = next(name for name, module in trunk.named_modules() if module is embedding) + ".weight"

    @classmethod
    def of(cls, model: Any) -> TiedEmbedding | None:
        """Of a transformers model; None where head and embedding are different weights."""
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        tied = output is not None and isinstance(embedding, nn.Embedding) and output.weight is embedding.weight
        return cls(trunk_of(model), embedding) if tied else None

    def call(self, **inputs: Any) -> tuple[Any, Tensor]:
        """(trunk(**inputs), the weight that the head of this very pass must use)."""
        weight_VH = self.embedding.weight
        if not (torch.is_grad_enabled() and weight_VH.requires_grad):
            return self.trunk(**inputs), weight_VH
        with self._padding_apart():
            weights = {self._name: _Lookup.apply(weight_VH)}
            output = functional_call(self.trunk, weights, kwargs=inputs, tie_weights=False)
        head_VH = weight_VH.detach().requires_grad_()
        head_VH.register_post_accumulate_grad_hook(partial(_give_gradient, weight_VH))
        return output, head_VH

    @contextmanager
    def _padding_apart(self) -> Iterator[None]:
        """Inside, a padding token's row gets zeros where it is looked up: torch would leave its rows out of a sparse
        gradient, and a GPU's host waits to know how many are left."""
        padding, self.embedding.padding_idx = self.embedding.padding_idx, None

        def without_padding(_module: nn.Module, inputs: tuple[Tensor, ...], looked_up: Tensor) -> None:
            if padding is not None:
                is_padding = (inputs[0] == padding)[..., None]
                looked_up.register_hook(lambda grad: grad.masked_fill(is_padding, 0.0))

        hook = self.embedding.register_forward_hook(without_padding)
        try:
            yield
        finally:
            hook.remove()
            self.embedding.padding_idx = padding


def _give_gradient(weight_VH: Tensor, head_VH: Tensor) -> None:
    grad_VH, head_VH.grad = head_VH.grad, None
    if grad_VH is None:  # it was added in place (`GradientTotal`)
        return
    weight_VH.grad = grad_VH if weight_VH.grad is None else weight_VH.grad.add_(grad_VH)


class _Lookup(torch.autograd.Function):
    """The weight. autograd adds sparse rows to a gradient in place, but would keep them as they are where none is."""

    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor) -> Tensor:
        ctx.weight_VH = weight_VH
        return weight_VH.view_as(weight_VH)

    @staticmethod
    def backward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.to_dense() if ctx.weight_VH.grad is None else rows
