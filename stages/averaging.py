"""Weighted means of model folders, one file of weights at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from artifacts.errors import StageError
from stages.training.model_check import check_model_folder, weight_files

_LEFT = ("metrics.jsonl", "steps.jsonl", "ledger.json", "samples.jsonl", "README.md")
"""What tells how one model was made, and not how the mean was."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_SPECIFIC = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Settings in which models of one architecture may differ."""


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights divided by their sum. Raises StageError for another number of them."""
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise StageError(f"weights has {len(weights)} numbers for {count} models")
    return [weight / sum(weights) for weight in weights]


def kind_of(folder: Path) -> str:
    """`reward_model` for a sequence classifier, else `model`."""
    architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ()
    return "reward_model" if any(name.endswith("ForSequenceClassification") for name in architectures) else "model"


def average_folders(folders: Sequence[Path], shares: Sequence[float], target: Path) -> None:
    """Write the mean's weights into `target`, in files as the first model has them, each tensor in the first's type.

    Sums are float64. Raises StageError where a folder is no sound model, or tensors or tokenizers differ.
    """
    for folder in folders:
        check_model_folder(folder)
    _require_equal(folders, _configuration, "configurations; a mean needs one architecture")
    _require_equal(folders, _vocabulary, "tokenizers; their tokens mean different text")
    where = [_tensors(folder) for folder in folders]
    _require_equal_tensors(where)
    for path in weight_files(folders[0]):
        mean = {name: _mean(name, where, shares) for name, held in where[0].items() if held == path}
        save_file(mean, target / path.name, metadata={"format": "pt"})


def copy_rest(folder: Path, target: Path) -> None:
    """Everything of a model folder but its weights and its history."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name not in _LEFT:
            shutil.copyfile(path, target / path.name)


def _tensors(folder: Path) -> dict[str, Path]:
    """Name -> file."""
    return {name: path for path in weight_files(folder) for name in _open(path).keys()}  # noqa: SIM118 - no mapping


def _open(path: Path) -> safe_open:
    return safe_open(path, framework="pt")


def _mean(name: str, where: Sequence[Mapping[str, Path]], shares: Sequence[float]) -> Tensor:
    total: Tensor | None = None
    kind = torch.float32
    for files, share in zip(where, shares, strict=True):
        tensor = _open(files[name]).get_tensor(name)
        if not bool(torch.isfinite(tensor).all()):
            raise StageError(f"model folder {files[name].parent.name}: weight {name} is not finite")
        if not tensor.is_floating_point():  # a table of positions or the like
            _require_same(name, tensor, total)
            total, kind = tensor, tensor.dtype
        elif total is None:
            total, kind = tensor.double() * share, tensor.dtype
        else:
            total += tensor.double() * share
    assert total is not None
    return total.to(kind).contiguous()


def _require_same(name: str, tensor: Tensor, before: Tensor | None) -> None:
    if before is not None and not torch.equal(tensor, before):
        raise StageError(f"weight {name} holds whole numbers that differ between the models; they have no mean")


def _require_equal_tensors(where: Sequence[Mapping[str, Path]]) -> None:
    first = where[0]
    for number, files in enumerate(where[1:], start=2):
        if different := sorted(first.keys() ^ files.keys()):
            raise StageError(f"models 1 and {number} have different weights; only one of them has {different[0]}")
        for name in first:
            one, other = (_open(held[name]).get_slice(name).get_shape() for held in (first, files))
            if one != other:
                raise StageError(
                    f"weight {name} has shape {one} in model 1 and {other} in model {number}; a mean needs one shape"
                )


def _require_equal(folders: Sequence[Path], read: Callable[[Path], object], what: str) -> None:
    first = read(folders[0])
    for number, folder in enumerate(folders[1:], start=2):
        if read(folder) != first:
            raise StageError(f"models 1 and {number} have different {what}")


def _configuration(folder: Path) -> object:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in values.items() if name not in _SPECIFIC}


def _vocabulary(folder: Path) -> object:
    """Tokens and their ids; of a slow tokenizer the bytes of its files."""
    path = folder / "tokenizer.json"
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        return values["model"], values.get("added_tokens")
    files = (folder / name for name in ("tokenizer.model", "vocab.json", "merges.txt"))
    return [file.read_bytes() for file in files if file.is_file()]
