"""Every stage on a GPU that is none: no operator meets tensors of two devices, none is missing on CUDA or has no
deterministic kernel there, and a step waits for the device once, when its numbers are logged.

The recipe is that of every stage, with what else a training stage can be told to do.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from stages.training.loop import Trainer
from tests.every_stage import EVERY_STAGE, TASK, TRAINING
from tests.fake_device import GPU, FakeGpu
from tests.fake_gpu import fake_gpu
from tests.fake_operators import OtherDevice
from tests.in_process import failures, run_here
from tests.stages.resuming import ROWS
from tests.stages.small_models import run_stage, save_dataset
from tests.training.architectures import save_architecture
from tests.training.experts import EXPERTS
from tests.training.multimodal_models import MULTIMODAL
from tests.training.multimodal_models import save as save_multimodal

SHORT = {**TRAINING, "max_steps": 2}
LORA = {"lora_r": 4, "merge_adapters": False}
SAMPLED = {"rewards": ["task.py:length"], "num_generations": 4, "max_completion_length": 6}


def _sft(**settings: Any) -> dict[str, Any]:
    return {"uses": "sft", "inputs": {"model": "base", "dataset": "rows"}, "with": {**SHORT, **settings}}


def _rl(**settings: Any) -> dict[str, Any]:
    return {"uses": "rl", "inputs": {"model": "sft", "dataset": "rows"}, "with": {**SHORT, **SAMPLED, **settings}}


def _distill(teacher: Any = "grpo", dataset: str = "rows", **settings: Any) -> dict[str, Any]:
    inputs = {"model": "student", "teacher": teacher, "dataset": dataset}
    return {"uses": "distill", "inputs": inputs, "with": {**SHORT, "max_completion_length": 6, **settings}}


FURTHER: dict[str, Any] = {
    "in_bfloat16": _sft(bf16=True, neftune_noise_alpha=5.0),
    "in_bfloat16_alone": _sft(bf16=True, pure_bf16=True, gradient_checkpointing=True),
    "in_8_bits": _sft(optim="adamw_8bit"),
    "by_adafactor": _sft(optim="adafactor"),
    "orthogonal": _sft(optim="muon", bf16=True),
    "nf4": _sft(**LORA, quantization="nf4"),
    "int8": _rl(**LORA, quantization="int8", beta=0.1),
    "dora": _sft(**LORA, use_dora=True),
    "pissa": _sft(**LORA, init_lora_weights="pissa_niter_4", bf16=True),
    "olora": _sft(**LORA, init_lora_weights="olora"),
    "ema": {**_sft(weight_averaging={"kind": "ema", "update_freq": 1}), "inputs": EVERY_STAGE["sft"]["inputs"]},
    "held_out": {
        **EVERY_STAGE["dpo"],
        "inputs": {"model": "sft", "dataset": "pairs", "eval_dataset": "pairs"},
        "with": {**SHORT, "loss_type": "ipo", "eval_steps": 1, "keep": "best"},
    },
    "formed": _rl(structured={"regex": "[0-9]{2,4}"}, temperature=0.8, top_p=0.9, top_k=6),
    "again": _rl(num_iterations=2, max_steps=4, loss_type="dapo", beta=0.1),
    "by_sequences": _rl(loss_type="vespo", entropy_coef=0.01),
    "judged_by_itself": {
        **EVERY_STAGE["self_taught"],
        "with": {
            **{
                name: value for name, value in EVERY_STAGE["self_taught"]["with"].items() if name != "distillation_topk"
            },
            "distillation_mode": "sampled_token",
        },
    },
    "likeliest": _distill(lmbda=1.0, loss_top_k=3),
    "by_ratios": _distill(loss_type="iw_opd"),
}
"""Stages beside those of the recipe of every stage."""
LOGGED = "tolist at training/step_totals.py:"
FIRST = 1
"""Steps of every stage that are not counted: tables of two vocabularies are made in the first."""


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    with fake_gpu() as found:
        yield found


@contextmanager
def counted(gpu: FakeGpu) -> Iterator[dict[str, list[Counter[str]]]]:
    """Stage -> what waited, step by step."""
    found: dict[str, list[Counter[str]]] = defaultdict(list)
    plain = Trainer.step

    def step(trainer: Trainer, *args: Any) -> Any:
        before = gpu.waits.copy()
        result = plain(trainer, *args)
        found[Path(trainer.context.spec.job).name].append(gpu.waits - before)
        return result

    with mock.patch.object(Trainer, "step", step):
        yield found


@pytest.mark.slow
def test_every_stage(gpu: FakeGpu, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK)
    recipe = tmp_path / "every.yaml"
    stages = EVERY_STAGE | FURTHER
    recipe.write_text(json.dumps({"name": "every", "launch": {"threads": 1}, "stages": stages}))
    with counted(gpu) as found:
        payload = run_here(recipe, tmp_path / "store")
    assert failures(payload) == {}
    waits = {name: sum(steps[FIRST:], Counter()) for name, steps in found.items()}
    # the numbers of a step, which are logged
    assert [line for one in waits.values() for line in one if not line.startswith(LOGGED)] == []
    assert {name: one.total() for name, one in waits.items()} == {
        name: len(steps) - FIRST for name, steps in found.items()
    }
    assert len(found) > 30


def test_what_it_raises(gpu: FakeGpu) -> None:
    values = torch.arange(6.0, device=GPU).view(2, 3)
    assert values.device == GPU and values.is_cuda and nn.Linear(3, 2).to(GPU)(values).device == GPU
    with pytest.raises(OtherDevice):
        values + torch.ones(3)
    with pytest.raises(OtherDevice):
        torch.cat([values, torch.ones(1, 3)])
    with pytest.raises(OtherDevice):
        torch.ones(3).add_(values[0])
    with pytest.raises(OtherDevice):
        torch.ones(4)[torch.tensor([1], device=GPU)]
    with pytest.raises(TypeError):
        values.numpy()
    with pytest.raises(NotImplementedError):
        values.long() @ values.long().t()
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        torch.rand(2, device=GPU, generator=torch.Generator())
    assert (values * torch.tensor(2.0)).device == GPU  # numbers may be the host's
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError, match="deterministic"):
        values.cumsum(0)


def test_what_waits(gpu: FakeGpu) -> None:
    values = torch.ones(4, device=GPU, requires_grad=True)
    index = torch.tensor([0, 1]).to(GPU, non_blocking=True)
    gpu.waits.clear()
    (values[index] * 2).sum().backward()
    assert values.grad is not None and values.grad.device == GPU
    torch.optim.AdamW([values], fused=True).step()
    assert gpu.waits.total() == 0
    waiting = (
        lambda: float(values.detach().sum()),
        lambda: bool((values > 0).any()),
        lambda: values.detach().tolist(),
        lambda: values.detach().cpu(),
        lambda: values[values > 0],
        lambda: index.bincount(minlength=4),
        lambda: values.detach().allclose(values.detach()),
        lambda: torch.linalg.svdvals(values.detach().view(2, 2)),
        lambda: values[torch.tensor([1])],
        lambda: values.new_tensor([1.0]),
        lambda: torch.tensor([1.0], device=GPU),
        lambda: torch.ones(2).to(GPU),
        lambda: values.repeat_interleave(torch.ones(4, dtype=torch.long).to(GPU, non_blocking=True)),
    )
    for number, wait in enumerate(waiting):
        wait()
        assert gpu.waits.total() == number + 1, gpu.waits


OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (save_architecture, EXPERTS["mixtral"] | {"router_aux_loss_coef": 0.02, "output_router_logits": True}),
    "gemma2": (save_architecture, {}),  # soft-capped scores, and layers with a window
    "gpt2": (save_architecture, {}),
    "gemma3": (save_multimodal, MULTIMODAL["gemma3"]),
}


@pytest.mark.parametrize("model_type", OTHERS)
@pytest.mark.parametrize("bf16", [False, True])
def test_other_models(model_type: str, bf16: bool, gpu: FakeGpu, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    save, settings = OTHERS[model_type]
    save(tmp_path / "model", model_type, settings)
    rows = save_dataset(tmp_path / "rows", "prompt_completion", ROWS["prompt_completion"])
    steps = {"learning_rate": 1e-3, "train_batch_size": 4, "max_steps": 2, "max_length": 24, "bf16": bf16}
    sampling = {"rewards": ["tests.stages.small_models:letters"], "num_generations": 2, "max_completion_length": 4}
    with counted(gpu) as found:
        run_stage("rl", tmp_path / "run", {"model": tmp_path / "model", "dataset": rows}, **steps, **sampling)
    steps = found["job"][FIRST:]
    assert [line for one in steps for line in one if not line.startswith(LOGGED)] == []
    assert [one.total() for one in steps] == [1] * len(steps)  # what is logged, once
