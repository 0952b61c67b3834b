"""A training state in files that nothing unpickles: safetensors and JSON, readable by any number of processes.

Every process writes whole tensors (a float32 weight and its optimizer state) for its share of the parameters. The
loop waits for the copy only, which is a file's on a CPU and host memory from a GPU; a thread hashes, stores and marks.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from artifacts.errors import StageError
from stages.context import Context
from stages.disk import require_disk
from stages.losses import products
from stages.training.background import Background
from stages.training.metrics_log import PROGRESS
from stages.training.parallel import Parallel
from stages.training.processes import Processes

_COPYING_SHARE = 0.05
_WRITING_SHARE = 0.2
"""Of the time, at most, where a run saves as often as it can; writing goes on beside the steps."""
_SECONDS_BETWEEN = 15.0
_FILE_BYTES = 2**30
_OF_WINDOWS = "windows"


def numerics(processes: Processes, sharding: str, micro_batch_tokens: int) -> dict[str, Any]:
    """What must be equal for equal bits; where it differs, results are equal to about 1e-5."""
    return {
        "threads": torch.get_num_threads(),
        "processes": processes.size,
        "sharding": sharding,
        "micro_batch_tokens": micro_batch_tokens,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "products": products.library(),
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
    objective: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The ledger of steps: which rows each optimizer step trained on."""
    numerics: dict[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """What the windows keep of their own; beside the weights, not in the JSON."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """What this process alone keeps, as every one does; all of them are among the `tensors` of a state that is taken
    up."""


class Saver:
    """Saves states in the background, one at a time: after every `steps` steps, or as often as it costs little."""

    def __init__(self, context: Context, parallel: Parallel, processes: Processes, steps: int | None) -> None:
        self.context, self.parallel, self.processes, self.steps = context, parallel, processes, steps
        self.background = Background()
        self._owners = owners(parallel.shapes(), processes.size)
        self.agreed = (0.0, 0.0)
        """The sums of `wishes` over all processes."""
        self._last_end, self._copying_seconds, self._writing_seconds = time.monotonic(), 0.0, 0.0

    def wishes(self) -> list[float]:
        """[this process would save now, it is still writing], to be summed over processes. Raises what went wrong in
        the background since."""
        self.background.check()
        pause = max(_SECONDS_BETWEEN, self._copying_seconds / _COPYING_SHARE, self._writing_seconds / _WRITING_SHARE)
        due = self.context.is_main and time.monotonic() - self._last_end >= pause
        return [float(due), float(self.background.busy)]

    def is_due(self, step: int) -> bool:
        """Whether to save after this many steps; the same on every process."""
        due, busy = self.agreed
        return step % self.steps == 0 if self.steps is not None else due > 0 and busy == 0

    def save(self, progress: Progress, waited_seconds: float = 0.0) -> None:
        """Copy the state, and begin to store the copy. Collective. `waited_seconds`: for what the windows are to keep;
        it holds the loop up as copying does."""
        self.background.wait()
        if self.context.is_main:
            self.context.held.require_unchanged()
        started = time.monotonic() - waited_seconds
        of_windows = progress.tensors if self.processes.rank == 0 else {}
        tensors = self._share({**of_windows, **progress.parts})
        checkpoints = self.context.checkpoints
        name = self.processes.share(checkpoints.new_name(progress.step) if self.processes.rank == 0 else "")
        folder = self.context.scratch / f"checkpoint-{progress.step}"
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed here
        folder.mkdir()
        needed = sum(tensor.nbytes for tensor in tensors.values())
        require_disk(folder, int(needed * 1.05) + 1_000_000, f"a checkpoint of step {progress.step}")
        # lists grow while the thread writes; their entries never change
        frozen = replace(progress, metrics=list(progress.metrics), rows=list(progress.rows), tensors={}, parts={})
        if self.processes.device.type == "cpu":
            # a file takes them as fast as memory would, where weights and moments would be there twice
            _write_tensors(folder, tensors)
        self._copying_seconds = time.monotonic() - started
        self.background.start(partial(self._write, name, folder, tensors, frozen))

    def _share(self, kept_beside: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's share: `name` -> weight, `name|moment` -> state; with what is kept beside them. On a CPU the
        tensors themselves, else copies."""
        kept = Tensor.detach if self.processes.device.type == "cpu" else _on_host
        tensors: dict[str, Tensor] = {}
        for name in self.parallel.shapes():
            weight, moments = self.parallel.weight(name), self.parallel.moments(name)
            if self._owners[name] == self.processes.rank:
                tensors[name] = kept(weight)
                tensors |= {f"{name}|{key}": kept(value) for key, value in moments.items()}
        tensors |= {f"{_OF_WINDOWS}|{name}": kept(value) for name, value in kept_beside.items()}
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize(self.processes.device)
        return tensors

    def _write(self, name: str, folder: Path, tensors: dict[str, Tensor], progress: Progress) -> None:
        started = time.monotonic()
        if self.processes.device.type != "cpu":
            _write_tensors(folder, tensors)
        if self.processes.rank == 0:
            (folder / PROGRESS).write_text(json.dumps(_json(progress)), encoding="utf-8")
        checkpoints = self.context.checkpoints
        if self.processes.size == 1:
            checkpoints.save(progress.step, folder)
        else:
            checkpoints.save_part(name, self.processes.rank, folder)
            if self.processes.rank == 0:
                checkpoints.finish(name, self.processes.size)
        shutil.rmtree(folder, ignore_errors=True)
        self._last_end = time.monotonic()
        self._writing_seconds = self._last_end - started


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Empties the mapping: what is on disk need not stay in memory."""
    for number, keys in enumerate(_files({key: tensor.nbytes for key, tensor in tensors.items()})):
        save_file({key: tensors.pop(key).contiguous() for key in keys}, folder / f"state-{number:05d}.safetensors")


def _json(progress: Progress) -> dict[str, Any]:
    return {name: value for name, value in vars(progress).items() if name not in ("tensors", "parts")}


def owners(shapes: Mapping[str, torch.Size], processes: int) -> dict[str, int]:
    """Tensor -> the process that writes it: the largest first, each to whoever has least."""
    load = [0] * processes
    owner: dict[str, int] = {}
    for name in sorted(shapes, key=lambda name: (-shapes[name].numel(), name)):
        owner[name] = load.index(min(load))
        load[owner[name]] += shapes[name].numel()
    return owner


def _on_host(tensor: Tensor) -> Tensor:
    """A copy that later steps do not change; from a GPU it is complete at its next synchronization."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=True)


def _files(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names by file; a process without a share writes an empty one."""
    keys: list[str] = []
    for key, size in sizes.items():
        if keys and sum(sizes[one] for one in keys) + size > _FILE_BYTES:
            yield keys
            keys = []
        keys.append(key)
    yield keys


def restore(context: Context, parallel: Parallel, processes: Processes, expected: dict[str, Any]) -> Progress:
    """Take up the newest valid state of this fingerprint, or start at step 0. Collective."""
    found = context.checkpoints.latest() if processes.rank == 0 else None
    name = processes.share(found[1].name if found is not None else None)
    if name is None:
        return Progress(numerics=expected)
    folder = found[1] if found is not None else context.checkpoints.open(name)
    main = next(folder.rglob(PROGRESS))
    progress = Progress(**json.loads(main.read_text(encoding="utf-8")))
    progress.tensors = _load(folder, parallel, progress.step)
    context.resumed(progress.step)
    for key, now in expected.items():
        before = progress.numerics.get(key, now)
        if before != now:
            context.log(f"resumed with {key} = {now} instead of {before}: results are equal to 1e-5, not bit for bit")
    return progress


class _Saved(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for: what all processes keep together may not fit into each."""

    def __init__(self, files: Mapping[str, safe_open], names: Mapping[str, str]) -> None:
        """`names`: key -> the name in its file."""
        self._files, self._names = files, names

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._files[self._names[key]].get_tensor(self._names[key])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _load(folder: Path, parallel: Parallel, step: int) -> Mapping[str, Tensor]:
    """Gives back what was kept beside weights and moments."""
    files = [safe_open(path, framework="pt") for path in sorted(folder.rglob("*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 - no mapping
    state: dict[str, dict[str, str]] = defaultdict(dict)
    for full in where:
        name, _, key = full.partition("|")
        if key:
            state[name][key] = full
    for name, shape in parallel.shapes().items():
        if name not in where or tuple(where[name].get_slice(name).get_shape()) != tuple(shape):
            raise StageError(f"the checkpoint of step {step} in {folder} has no {name} of shape {tuple(shape)}")
        moments = {key: where[full].get_tensor(full) for key, full in state[name].items()}
        parallel.load(name, where[name].get_tensor(name), moments, step)
    parallel.loaded()
    return _Saved(where, state[_OF_WINDOWS])
