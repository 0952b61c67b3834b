"""Runs on the GPU: resumed to the bit, within a memory that is too small, and sharded over the one device."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flows.command import stage_command, stage_environment
from flows.launch_settings import Launch
from stages import nvml
from stages.training.batch import Branch, Group
from stages.training.language_modeling import TokenLoss
from stages.training.loop import Trainer
from stages.training.processes import prepare_process
from stages.training.utilization import peak_of
from stages.training.windows import DatasetWindows
from tests.training.conftest import packing_scorer, tiny_model
from tests.training.test_loop import context_for
from tests.training.test_sharded_processes import ROOT, SCRIPT, context, output, rows
from tests.training.training_process import Stop, stop_me, train


def weights(folder: Path) -> list[torch.Tensor]:
    return [one.detach() for one in AutoModelForCausalLM.from_pretrained(folder).parameters()]


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = context(tmp_path / "whole")
    train(whole, -1, None)
    with pytest.raises(Stop):
        train(context(tmp_path / "stopped", tmp_path / "store"), 11, stop_me)
    resumed = context(tmp_path / "resumed", tmp_path / "store")
    train(resumed, -1, None)
    assert rows(whole) == rows(resumed)
    pairs = zip(weights(output(whole)), weights(output(resumed)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_sharded_over_one_device_as_whole(tmp_path: Path) -> None:
    """Through the launcher, with FSDP2's own group of one and NCCL."""
    whole = context(tmp_path / "whole")
    train(whole, -1, None)
    sharded = context(tmp_path / "sharded")
    settings = {"spec": asdict(sharded.spec), "kill_before": -1, "kill_rank": 0}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    command = stage_command(Launch(processes=1, config="fsdp2"), Path(sharded.spec.job), threads=1)
    arguments = [*command.arguments[:-3], str(SCRIPT), str(tmp_path / "settings.json")]
    environment = stage_environment(command)
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for wanted, row in zip(rows(whole), rows(sharded), strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    for one, other in zip(weights(output(whole)), weights(output(sharded)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def groups() -> list[Group]:
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (16, 120), generator=draws).tolist()
    return [Group(f"row{n}", (), (Branch(row, [False] + [True] * 119),)) for n, row in enumerate(ids)]


def losses(folder: Path) -> tuple[list[float], list[dict[str, Any]]]:
    made = context_for(folder, max_steps=3, train_batch_size=16, micro_batch_tokens=4096)
    scorer = packing_scorer(tiny_model(num_hidden_layers=8, intermediate_size=4096))
    trainer = Trainer(made, made.config, prepare_process(made), scorer, TokenLoss())
    metrics = trainer.run(DatasetWindows(groups(), made.config)).metrics
    lines = (Path(made.spec.job) / "events.jsonl").read_text().splitlines()
    return [row["loss"] for row in metrics], [json.loads(line) for line in lines]


def test_a_real_lack_of_memory_halves_the_micro_batches(tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    enough, _ = losses(tmp_path / "enough")
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.7 * peak / total)
    try:
        little, events = losses(tmp_path / "little")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("memory" in json.dumps(event) for event in events), events
    assert little == pytest.approx(enough, rel=1e-6)


def test_the_driver_tells_name_and_energy_of_a_gpu_whose_peak_is_known() -> None:
    [gpu, *_] = nvml.gpus()
    assert gpu.name in torch.cuda.get_device_name()
    assert gpu.millijoules is not None and gpu.millijoules > 0
    peak = peak_of(torch.cuda.get_device_name(), True)
    assert peak is not None and peak > 9e14  # of the Hopper GPUs that this was run on
