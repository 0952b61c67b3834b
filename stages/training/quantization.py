"""Frozen weights in 4 bits under adapters (QLoRA, Dettmers et al., arXiv:2305.14314)."""

from __future__ import annotations

from typing import Any

import torch

from artifacts.errors import StageError


def require_quantization(quantization: str | None) -> None:
    """Raises StageError, before a model is looked at, where this machine cannot do it."""
    if quantization is None:
        return
    if not torch.cuda.is_available():
        raise StageError(
            f"quantization {quantization} needs a CUDA GPU, and this process sees none: run the stage where there is "
            "one, or leave quantization out"
        )


def quantized(quantization: str | None) -> dict[str, Any]:
    """What `from_pretrained` takes for it: nf4 with quantized constants, as in the paper; nothing without.

    Products are in float32, which the probes of a loaded model need; `parallel.use_bfloat16` changes that.
    """
    if quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device()}}
