"""A training state in files that nothing unpickles: safetensors and JSON."""

from __future__ import annotations

import json
import platform
import shutil
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.context import Context, require_disk
from stages.training.optimizer import load_optimizer_tensors, optimizer_tensors

_SHARE_OF_TIME = 0.05
_SECONDS_BETWEEN = 15.0


def numerics(threads: int, processes: int, micro_batch_tokens: int) -> dict[str, Any]:
    """What must be equal for equal bits; where it differs, results are equal to about 1e-5."""
    return {
        "threads": threads,
        "processes": processes,
        "micro_batch_tokens": micro_batch_tokens,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }


@dataclass
class Progress:
    """Everything of a run that is not a weight or an optimizer moment. All randomness follows from `step`."""

    step: int = 0
    num_tokens: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list)
    windows: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The ledger of steps: which rows each optimizer step trained on."""
    numerics: dict[str, Any] = field(default_factory=dict)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, tied ones once."""
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def save(context: Context, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write a resumable state of this step into the store; it counts once it is complete."""
    folder = context.scratch / f"checkpoint-{progress.step}"
    folder.mkdir()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained_tensors(model).items()}
    moments = {name: tensor.cpu().contiguous() for name, tensor in optimizer_tensors(model, optimizer).items()}
    needed = sum(tensor.nbytes for tensor in [*tensors.values(), *moments.values()])
    require_disk(folder, int(needed * 1.05) + 1_000_000, f"a checkpoint of step {progress.step}")
    save_file(tensors, folder / "model.safetensors")
    save_file(moments, folder / "optimizer.safetensors")
    (folder / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    context.checkpoints.save(progress.step, folder)
    shutil.rmtree(folder, ignore_errors=True)


def restore(context: Context, model: nn.Module, optimizer: torch.optim.Optimizer, expected: dict[str, Any]) -> Progress:
    """Take up the newest valid state of this fingerprint, or start at step 0."""
    found = context.checkpoints.latest()
    if found is None:
        return Progress(numerics=expected)
    step, folder = found
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(folder / "model.safetensors").items():
            parameters[name].copy_(tensor)
    load_optimizer_tensors(model, optimizer, load_file(folder / "optimizer.safetensors"))
    progress = Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
    context.resumed(step)
    changed = {key: (progress.numerics.get(key), value) for key, value in expected.items()}
    for key, (before, now) in changed.items():
        if before != now:
            context.log(f"resumed with {key} = {now} instead of {before}: results are equal to 1e-5, not bit for bit")
    return progress


class SaveClock:
    """Decides when to save: every `steps`, or so that saving takes at most 5 % of the time."""

    def __init__(self, steps: int | None) -> None:
        self.steps = steps
        self.last_end = time.monotonic()
        self.cost_seconds = 0.0

    def due(self, step: int) -> bool:
        """Whether a state should be saved after this many steps."""
        if self.steps is not None:
            return step % self.steps == 0
        return time.monotonic() - self.last_end >= max(_SECONDS_BETWEEN, self.cost_seconds / _SHARE_OF_TIME)

    def saved(self, seconds: float) -> None:
        """Note what a save took."""
        self.cost_seconds = seconds
        self.last_end = time.monotonic()
