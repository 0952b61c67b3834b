"""`posttrain plan --memory` of stages that sample with vLLM: its share of a GPU, its cache, its servers, and the
smallest change of these that fits. The model has 8.19 billion parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.machine import Machine
from flows.memory import Prediction
from tests.flows.test_memory import PARAMETERS, folder, predicted, stage

RAM = 10**15
# keys and values of the longest row: 40,960 tokens x 36 layers x 2 x (8 x 128)
ROW = 40_960 * 36 * 2 * 1_024


def grpo(
    tmp_path: Path, machine: Machine, rollouts: dict[str, Any], launch: dict[str, Any] | None = None, **config: Any
) -> Prediction:
    folder(tmp_path / "base")
    settings = {"rewards": ["exact_match"], "train_batch_size": 8, "micro_batch_tokens": 128, **config}
    made = {**stage("rl", "./base", rollouts=rollouts, **settings), "launch": launch or {}}
    return predicted(tmp_path, {"s": made}, machine)["s"]


def changed(found: Prediction) -> dict[str, Any]:
    assert not found.fits and found.change is not None and found.change.same_result
    return dict(found.change.fields)


def phase(found: Prediction, name: str) -> Any:
    return next(one for one in found.phases if one.name == name)


def test_vllms_share_of_a_gpu_is_there_all_the_time_unless_it_sleeps(tmp_path: Path) -> None:
    machine = Machine(RAM, 200 * 10**9)
    embedded, awake, asleep = (
        grpo(tmp_path, machine, rollouts, bf16=True)
        for rollouts in ({}, {"engine": "vllm"}, {"engine": "vllm", "enable_sleep_mode": True})
    )
    step = phase(embedded, "training step").total
    assert phase(awake, "training step").total == step + 60 * 10**9  # 0.3 of 200 GB
    assert phase(asleep, "training step").total == step
    for found in (awake, asleep):
        assert phase(found, "sampling").parts["engine"] == 60 * 10**9
        own = phase(found, "vLLM's share")
        assert own.room == 60 * 10**9 and own.parts["engine"] > 2 * PARAMETERS + 2 * ROW


def test_sleeping_is_the_smallest_change_where_training_fits_alone(tmp_path: Path) -> None:
    """Of 42 GB vLLM has 23.5. A step needs 19.7, and 17.6 of it stay while vLLM samples."""
    machine = Machine(RAM, 42 * 10**9)
    lora = {"bf16": True, "lora_r": 16, "gradient_checkpointing": True}
    rollouts = {"engine": "vllm", "gpu_memory_utilization": 0.56}
    found = grpo(tmp_path, machine, rollouts, **lora)
    assert changed(found) == {"rollouts.enable_sleep_mode": (False, True)}
    again = grpo(tmp_path, machine, {**rollouts, "enable_sleep_mode": True}, **lora)
    assert again.fits and found.change is not None and round(again.worst.total) == found.change.peak_bytes


def test_a_share_that_does_not_hold_the_weights_is_raised(tmp_path: Path) -> None:
    """Weights of 16.4 GB and a row of 6 GB, in 0.3 of 70 GB."""
    found = grpo(tmp_path, Machine(RAM, 70 * 10**9), {"engine": "vllm"}, bf16=True, lora_r=16)
    assert found.worst.name == "vLLM's share" and found.worst.room == 21 * 10**9
    assert changed(found) == {"rollouts.gpu_memory_utilization": (0.3, 0.4)}


def test_servers_on_gpus_of_their_own_take_nothing_of_the_stages(tmp_path: Path) -> None:
    machine = Machine(RAM, 200 * 10**9)
    embedded = grpo(tmp_path, machine, {}, bf16=True)
    beside = {"engine": "vllm_server", "servers": 2}
    here, there = (grpo(tmp_path, machine, {**beside, **more}, bf16=True) for more in ({}, {"devices": ["1", "2"]}))
    step = phase(embedded, "training step").total
    assert phase(there, "training step").total == step
    assert phase(here, "training step").total == step + 2 * 60 * 10**9
    crowded = {**beside, "devices": ["1", "1"], "gpu_memory_utilization": 0.6}
    found = grpo(tmp_path, machine, crowded, bf16=True)
    assert (found.worst.name, found.worst.total, found.worst.room) == ("vLLM's GPU", 240 * 10**9, 200 * 10**9)
    assert changed(found) == {"rollouts.gpu_memory_utilization": (0.6, 0.5)}


def test_on_a_cpu_the_cache_is_halved_or_what_the_longest_row_needs(tmp_path: Path) -> None:
    """In float32 the longest row takes 11.25 GiB."""
    assert 4 * ROW == 11.25 * 2**30
    small = grpo(tmp_path, Machine(RAM), {"engine": "vllm", "kv_cache_gib": 8})
    assert small.worst.name == "vLLM's cache" and small.worst.total == 4 * ROW
    assert changed(small) == {"rollouts.kv_cache_gib": (8.0, 16.0)}
    whole = grpo(tmp_path, Machine(RAM), {"engine": "vllm", "kv_cache_gib": 32})
    assert whole.fits
    less = grpo(tmp_path, Machine(int(whole.worst.total) - 10), {"engine": "vllm", "kv_cache_gib": 32})
    assert changed(less) == {"rollouts.kv_cache_gib": (32.0, 16.0)}
    assert less.change is not None and less.change.peak_bytes == pytest.approx(whole.worst.total - 16 * 2**30, abs=2)


def test_fewer_servers_where_their_caches_are_as_small_as_can_be(tmp_path: Path) -> None:
    rollouts = {"engine": "vllm_server", "servers": 3, "kv_cache_gib": 12}
    one, three = (grpo(tmp_path, Machine(RAM), {**rollouts, "servers": count}) for count in (1, 3))
    each = (three.worst.parts["engine"] - one.worst.parts["engine"]) / 2
    assert each > 4 * PARAMETERS + 12 * 2**30
    found = grpo(tmp_path, Machine(int(three.worst.total) - 10), rollouts)
    assert changed(found) == {"rollouts.servers": (3, 2)}
    assert found.change is not None and found.change.peak_bytes == pytest.approx(three.worst.total - each, abs=2)


def test_processes_share_the_servers_of_a_machine(tmp_path: Path) -> None:
    rollouts = {"engine": "vllm_server", "kv_cache_gib": 12}
    alone, two = (grpo(tmp_path, Machine(RAM), rollouts, {"config": "cpu", "processes": count}) for count in (1, 2))
    assert two.worst.parts["engine"] == alone.worst.parts["engine"] / 2


def test_somebody_elses_servers_take_nothing(tmp_path: Path) -> None:
    urls = {"engine": "vllm_server", "urls": ["http://127.0.0.1:8000"], "weights_folder": str(tmp_path)}
    embedded, found = (grpo(tmp_path, Machine(RAM), rollouts) for rollouts in ({}, urls))
    assert phase(found, "training step") == phase(embedded, "training step")
    assert "engine" not in phase(found, "sampling").parts and "sampler" not in phase(found, "sampling").parts


def test_evaluation_and_a_teachers_servers(tmp_path: Path) -> None:
    folder(tmp_path / "base")
    cache = {"kv_cache_gib": 12}
    answers = {"rewards": ["exact_match"], "rollouts": {"engine": "vllm", **cache}}
    teacher = {"loss_top_k": 8, "teacher_engine": {"engine": "vllm_server", **cache}}
    settings = {"micro_batch_tokens": 128, "train_batch_size": 8}
    found = predicted(
        tmp_path,
        {
            "eval": stage("evaluate", "./base", **answers),
            "apart": stage("distill", "./base", inputs={"teacher": "./base"}, **teacher, **settings),
            "here": stage("distill", "./base", inputs={"teacher": "./base"}, loss_top_k=8, **settings),
        },
    )
    for one in found["eval"].phases:
        if one.room is None:
            assert one.parts["engine"] >= 4 * PARAMETERS + 12 * 2**30 and one.parts["weights"] == 4 * PARAMETERS
    step, local = (phase(found[name], "training step").parts for name in ("apart", "here"))
    assert local["reference"] == 4 * PARAMETERS and "reference" not in step
    assert step["engine"] > 4 * PARAMETERS + 12 * 2**30


def test_weights_that_wait_to_sample_a_student(tmp_path: Path) -> None:
    """Two copies of them in float32, in both phases."""
    folder(tmp_path / "base")
    settings = {"micro_batch_tokens": 128, "train_batch_size": 8}
    found = predicted(
        tmp_path,
        {
            name: stage(
                "distill",
                "./base",
                inputs={"teacher": "./base"},
                rollouts={"engine": "vllm_server", "max_staleness": staleness},
                **settings,
            )
            for name, staleness in (("now", 0), ("ahead", 2))
        },
    )
    for one in ("training step", "sampling"):
        now, ahead = (phase(found[name], one).parts for name in ("now", "ahead"))
        assert "sampler" not in now and ahead["sampler"] == 2 * 4 * PARAMETERS
        assert {**now, "sampler": ahead["sampler"]} == ahead
