"""Models with a small head in place of the vocabulary: reward models, and judges of steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from artifacts.errors import StageError
from stages.averaging import kind_of
from stages.seeds import derive
from stages.training import quantization
from stages.training.model import keep_softcapping, quietly
from stages.training.model_check import check_loaded, check_model_folder, load_checked
from stages.training.multimodal import Classifiers, freeze_beside_text


def load_reward_model(folder: Path, *, new_head_seed: int | None = None, **quantized: Any) -> Any:
    """A sequence classifier with one output. With `new_head_seed`, a causal model's folder gets a fresh head.
    `quantized`: as of `model.load_causal_lm`; the head stays as it is."""
    from transformers import AutoModelForSequenceClassification

    return _load(AutoModelForSequenceClassification, folder, 1, new_head_seed, quantized)


def load_step_judge(folder: Path, *, new_head_seed: int | None = None, **quantized: Any) -> Any:
    """A token classifier with the outputs wrong and right; a fresh head as above."""
    from transformers import AutoModelForTokenClassification

    return _load(AutoModelForTokenClassification, folder, 2, new_head_seed, quantized)


def load_value_model(folder: Path) -> Any:
    """A reward model as it is, its score read at every position; or a causal model whose fresh head says 0 everywhere,
    so that no random number decides what is expected at first."""
    check_model_folder(folder)
    if kind_of(folder) == "reward_model":
        return load_reward_model(folder)
    model = load_reward_model(folder, new_head_seed=0)
    with torch.no_grad():
        model.score.weight.zero_()
    return model


def padding_of(tokenizer: Any) -> int | None:
    """What such a model's config says that padding is. transformers reads a score at the last token that is none, so it
    cannot be the end token, whose score we train; None: transformers then takes one row at a time."""
    pad: int | None = tokenizer.pad_token_id
    return None if pad == tokenizer.eos_token_id else pad


def _load(library: Any, folder: Path, outputs: int, new_head_seed: int | None, quantized: Mapping[str, Any]) -> Any:
    quietly()
    model, info = load_checked(Classifiers(library), folder, num_labels=outputs, **quantized)
    if quantized:
        quantization.settle(folder, model)
    keep_softcapping(model)
    if not hasattr(model, "score"):
        raise StageError(
            f"{type(model).__name__} has no head named score; rewards of this architecture are not supported"
        )
    freeze_beside_text(model)
    if new_head_seed is None:
        check_loaded(folder, model, info)
        return model
    check_loaded(folder, model, info, expected_missing=("score.",), expected_extra=("lm_head.",))
    draws = torch.Generator().manual_seed(derive(new_head_seed, "score"))
    with torch.no_grad():
        weight = model.score.weight
        weight.copy_(torch.randn(weight.shape, generator=draws) * weight.shape[1] ** -0.5)
        if model.score.bias is not None:
            model.score.bias.zero_()
    return model
