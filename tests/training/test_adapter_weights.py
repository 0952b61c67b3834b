"""An adapter that is sent alone is, name for name and value for value, the one that would be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from artifacts.errors import StageError
from stages.rollouts.vllm_adapter import room_for, write_adapter_folder
from stages.training.adapter_weights import adapter_weights, served_adapter
from stages.training.adapters import write_adapter
from tests.stages.small_models import save_model


def adapted(folder: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    given = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    return get_peft_model(
        save_model(folder / "base", 1), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **given)
    )


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "target_modules": "all-linear"}]
)
def test_as_peft_writes_it(settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(tmp_path, **settings)
    write_adapter(model, tmp_path / "peft", None)
    (tmp_path / "ours").mkdir()
    write_adapter_folder(tmp_path / "ours", served_adapter(model), adapter_weights(model))
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    ours, peft = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "peft"))
    # peft names layers by their whole path, or by its end
    assert ours.pop("target_modules") == sorted({path.rpartition(".")[2] for path in peft["target_modules"]})
    assert ours == {name: peft[name] for name in ours}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"use_dora": True}, "vLLM does not know use_dora of adapters"),
        ({"modules_to_save": ["up_proj"]}, "does not know modules_to_save"),
        ({"lora_bias": True}, "does not know lora_bias"),
        ({"target_modules": ["lm_head", "q_proj"]}, "does not know one on the head of adapters"),
        ({"rank_pattern": {"q_proj": 513}}, "does not know a rank above 512"),
    ],
)
def test_what_vllm_does_not_apply_is_refused(settings: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=problem):
        served_adapter(adapted(tmp_path, **settings))


def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="all of the model is trained; give lora_r"):
        served_adapter(save_model(tmp_path, 1))


def test_room_is_made_for_the_largest_rank(tmp_path: Path) -> None:
    """vLLM takes some ranks only: the next one from 17 is 32."""
    model = adapted(tmp_path, rank_pattern={"q_proj": 17})
    assert served_adapter(model).rank == 17
    assert room_for(served_adapter(model))["max_lora_rank"] == 32
