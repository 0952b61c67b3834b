"""The head's weight where an adapter is on it, for passes that never compute all logits.

With LoRA (arXiv:2106.09685) logits are W h + s B A h: one product of the weight [W, B] with the states [h, s A h]. So
the chunked head stays as it is, and sees states that are wider by the rank. With DoRA (arXiv:2402.09353) the rows of
that weight are scaled by m / |W + s B A|.
V vocabulary, H hidden size, R positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from artifacts.errors import StageError


def head_weight(output: Any) -> tuple[Tensor, Tensor | None]:
    """(weight [V, H], or [V, H + rank] for `widened` states, bias [V]) of the head as it is at the moment: with its
    adapter, trained as a whole, or with adapters switched off."""
    name = _active(output)
    if name is None:
        module = _plain(output)
        return module.weight, module.bias
    base, lora_B = output.get_base_layer(), output.lora_B[name].weight
    weight_VX = torch.cat([base.weight, lora_B.to(base.weight.dtype)], dim=1)
    lengths = output.lora_magnitude_vector
    if name in lengths:
        sums_VH = base.weight.detach() + output.get_delta_weight(name).detach()
        # the paper's section 4.3: the norm is a constant to the gradient
        weight_VX = (lengths[name].weight / torch.linalg.norm(sums_VH, dim=1))[:, None] * weight_VX
    return weight_VX, base.bias


def widened(hidden_RH: Tensor, output: Any) -> Tensor:
    """The states that `head_weight` is for."""
    name = _active(output)
    if name is None:
        return hidden_RH
    inner_RH = output.lora_dropout[name](hidden_RH).to(output.lora_A[name].weight.dtype)
    low = output.lora_A[name](inner_RH) * output.scaling[name]
    return torch.cat([hidden_RH, low.to(hidden_RH.dtype)], dim=1)


def check_head_adapter(output: Any) -> None:
    """Raises StageError for an adapter that is not a product of weights and states."""
    name = _active(output)
    if name is None or name not in output.lora_magnitude_vector:
        return
    if not isinstance(output.lora_dropout[name], nn.Identity):
        raise StageError(
            "use_dora on the head takes no lora_dropout: set lora_dropout to 0, or leave the head out of "
            "lora_target_modules"
        )


def _active(output: Any) -> str | None:
    """The name of the adapter on the head that is switched on."""
    if not hasattr(output, "lora_A") or output.disable_adapters or output.merged:
        return None
    (name,) = output.active_adapters
    return str(name)


def _plain(output: Any) -> Any:
    """The module behind peft's wrappings that gives the logits."""
    if hasattr(output, "modules_to_save"):
        off = output.disable_adapters
        return output.original_module if off else output.modules_to_save[output.active_adapters[0]]
    return output.get_base_layer() if hasattr(output, "get_base_layer") else output
