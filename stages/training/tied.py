"""A weight that is input embedding and head at once: its two gradients in one tensor.

autograd would make a second gradient as large as the weight, of zeros but for the rows of the batch's tokens, and add
it to the head's. Here the weight takes part in the graph once, and rows are added to the head's gradient in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class TiedEmbedding:
    """The input embedding of a model whose head has the same weight.

    Its gradient is sparse from now on, for all who use the module: every pass with gradients must go through `call`.
    """

    def __init__(self, base_model: nn.Module, embedding: nn.Embedding) -> None:
        self.base_model, self.embedding = base_model, embedding
        embedding.sparse = True
        self._name = next(name for name, module in base_model.named_modules() if module is embedding) + ".weight"

    @classmethod
    def of(cls, model: Any) -> TiedEmbedding | None:
        """Of a transformers model; None where head and embedding are different weights."""
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        tied = output is not None and isinstance(embedding, nn.Embedding) and output.weight is embedding.weight
        return cls(model.base_model, embedding) if tied else None

    def call(self, **inputs: Any) -> tuple[Any, Tensor]:
        """(base_model(**inputs), the weight that the head of this very pass must use)."""
        weight_VH = self.embedding.weight
        if not (torch.is_grad_enabled() and weight_VH.requires_grad):
            return self.base_model(**inputs), weight_VH
        lookup_VH, head_VH = _TwoUses.apply(weight_VH)
        output = functional_call(self.base_model, {self._name: lookup_VH}, kwargs=inputs, tie_weights=False)
        return output, head_VH


class _TwoUses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight_VH.view_as(weight_VH), weight_VH.view_as(weight_VH)

    @staticmethod
    def backward(ctx: Any, rows: Tensor | None, head_VH: Tensor | None) -> Tensor | None:
        if head_VH is None:
            return None if rows is None else rows.to_dense()
        return head_VH if rows is None else head_VH.add_(rows)
