"""Multimodal checkpoints on text alone, against transformers' own forward pass of the whole class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts.errors import StageError
from stages.data.chat import Encoder
from stages.sft import Config
from stages.training.adapters import add_adapters, load_adapter, write_adapter
from stages.training.classifiers import load_reward_model
from stages.training.model import Scorer, load_causal_lm, load_tokenizer, token_logprobs
from stages.training.probes import check_head, settle_layout
from stages.training.utilization import flops_per_token
from stages.training.whole_weights import whole_weights
from tests.data.characters import build_tokenizer
from tests.training.architectures import assert_logprobs_are_its_own, assert_samples_are_its_own
from tests.training.conftest import random_groups
from tests.training.multimodal_models import MULTIMODAL, REFUSED, build, is_beside_text, loaded, save

SEPARATE = {
    "qwen3_5": "attention cannot be replaced in Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "attention cannot be replaced in Qwen3_5MoeForConditionalGeneration",
    "llama4": "layers of type chunked_attention in Llama4ForConditionalGeneration",
}
"""Families whose language model shares no prompts; all others do."""


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_numbers_are_those_of_the_whole_class(model_type: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, model_type)
    assert type(model) is type(build(model_type))
    assert assert_logprobs_are_its_own(model) == SEPARATE.get(model_type)
    assert_samples_are_its_own(model)
    assert Scorer(model).context_length == 128


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_the_language_model_is_trained_and_nothing_else(model_type: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, model_type)
    scorer = Scorer(model)
    settle_layout(scorer)
    scorer.merge_gradients()
    batch = scorer.layout(random_groups(8, 2, vocabulary=14))
    scorer(batch, token_logprobs(batch)).logprobs_N.sum().backward()
    frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if is_beside_text(name)} and frozen
    assert all((one.grad is None) == (name in frozen) for name, one in model.named_parameters())


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_adapters_do_not_leave_the_language_model(model_type: str, tmp_path: Path) -> None:
    """Of all linear layers, or of names that what sees has as well; written, and read again by peft alone."""
    model = loaded(tmp_path / "base", model_type)
    linear = {
        path for path, one in model.named_modules() if isinstance(one, torch.nn.Linear) and not is_beside_text(path)
    }
    adapted = add_adapters(model, Config(lora_r=2, lora_alpha=4))
    found = {path.removeprefix("base_model.model.") for path in adapted.targeted_module_names}
    assert found == linear - {path for path in linear if path.endswith("lm_head")}
    chosen = add_adapters(load_causal_lm(tmp_path / "base"), Config(lora_r=2, lora_target_modules=("q_proj", "o_proj")))
    names = [name for name, one in chosen.named_parameters() if one.requires_grad]
    assert names and not any(map(is_beside_text, names))
    write_adapter(chosen, tmp_path / "adapter", None)
    again = load_adapter(load_causal_lm(tmp_path / "base"), tmp_path / "adapter")
    assert [name for name, one in again.named_parameters() if one.requires_grad] == names


def test_modules_to_save_are_those_of_the_language_model(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llava")
    assert sum(path.endswith("fc1") for path, _ in model.named_modules()) == 1
    with pytest.raises(StageError, match="LlavaForConditionalGeneration has no module 'fc1'"):
        add_adapters(model, Config(lora_r=2, modules_to_save=("fc1",)))
    settings: Any = {"lora_target_modules": ("q_proj",), "modules_to_save": ("v_proj",)}
    adapted = add_adapters(load_causal_lm(tmp_path), Config(lora_r=2, **settings))
    saved = [name for name, one in adapted.named_parameters() if one.requires_grad and "modules_to_save" in name]
    assert len(saved) == 2 and not any(map(is_beside_text, saved))


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_engines_are_given_the_checkpoints_names(model_type: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = loaded(tmp_path, model_type)
    expected, found = load_file(tmp_path / "model.safetensors"), dict(whole_weights(model))
    heads = {name for name in found if "lm_head" in name}  # always given, tied or not
    assert expected.keys() | heads == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_that_do_not_work(model_type: str, tmp_path: Path) -> None:
    settings, message = REFUSED[model_type]
    save(tmp_path, model_type, settings)
    with pytest.raises(StageError, match=message):
        check_head(Scorer(load_causal_lm(tmp_path)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5gemma2", "architectures": ["T5Gemma2ForConditionalGeneration"]},
         r"'t5gemma2' \(T5Gemma2ForConditionalGeneration\) is an encoder and a decoder.*; take a checkpoint of a lang"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]},
         r"architecture 'clip' \(CLIPModel\) is no language model that transformers has a class for; take a"),
    ],
)  # fmt: skip
def test_classes_that_are_no_language_models(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path, "gemma3")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match=message):
        load_causal_lm(tmp_path)


def test_a_reward_model_of_a_family_without_the_class_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "qwen2_5_vl")
    with pytest.raises(StageError, match=r"'qwen2_5_vl' .*has no class of AutoModelForSequenceClassification"):
        load_reward_model(tmp_path, new_head_seed=0)


def test_operations_are_those_of_text(tmp_path: Path) -> None:
    """6 of a weight of the language model, the tied embedding among them; none of what text does not pass."""
    model = loaded(tmp_path, "gemma3")
    weights = sum(one.numel() for name, one in model.named_parameters() if not is_beside_text(name))
    assert flops_per_token(model) == 6 * weights


PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %};{% endfor %}"
)
BOTH = PARTS.replace(
    "{% for part in", "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in"
).replace("{% endfor %};", "{% endfor %}{% endif %};")


@pytest.mark.parametrize("template", [PARTS, BOTH, "\n" + PARTS])
def test_templates_that_read_parts_show_texts(template: str, tmp_path: Path) -> None:
    """transformers renders a text as its one part would be rendered, white space included."""
    build_tokenizer(template=template).save_pretrained(tmp_path)
    texts = [{"role": "user", "content": "ab c"}, {"role": "assistant", "content": "de"}]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in texts]
    tokenizer = load_tokenizer(tmp_path)
    expected = build_tokenizer(template=template).apply_chat_template(parts, tokenize=False)
    assert tokenizer.apply_chat_template(texts, tokenize=False) == expected
    assert Encoder(tokenizer).conversations([texts], ["r"]) == [tokenizer(expected)["input_ids"]]


def test_the_processors_template_is_the_tokenizers(tmp_path: Path) -> None:
    build_tokenizer(template=None).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": BOTH}))
    assert load_tokenizer(tmp_path).chat_template == BOTH
    (tmp_path / "chat_template.json").write_text("[]")
    with pytest.raises(StageError, match=r"chat_template\.json is no object with a text chat_template"):
        load_tokenizer(tmp_path)
