"""Means and other merges of model folders, one file of weights at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


def kind_of(folder: Path) -> str:
    """`reward_model` for a sequence classifier, else `model`."""
    architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ()
    return "reward_model" if any(name.endswith("ForSequenceClassification") for name in architectures) else "model"


@dataclass(frozen=True)
class Models:
    """The weights of models of one form, by number and name, read when they are asked for; a base is the last one."""

    where: Sequence[Mapping[str, Path]]
    """Of every model, name -> file."""

    @classmethod
    def of(cls, folders: Sequence[Path], base: Path | None = None) -> Models:
        """Raises StageError where a folder is no sound model, or architectures, tensors or tokenizers differ."""
        every = [*folders, *([] if base is None else [base])]
        for folder in every:
            check_model_folder(folder)
        others = [f"model {number}" for number in range(2, len(folders) + 1)]
        others += [] if base is None else ["input base"]
        _require_equal(every, others, _configuration, "configurations; a mean needs one architecture")
        _require_equal(every, others, _vocabulary, "tokenizers; their tokens mean different text")
        where = [_tensors(folder) for folder in every]
        _require_equal_tensors(where, others)
        return cls(where)

    def tensor(self, number: int, name: str) -> Tensor:
        """As it is kept. Raises StageError where it is not finite."""
        path = self.where[number][name]
        tensor: Tensor = _open(path).get_tensor(name)
        if not bool(torch.isfinite(tensor).all()):
            raise StageError(f"model folder {path.parent.name}: weight {name} is not finite")
        return tensor

    def difference(self, number: int, name: str) -> Tensor:
        """Of a model from the base, in float64."""
        return self.tensor(number, name).double() - self.tensor(-1, name).double()


Merge = Callable[[str], Tensor]
"""The name of a tensor of real numbers -> the merged tensor, in float64."""


def merge_folders(models: Models, merge: Merge, target: Path) -> None:
    """Write the merged weights into `target`, in files as the first model has them, each tensor in the first's type.

    Whole numbers (a table of positions or the like) must be equal. Raises StageError where a weight has no merge.
    """
    for path in sorted(set(models.where[0].values())):
        names = [name for name, held in models.where[0].items() if held == path]
        save_file({name: _merged(models, merge, name) for name in names}, target / path.name, metadata={"format": "pt"})


def _merged(models: Models, merge: Merge, name: str) -> Tensor:
    first = models.tensor(0, name)
    if first.is_floating_point():
        merged = merge(name).to(first.dtype).contiguous()
        if not bool(torch.isfinite(merged).all()):
            raise StageError(
                f"weight {name}: the merge has numbers that {first.dtype} does not hold; give a smaller scale, or "
                "smaller weights"
            )
        return merged
    for number in range(1, len(models.where)):
        if not torch.equal(models.tensor(number, name), first):
            raise StageError(f"weight {name} holds whole numbers that differ between the models; they have no mean")
    return first.contiguous()


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


def _require_equal_tensors(where: Sequence[Mapping[str, Path]], others: Sequence[str]) -> None:
    """`others`: what to call them."""
    first = where[0]
    for other, files in zip(others, where[1:], strict=True):
        if different := sorted(first.keys() ^ files.keys()):
            raise StageError(f"model 1 and {other} have different weights; only one of them has {different[0]}")
        for name in first:
            shapes = [_open(held[name]).get_slice(name).get_shape() for held in (first, files)]
            if shapes[0] != shapes[1]:
                raise StageError(
                    f"weight {name} has shape {shapes[0]} in model 1 and {shapes[1]} in {other}; a mean needs one shape"
                )


def _require_equal(folders: Sequence[Path], others: Sequence[str], read: Callable[[Path], object], what: str) -> None:
    first = read(folders[0])
    for other, folder in zip(others, folders[1:], strict=True):
        if read(folder) != first:
            raise StageError(f"model 1 and {other} have different {what}")


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
