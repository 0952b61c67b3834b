"""The last decoder layer on the positions that are read, and nowhere else.

After its attention a layer works position by position, and of the last layer's positions only those whose hidden
state is read matter. So its output projection and feed-forward part run on them alone, and its attention where a plan
leaves tokens out; keys and values still come from every token. Exact. Done where the layer has the common pre-norm
form, and where a probe gives equal numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stages.training.trunk import trunk_of

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


def fits(model: Any) -> bool:
    """Whether the last layer has the form h + attention(norm(h)), then h + mlp(norm(h)), by its parts' names."""
    layers = getattr(trunk_of(model), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return False
    parts = dict(layers[-1].named_children())
    return set(parts) == _PARTS and isinstance(getattr(parts["self_attn"], "o_proj", None), nn.Module)


def install(model: Any) -> None:
    """From now on the last layer takes `reads`, an index [R] into its tokens, and then returns [1, R, H]."""
    layer = trunk_of(model).layers[-1]
    layer.forward = _ReadingLayer(layer, layer.forward)


def remove(model: Any) -> None:
    """Undo `install`."""
    layer = trunk_of(model).layers[-1]
    layer.forward.hook.remove()
    del layer.forward


def reading_nothing(model: Any) -> dict[str, Tensor]:
    """The argument of a pass of which keys and values are wanted and no hidden state: it then ends at one token."""
    layers = getattr(trunk_of(model), "layers", None)
    if layers is None or not isinstance(vars(layers[-1]).get("forward"), _ReadingLayer):
        return {}
    return {"reads": torch.zeros(1, dtype=torch.long, device=model.device)}


class _ReadingLayer:
    """Stands for the layer's `forward`."""

    def __init__(self, layer: nn.Module, whole_forward: Any) -> None:
        self.layer, self.whole_forward = layer, whole_forward
        self.reads_R: Tensor | None = None
        self.hook = layer.self_attn.o_proj.register_forward_pre_hook(self._select)  # type: ignore[union-attr]

    def _select(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self.reads_R is None else (inputs[0].index_select(1, self.reads_R), *inputs[1:])

    def __call__(self, hidden_1TH: Tensor, *arguments: Any, reads: Tensor | None = None, **kwargs: Any) -> Any:
        if reads is None:
            return self.whole_forward(hidden_1TH, *arguments, **kwargs)
        layer: Any = self.layer
        self.reads_R = reads
        if kwargs.get("packed") is not None:
            kwargs["packed"] = kwargs["packed"].reading(reads)
        try:
            attended_1RH = layer.self_attn(hidden_states=layer.input_layernorm(hidden_1TH), **kwargs)[0]
        finally:
            self.reads_R = None
        hidden_1RH = hidden_1TH.index_select(1, reads) + attended_1RH
        return hidden_1RH + layer.mlp(layer.post_attention_layernorm(hidden_1RH))
