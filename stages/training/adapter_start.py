"""Adapters that start as a part of the weight below them (olora, pissa), which is without that part from then on.

The frozen weight is W - s B0 A0, and what was learnt is s (B A - B0 A0): on the model as it came, an adapter of twice
the rank, of factors [B, -B0] and [A; A0]. So it is written, and who reads it needs to know of no start.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from artifacts.errors import StageError
from stages.adapters import CONFIG, WEIGHTS
from stages.training.processes import Processes

_PLACE = "factors_at_start"


def keep_start(model: Any) -> None:
    """Keep the factors of a peft model that has just been made, for `restated`. Raises StageError where a weight is
    too small for its rank, and for adapters that are no parts of a weight."""
    from peft.utils import get_peft_model_state_dict

    for path, layer in model.named_modules():
        if len(getattr(layer, "lora_embedding_A", ())):
            raise StageError(f"init_lora_weights: {path} is an embedding, which is no product; take another start")
        for name, low in getattr(layer, "lora_A", {}).items():
            rank, found = layer.r[name], min(low.weight.shape[0], layer.lora_B[name].weight.shape[1])
            if found < rank:
                raise StageError(
                    f"init_lora_weights: {path} has a weight of rank {found} at most, and its adapter has {rank}; give "
                    "it less in rank_pattern, or take another start"
                )
    factors = get_peft_model_state_dict(model, save_embedding_layers=False)
    kept = {name: one.detach().cpu().clone() for name, one in factors.items() if ".lora_" in name}
    setattr(model, _PLACE, kept)


class SharedStart:
    """Fresh adapters as the first process made them, in all of them: processors of another kind may find other factors
    of the same weight, or round what is random otherwise, and gradients of the two do not add up."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._factors: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, model: Any) -> Any:
        """The peft model that has just been made, with these; weights that are without the start are so up to rounding.
        The first call is collective; one that is made again gets the same."""
        if self.processes.size == 1:
            return model
        own = {name: one for name, one in model.named_parameters() if ".lora_" in name}
        if not self._factors:
            device = self.processes.device
            told = {name: self.processes.give(one.detach().to(device, copy=True), 0) for name, one in own.items()}
            self._factors = {name: one.cpu() for name, one in told.items()}
        differing: dict[str, list[str]] = {}
        for name, one in own.items():
            if not torch.equal(one.cpu(), self._factors[name]):
                differing.setdefault(name.partition(".lora_")[0], []).append(name)
        moves = has_moved_base(model)
        for path, names in differing.items():  # one by one: what an adapter adds is as large as the weight
            layer = model.get_submodule(path)
            before = _added(layer) if moves else None
            for name in names:
                own[name].copy_(self._factors[name])
            if before is not None:
                weight = layer.get_base_layer().weight
                weight += before - _added(layer)
        if moves and differing:
            keep_start(model)
        return model


def _added(layer: Any) -> Tensor:
    """What the adapter of a layer adds to its weight."""
    added: Tensor = layer.get_delta_weight(next(iter(layer.lora_A)))
    return added


def has_moved_base(model: Any) -> bool:
    """Whether the frozen weights of a peft model are without what its adapters started with."""
    return hasattr(model, _PLACE)


def restated(model: Any, folder: Path) -> None:
    """The folder of such a model's adapter, of the weights as they came."""
    start = getattr(model, _PLACE)
    tensors = load_file(folder / WEIGHTS)
    for name, now in tensors.items():
        if name.endswith(".lora_A.weight"):
            tensors[name] = torch.cat([now, start[name].to(now.dtype)], dim=0)
        elif name.endswith(".lora_B.weight"):
            tensors[name] = torch.cat([now, -start[name].to(now.dtype)], dim=1)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    more = math.sqrt(2) if values["use_rslora"] else 2  # what keeps the scale
    values |= {"r": 2 * values["r"], "lora_alpha": more * values["lora_alpha"]}
    values["rank_pattern"] = {name: 2 * rank for name, rank in values["rank_pattern"].items()}
    values["alpha_pattern"] = {name: more * alpha for name, alpha in values["alpha_pattern"].items()}
    (folder / CONFIG).write_text(json.dumps(values), encoding="utf-8")
