"""Frozen weights of few bits under adapters: nf4 and fp4 (QLoRA, Dettmers et al., arXiv:2305.14314), int8.

A weight is what it was rounded to, and nothing else is rounded: a product is of the states as they are with the weight
in their type, in training and without a gradient, on any device. So a policy and its reference, its sampler and its
rows in packs are one model. bitsandbytes keeps to that for 4 bits on a GPU alone: on a CPU, states that need no
gradient go another way, in bfloat16, that leaves the layer without one (0.50.2), and for 8 bits it rounds the states
too, but on a CPU in training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from artifacts.errors import StageError
from stages.training.linear import frozen
from stages.training.model_check import check_finite


def _four_bits(kind: str) -> dict[str, Any]:
    """With quantized constants (the paper's section 3), which take 0.37 bits less a weight."""
    # float32 products: the probes of a loaded model need them, and `parallel.use_bfloat16` changes that
    settings = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, **settings}


_KINDS: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "nf4": _four_bits,
    "fp4": _four_bits,
    "int8": lambda kind: {"load_in_8bit": True},
}
"""`quantization` -> the settings of the library that has it, which quantizes what it loads."""


def quantized(quantization: str | None, device: torch.device, head: str | None = None) -> dict[str, Any]:
    """What `from_pretrained` takes for it, with the device that the model is on from then on; nothing without.

    `head`: the name of what stays as it is, where that is not the head of a language model.
    """
    if quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    # at its import it asks for a package that would fetch kernels from the Hub
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    left = {} if head is None else {"llm_int8_skip_modules": [head]}
    settings = BitsAndBytesConfig(**_KINDS[quantization](quantization), **left)
    return {"quantization_config": settings, "device_map": {"": device}}


def settle(folder: Path, model: Any) -> None:
    """Products as above, for all layers of a model that was loaded as `quantized` says.

    Raises StageError for a weight of the folder that is not finite; of few bits all are.
    """
    check_finite(folder)
    for layer in model.modules():
        kind = type(getattr(layer, "weight", None)).__name__
        if kind == "Int8Params" or (kind == "Params4bit" and layer.weight.device.type == "cpu"):
            layer.forward = _Forward(layer)


def is_quantized(layer: Any) -> bool:
    """Whether a layer's weight is of few bits, and so cannot be trained."""
    return type(getattr(layer, "weight", None)).__name__ in ("Int8Params", "Params4bit")


class _Forward:
    """Stands for the `forward` of a quantized layer."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, hidden: Tensor) -> Tensor:
        return frozen(hidden, self.weight, self.layer.bias)

    def weight(self, number: torch.dtype) -> Tensor:
        """[O, I]."""
        return dequantized(self.layer).to(number)


def dequantized(layer: Any) -> Tensor:
    """[O, I] the weight of a quantized layer, in float32."""
    from bitsandbytes import functional

    weight = layer.weight
    if type(weight).__name__ == "Int8Params":
        found: Tensor = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        return found
    state = weight.quant_state
    constants = state.absmax
    if state.nested:
        constants = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # Block by block: on a CPU the library takes a row for whole blocks, whatever it has (0.50.2).
    packed, size = weight.data.flatten(), state.shape.numel()
    packed = pad(packed, (0, len(constants) * state.blocksize // 2 - len(packed)))
    blocks = (len(constants), state.blocksize)
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
    values: Tensor = dequantize(packed, constants, state.blocksize, state.quant_type, blocks, torch.float32)
    return values.flatten()[:size].view(state.shape)


def check_dora(layers: Iterable[Any]) -> None:
    """Raises StageError where peft, which asks the library for whole weights to have their lengths, gets wrong ones."""
    for layer in layers:
        state = getattr(layer.weight, "quant_state", None) if is_quantized(layer) else None
        if state is not None and layer.weight.device.type == "cpu" and state.shape[1] % state.blocksize:
            raise StageError(
                f"use_dora with quantization {state.quant_type} on a CPU: rows of {state.shape[1]} weights are no "
                f"whole blocks of {state.blocksize}, for which bitsandbytes takes them; take int8, or leave one of the "
                "two out"
            )
