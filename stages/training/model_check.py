"""A model folder is checked before and after a loader sees it: regular files, plain safetensors, all weights finite.

Needed because transformers takes a missing weight (random numbers in its place), a weight map that leads out of
the folder, and NaN weights without an error.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from artifacts.errors import StageError

_INDEX = "model.safetensors.index.json"


def check_model_folder(folder: Path) -> None:
    """Raises StageError for a folder that no loader should see, naming the file."""
    check_regular_files(folder, "model")
    if not (folder / "config.json").is_file():
        raise StageError(f"model folder {folder}: no config.json; is this a Hugging Face model folder?")
    if "auto_map" in _read_json(folder / "config.json"):
        raise StageError(f"model folder {folder.name}: config.json asks to run code of its own (auto_map); refused")
    shards = weight_files(folder)
    if not shards:
        raise StageError(
            f"model folder {folder}: no weights (model.safetensors or {_INDEX}); found: "
            f"{', '.join(sorted(path.name for path in folder.iterdir()))}"
        )
    for shard in shards:
        check_weight_file(shard)


def check_regular_files(folder: Path, what: str) -> None:
    """Raises StageError for a link or a pipe in the folder of a `what`."""
    for path in folder.rglob("*"):
        if path.is_symlink() and not _stays_inside_hub_cache(path, folder):
            raise StageError(f"{what} folder {folder.name}: {path.name} is a link; a {what} is regular files only")
        if not (path.is_file() or path.is_dir()):
            raise StageError(f"{what} folder {folder.name}: {path.name} is no regular file")


def _stays_inside_hub_cache(path: Path, folder: Path) -> bool:
    """The Hub's cache keeps snapshots as links into the `blobs` folder of the same repository."""
    return path.resolve().parent == (folder.parent.parent / "blobs").resolve()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; none where it has no weights."""
    single, index = folder / "model.safetensors", folder / _INDEX
    if not index.is_file():
        return [single] if single.is_file() else []
    names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise StageError(f"model folder {folder.name}: {_INDEX} names {name!r}, which is no file of the folder")
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StageError(f"{path.name} of the model is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise StageError(f"{path.name} of the model is no JSON object")
    return values


def check_weight_file(path: Path) -> None:
    """Offsets of the header must tile the file exactly (the format's own rule)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= size - 8:
            raise StageError(f"{path.name} is no safetensors file, or is cut off ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise StageError(f"{path.name}: its safetensors header is not JSON: {error}") from error
    spans = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    end = 0
    for begin, stop in spans:
        if begin != end:
            raise StageError(f"{path.name}: its tensors overlap or leave a gap at byte {end}")
        end = stop
    if end != size - 8 - length:
        raise StageError(f"{path.name}: {size - 8 - length} bytes of weights where its header says {end}")


def check_loaded(
    folder: Path,
    model: Any,
    info: Mapping[str, Any],
    *,
    expected_missing: Sequence[str] = (),
    expected_extra: Sequence[str] = (),
) -> None:
    """Raises StageError when the loader found weights missing, extra or misshapen, or when one is not finite."""
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(tuple(expected_missing)))
    extra = sorted(key for key in info["unexpected_keys"] if not key.startswith(tuple(expected_extra)))
    misshapen = sorted(str(entry) for entry in info["mismatched_keys"])
    for what, names in (("lacks", missing), ("has extra", extra), ("has misshapen", misshapen)):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise StageError(f"model folder {folder.name} {what} weights for {type(model).__name__}: {shown}")
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            bad = int((~parameter.isfinite()).sum())
            raise StageError(
                f"model folder {folder.name}: {bad} of {parameter.numel()} values of {name} are not finite"
            )
