"""The ledger of a stage run: processor time of everything it starts, GPUs' energy, model FLOPs."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from artifacts.errors import StageError
from stages import usage
from stages.nvml import Gpu, gpus
from stages.training import utilization
from stages.training.utilization import Utilization, peak_flops

ROOT = Path(__file__).parents[2]
WORK = "import time\nwhile time.process_time() < 0.3: pass"


def test_processor_time_counts_children_that_ended_and_children_that_live():
    """A child works until its own clock of processor time says 0.3 s; one is waited for, one lives on."""
    meter = usage.Meter()
    subprocess.run([sys.executable, "-c", WORK], check=True)
    with subprocess.Popen([sys.executable, "-c", f"{WORK}\nprint('done', flush=True)\ninput()"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living:  # fmt: skip
        assert living.stdout.readline() == b"done\n"
        used = meter.read()
        living.communicate(b"\n")
    # the kernel counts in hundredths; a generous roof for starting two interpreters
    assert 0.5 < used["cpu_seconds"] < 6
    assert used["peak_memory_gb"] > 0.01
    assert "gpu_seconds" not in used


LAUNCHER = """
import subprocess, sys
work = "import time\\nwhile time.process_time() < 0.3: pass\\n"
ended = subprocess.Popen([sys.executable, "-c", work])
ended.wait()
living = subprocess.Popen([sys.executable, "-c", work + "print(1, flush=True); input()"], stdin=-1, stdout=-1)
living.stdout.readline()
rank = work + "from stages.usage import launched_cpu_seconds; print(launched_cpu_seconds())"
print(subprocess.run([sys.executable, "-c", rank], stdout=-1, text=True).stdout)
living.communicate(b"1")
"""


def test_processes_of_one_launcher_are_counted_together():
    """Three processes of 0.3 s below one launcher: one that ended, one that lives, and the one that asks."""
    done = subprocess.run([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    assert 0.8 < float(done.stdout) < 8


def test_energy_is_the_difference_of_the_used_gpus_counters(monkeypatch):
    """Of two GPUs the stage used the second: from 1,000 J to 1,250 J. One that does not count gives none."""
    readings = iter([
        [Gpu("GPU-a", "A", 500_000), Gpu("GPU-b", "B", 1_000_000)],
        [Gpu("GPU-a", "A", 900_000), Gpu("GPU-b", "B", 1_250_000)],
        [Gpu("GPU-a", "A", 900_000), Gpu("GPU-b", "B", None)],
    ])  # fmt: skip
    monkeypatch.setattr(usage, "used_gpus", lambda processes: ["GPU-b"])
    meter = usage.Meter(read_gpus=lambda: next(readings))
    used = meter.read()
    assert used["energy_joules"] == 250.0
    assert used["gpu_seconds"] == used["seconds"]
    assert "energy_joules" not in meter.read()


class FakeNvml:
    """A driver with two GPUs, the second of which does not count its energy."""

    def __init__(self, name: str) -> None:
        assert name == "libnvidia-ml.so.1"
        self.open = False

    def nvmlInit_v2(self) -> int:
        self.open = True
        return 0

    def nvmlShutdown(self) -> int:
        self.open = False
        return 0

    def nvmlDeviceGetCount_v2(self, count) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device) -> int:
        device._obj.value = index + 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device: ctypes.c_void_p, used) -> int:
        used._obj.value = 2**33 + 7  # more than 32 bits hold
        return 0 if device.value == 1 else 3

    def nvmlDeviceGetUUID(self, device: ctypes.c_void_p, buffer, size: int) -> int:
        buffer.value = f"GPU-{device.value}".encode()
        return 0

    def nvmlDeviceGetName(self, device: ctypes.c_void_p, buffer, size: int) -> int:
        buffer.value = b"NVIDIA H100 80GB HBM3"
        return 0


def test_the_driver_is_asked_and_left():
    made = []

    def load(name: str) -> FakeNvml:
        made.append(FakeNvml(name))
        return made[-1]

    name = "NVIDIA H100 80GB HBM3"
    assert gpus(load) == [Gpu("GPU-1", name, 2**33 + 7), Gpu("GPU-2", name, None)]
    assert not made[0].open

    def missing(name: str) -> None:
        raise OSError(name)

    assert gpus(missing) == []


def small(**settings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, **settings,
    )  # fmt: skip


LAYER = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6 + 2 * 4
"""Weights of the layer: queries, keys and values, output, three of the MLP, two norms."""


def test_flops_of_a_token_by_hand():
    """6 of every weight that multiplies: the layer, the last norm (4) and the head (40), not the embedding (40)."""
    model = LlamaForCausalLM(small(tie_word_embeddings=False))
    assert utilization.flops_per_token(model) == 6 * (LAYER + 4 + 40)
    tied = LlamaForCausalLM(small(tie_word_embeddings=True))
    assert utilization.flops_per_token(tied) == 6 * (LAYER + 4 + 40)
    # frozen but for the head: 4 of what only passes the gradient on
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert utilization.flops_per_token(model) == 4 * (LAYER + 4) + 6 * 40
    judge = LlamaForSequenceClassification(small(num_labels=1))
    assert utilization.flops_per_token(judge) == 6 * (LAYER + 4 + 4)


def test_where_weights_do_not_tell_nothing_is_said():
    model = LlamaForCausalLM(small())
    model.config.num_local_experts = 4
    assert utilization.flops_per_token(model) is None
    config = types.SimpleNamespace(get_text_config=lambda: config)
    packed = types.SimpleNamespace(
        config=config,
        parameters=lambda: [torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)],
        get_input_embeddings=lambda: types.SimpleNamespace(weight=None),
        get_output_embeddings=lambda: None,
    )
    assert utilization.flops_per_token(packed) is None


def test_utilization_is_the_share_of_the_peak_that_is_known(monkeypatch):
    """1,000 tokens of 3e9 operations in 2 s are 1.5 TFLOP/s; of a machine of 6 TFLOP/s a quarter, whatever the
    processes."""
    monkeypatch.delenv(utilization.PEAK_VARIABLE, raising=False)
    assert Utilization(3e9, peak_flops(bf16=False)).measure(1000, 2.0, 2) == {"tflops_per_second": 1.5}
    monkeypatch.setenv(utilization.PEAK_VARIABLE, "6")
    assert Utilization(3e9, peak_flops(bf16=False)).measure(1000, 2.0, 2) == {"tflops_per_second": 1.5, "mfu": 0.25}
    assert Utilization(None, 6e12).measure(1000, 2.0, 2) == {}


@pytest.mark.parametrize("given", ["fast", "0", "-1", "nan", "inf"])
def test_a_peak_that_is_no_number_is_refused_before_training(monkeypatch, given):
    monkeypatch.setenv(utilization.PEAK_VARIABLE, given)
    with pytest.raises(StageError, match=f"POSTTRAIN_PEAK_TFLOPS is '{given}'"):
        Utilization.of([LlamaForCausalLM(small())], bf16=False)


@pytest.mark.parametrize(
    ("device", "bf16", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", True, 989.4e12),
        ("NVIDIA H100 PCIe", True, 756e12),
        ("NVIDIA H200", False, 66.9e12),
        ("NVIDIA A100-SXM4-80GB", False, 19.5e12),
        ("NVIDIA L40S", True, 362e12),
        ("NVIDIA L4", True, 121e12),
        ("Some other device", True, None),
    ],
)
def test_peaks_by_name(device, bf16, expected):
    assert utilization.peak_of(device, bf16) == (None if expected is None else pytest.approx(expected, rel=1e-12))


def test_a_machine_is_described_without_its_name():
    import socket

    facts = usage.machine_facts()
    assert facts["cores"] >= 1 and facts["memory_gb"] > 0
    assert socket.gethostname() not in repr(facts)
