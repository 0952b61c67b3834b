"""The adapter that vLLM applies to the weights that it was opened with: given as a folder, which it reads at once.

One under the number of another before it (`load_inplace`) is read from its folder again at every step of requests that
say so, also when other files are there by then; none of ours does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from artifacts.errors import StageError
from stages.adapters import CONFIG, WEIGHTS
from stages.rollouts.engine import ADAPTER_NAME, ServedAdapter

_ID = 1
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM makes room for."""


def room_for(adapter: ServedAdapter) -> dict[str, Any]:
    """Arguments of vLLM's engine for one adapter at a time."""
    rank = next(rank for rank in _RANKS if rank >= adapter.rank)
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_cpu_loras": 1,
        "max_lora_rank": rank,
        "lora_target_modules": adapter.settings["target_modules"],  # or it wraps the head, and cannot score prompts
    }


def options_for(adapter: ServedAdapter) -> list[str]:
    """The same for a server."""
    found: list[str] = []
    for name, value in room_for(adapter).items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        found += [f"--{name.replace('_', '-')}", *map(str, values)]
    return found


def give_adapter(llm: Any, adapter: ServedAdapter, weights: Iterable[tuple[str, Tensor]]) -> Any:
    """Have vLLM take the adapter's weights in the place of those before; returns what requests name it by.

    Raises StageError where vLLM does not.
    """
    from vllm.lora.request import LoRARequest

    with TemporaryDirectory(prefix="posttrain-adapter-") as name:
        write_adapter_folder(Path(name), adapter, weights)
        try:
            taken = llm.llm_engine.add_lora(LoRARequest(ADAPTER_NAME, _ID, name, load_inplace=True))
        except (ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
            raise StageError(
                f"vLLM does not apply this adapter: {error}; set rollouts.lora_sync to merged, or change "
                "lora_target_modules"
            ) from error
        if not taken:
            raise StageError("vLLM did not take the adapter; set rollouts.lora_sync to merged")
        return LoRARequest(ADAPTER_NAME, _ID, name)


def write_adapter_folder(folder: Path, adapter: ServedAdapter, weights: Iterable[tuple[str, Tensor]]) -> None:
    """In peft's format."""
    (folder / CONFIG).write_text(json.dumps(dict(adapter.settings)), encoding="utf-8")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights}, folder / WEIGHTS)
