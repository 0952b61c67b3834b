"""Weights as files, for servers that read them: in parts, replaced by the next ones, removed with their folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from stages.disk import require_disk
from stages.rollouts.engine import ServedAdapter
from stages.rollouts.vllm_adapter import write_adapter_folder

SHARED_MEMORY = Path("/dev/shm")
_FILE_BYTES = 2**30
"""Tensors are written so many bytes at a time, so that a whole model is never there once more in memory."""


class WeightFiles:
    """The weights of the moment in a folder, once there are any."""

    def __init__(self, folder: Path, adapter: ServedAdapter | None = None) -> None:
        """`folder`: of nothing else; made with the first weights, an adapter's where one is given."""
        self.folder, self._adapter = folder, adapter

    @property
    def exist(self) -> bool:
        """Whether there are any."""
        return any(self.folder.glob("*.safetensors"))

    def write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """In the place of those before. Raises StageError where the disk is too small."""
        self.folder.mkdir(exist_ok=True)
        self.remove()
        if self._adapter is not None:
            write_adapter_folder(self.folder, self._adapter, weights)
            return
        for number, part in enumerate(_parts(weights)):
            require_disk(self.folder, sum(one.nbytes for one in part.values()), "weights for vLLM's servers")
            save_file(part, self.folder / f"part-{number:05d}.safetensors")

    def remove(self) -> None:
        """Their files."""
        for path in self.folder.glob("*.safetensors"):
            path.unlink()


def private_place(model: Path) -> Path:
    """Shared memory where there is some with room for the weights twice over, else where temporary files go."""
    needed = 2 * sum(path.stat().st_size for path in model.glob("*.safetensors"))
    if SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK) and shutil.disk_usage(SHARED_MEMORY).free > needed:
        return SHARED_MEMORY
    return Path(tempfile.gettempdir())


def _parts(weights: Iterable[tuple[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    for name, tensor in weights:
        if part and sum(one.nbytes for one in part.values()) + tensor.nbytes > _FILE_BYTES:
            yield part
            part = {}
        # tied weights are one memory under two names, which safetensors refuses
        part[name] = tensor.detach().cpu().contiguous().clone()
    if part:
        yield part
