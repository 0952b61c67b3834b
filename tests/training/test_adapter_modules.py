"""Which modules patterns, layers and starts of adapters may be of: GPT-2's weights, which are kept the other way round,
modules beside the layers, and patterns of one module that disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel

from artifacts.errors import StageError
from stages.sft import Config
from stages.training.adapter_settings import MOVING
from stages.training.adapters import add_adapters, load_adapter, write_adapter
from stages.training.memory import same_shape
from stages.training.memory_shape import read_shape
from tests.training.conftest import tiny_model
from tests.training.test_adapters import by_rows, move


def adapted(**settings: Any) -> Any:
    return add_adapters(tiny_model(tie_word_embeddings=False), Config(lora_r=2, **settings)).eval()


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_module_has_one_value(field: str, tmp_path: Path) -> None:
    """An adapter's file has its patterns in the order of the alphabet, whatever was first."""
    for patterns in ({"q_proj": 6, "layers.0.*": 4}, {"layers.0.*": 4, "q_proj": 6}):
        with pytest.raises(
            StageError, match=rf"{field}: model\.layers\.0\.self_attn\.q_proj is given .*(6.*by 'q_proj'|4.*by 'layers)"
        ):
            adapted(**{field: patterns})
    model = adapted(**{field: {"q_proj": 6, "layers.0.mlp.*": 4, "layers.0.mlp.up_proj": 4}})  # two, which agree
    move(model)
    write_adapter(model, tmp_path, None)
    again = load_adapter(tiny_model(tie_word_embeddings=False), tmp_path).eval()
    torch.testing.assert_close(by_rows(again), by_rows(model))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm_head", "'lm_head' in lora_target_modules is beside the numbered layers"),
        ("embed_tokens", "'embed_tokens' in lora_target_modules is beside the numbered layers"),
        (
            "model.layers.0.self_attn.v_proj",
            "'model.layers.0.self_attn.v_proj' in lora_target_modules is the whole path",
        ),
        ("layers.1.self_attn.v_proj", "is in none of the layers 0; leave one of the two out"),
    ],
)
def test_chosen_layers_are_those_of_all_adapters(name: str, message: str) -> None:
    with pytest.raises(StageError, match=message):
        adapted(layers_to_transform=[0], lora_target_modules=["q_proj", name])


@pytest.mark.parametrize("start", ["default", *MOVING[:2]])
def test_what_a_later_stage_trains_is_predicted(start: str, tmp_path: Path) -> None:
    """Of an adapter that was written for the weights as they came, twice of what was trained."""
    model = adapted(init_lora_weights=start, rank_pattern={"q_proj": 4})
    write_adapter(model, tmp_path, None)
    later = load_adapter(tiny_model(tie_word_embeddings=False), tmp_path)
    shape = read_shape(model.get_base_model().config.to_dict())
    config = Config(lora_r=2, init_lora_weights=start, rank_pattern={"q_proj": 4})
    adapters = same_shape(config, {"model": shape})["adapter"].adapters
    assert adapters is not None
    trained = sum(one.numel() for one in later.parameters() if one.requires_grad)
    assert (adapters.rank, shape.adapter_parameters(adapters)) == (4 if start == "default" else 8, trained)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(torch.arange(3, 13)[None]).logits.detach()
    return found


@pytest.mark.parametrize("start", ["default", "gaussian", "orthogonal", "pissa", "pissa_niter_16"])
def test_weights_the_other_way_round(start: str, tmp_path: Path) -> None:
    """The weights are those that came, s B A included; trained and written, it is read again, by peft alone too."""
    base, model = gpt2(), add_adapters(gpt2(), Config(lora_r=4, init_lora_weights=start)).eval()
    for path, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            came, product = (
                base.get_submodule(path).weight,
                layer.lora_B["default"].weight @ layer.lora_A["default"].weight,
            )
            torch.testing.assert_close(
                layer.base_layer.weight + layer.scaling["default"] * product.T, came, atol=1e-6, rtol=1e-5
            )
    torch.testing.assert_close(logits(model), logits(base), atol=1e-5, rtol=1e-5)
    move(model)
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 0.01
    write_adapter(model, tmp_path, None)
    merged = load_adapter(gpt2(), tmp_path).merge_and_unload()
    for one in (load_adapter(gpt2(), tmp_path), PeftModel.from_pretrained(gpt2(), tmp_path), merged):
        torch.testing.assert_close(logits(one.eval()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ["attn.c_proj"]])
def test_olora_takes_no_weights_the_other_way_round(targets: Any) -> None:
    """Square ones, too, which would have had another weight."""
    with pytest.raises(
        StageError, match=r"init_lora_weights is olora, but .*c_proj of GPT2LMHeadModel keep their weights"
    ):
        add_adapters(gpt2(), Config(lora_r=4, init_lora_weights="olora", lora_target_modules=targets))
