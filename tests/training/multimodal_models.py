"""Tiny random multimodal models, and what of them is beside text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from stages.seeds import derive
from stages.training.model import load_causal_lm
from tests.data.characters import IDS, build_tokenizer
from tests.training.conftest import SIZES

_TEXT: dict[str, Any] = {"vocab_size": len(IDS), **SIZES}
_EYE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_DELTA_NET: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_QWEN_EYE = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}
_DEEP_EYE = {**_QWEN_EYE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_CLIP = {**_EYE, "model_type": "clip_vision_model"}
_SIGLIP = {**_EYE, "model_type": "siglip_vision_model"}


def _parts(eye: dict[str, Any], **text: Any) -> dict[str, Any]:
    return {"text_config": _TEXT | text, "vision_config": eye}


MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": _parts(_EYE, sliding_window=8, query_pre_attn_scalar=8) | {"mm_tokens_per_image": 4},
    "mistral3": _parts({**_EYE, "model_type": "pixtral", "head_dim": 8}, model_type="mistral", sliding_window=None),
    "qwen2_vl": _parts(
        {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        rope_parameters=_ROPE,
    ),
    "qwen2_5_vl": _parts({**_QWEN_EYE, "fullatt_block_indexes": [0]}, rope_parameters=_ROPE),
    "qwen3_vl": _parts(_DEEP_EYE, rope_parameters=_ROPE),
    "qwen3_vl_moe": _parts(_DEEP_EYE, rope_parameters=_ROPE, **_EXPERTS),
    "qwen3_5": _parts({**_QWEN_EYE, "num_position_embeddings": 16}, **_DELTA_NET),
    "qwen3_5_moe": _parts(
        {**_QWEN_EYE, "num_position_embeddings": 16}, **_DELTA_NET, **_EXPERTS, shared_expert_intermediate_size=16
    ),
    "smolvlm": _parts(_EYE, model_type="llama") | {"scale_factor": 2},
    "llava": _parts(_CLIP, model_type="llama"),
    "llava_onevision": _parts(_SIGLIP, model_type="qwen2"),
    "internvl": _parts({**_EYE, "model_type": "internvl_vision"}, model_type="qwen2"),
    "glm4v": _parts(_QWEN_EYE, rope_parameters={**_ROPE, "partial_rotary_factor": 1.0}),
    "llama4": _parts(
        {**_EYE, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=48,
        attention_chunk_size=8,
    ),
    "voxtral": {
        "text_config": _TEXT | {"model_type": "llama"},
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_mel_bins": 8,
            "max_source_positions": 20,
        },
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "paligemma": (
        _parts({**_SIGLIP, "projection_dim": 32}, model_type="gemma"),
        "PaliGemmaForConditionalGeneration: tokens that come later change the logits of those before",
    ),
    "mllama": (
        _parts(
            {
                **_EYE,
                "num_global_layers": 1,
                "attention_heads": 2,
                "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1]],
            },
            num_hidden_layers=3,
            cross_attention_layers=[1],
        ),
        "MllamaForConditionalGeneration has layers inside its language model that text leaves out",
    ),
    "cohere2_vision": (
        _parts(_EYE, model_type="cohere2", sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        "Cohere2VisionForConditionalGeneration: .*what it does to its logits is not supported",
    ),
}


def build(model_type: str, settings: dict[str, Any] | None = None) -> Any:
    """Weights from a fixed seed, large enough that distributions are not uniform."""
    torch.manual_seed(derive(0, "multimodal", model_type))
    config = AutoConfig.for_model(model_type, **(MULTIMODAL[model_type] if settings is None else settings))
    model = AutoModelForMultimodalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8)
    return model.eval()


def save(folder: Path, model_type: str, settings: dict[str, Any] | None = None) -> Any:
    """With the character tokenizer."""
    model = build(model_type, settings)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return model


def loaded(folder: Path, model_type: str) -> Any:
    """Saved, and loaded as the stages do."""
    save(folder, model_type)
    return load_causal_lm(folder).eval()


def is_beside_text(name: str) -> bool:
    """By the words of the families above, in a checkpoint or in the model."""
    words = ("vision", "visual", "projector", "connector", "newline", "audio")
    return any(word in name for word in words)
