"""A model folder is checked before and after a loader sees it: regular files, plain safetensors, all weights finite.

Needed because transformers takes a missing weight (random numbers in its place), a weight map that leads out of
the folder, and NaN weights without an error.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from artifacts.errors import StageError

_INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit of a header."""
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits of a value of each type that safetensors knows."""


def load_checked(library: Any, folder: Path, **settings: Any) -> tuple[Any, Mapping[str, Any]]:
    """A model of a transformers Auto class in float32, and what its loader says of the weights (`check_loaded`).

    Raises StageError where the folder should not be loaded, or cannot be.
    """
    import torch

    check_model_folder(folder)
    try:
        loaded: tuple[Any, Mapping[str, Any]] = library.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told of instead, and refused by `check_loaded`, which names them
            **settings,
        )
    except (MemoryError, torch.OutOfMemoryError, StageError):
        raise
    except Exception as error:  # of whatever kind the folder's values bring about
        raise StageError(f"model folder {folder.name} cannot be loaded: {type(error).__name__}: {error}") from error
    return loaded


def check_model_folder(folder: Path) -> None:
    """Raises StageError for a folder that no loader should see, naming the file."""
    check_regular_files(folder, "model")
    if not (folder / "config.json").is_file():
        raise StageError(f"model folder {folder}: no config.json; is this a Hugging Face model folder?")
    check_no_code(folder)
    _require_full_precision(folder)
    shards = weight_files(folder)
    if not shards:
        raise StageError(
            f"model folder {folder}: no weights (model.safetensors or {_INDEX}); found: "
            f"{', '.join(sorted(path.name for path in folder.iterdir()))}"
        )
    for shard in shards:
        check_weight_file(shard)


def check_no_code(folder: Path) -> None:
    """Raises StageError for a folder that asks its loader to run code that it brings."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file() and "auto_map" in _read_json(folder / name):
            raise StageError(f"model folder {folder.name}: {name} asks to run code of its own (auto_map); refused")


def _require_full_precision(folder: Path) -> None:
    found = _read_json(folder / "config.json").get("quantization_config")
    if isinstance(found, dict) and found.get("quant_method") == "bitsandbytes":
        raise StageError(
            f"model folder {folder.name}: its weights are quantized already (config.json: quantization_config), and "
            "what is trained is merged into full ones; take the model that it was made of, with quantization nf4, fp4 "
            "or int8 here"
        )


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
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StageError(f"model folder {folder.name}: {_INDEX} has no weight_map from tensors to files")
    names = sorted({str(name) for name in weight_map.values()})
    there = {path.name for path in folder.iterdir() if path.is_file()}
    for name in names:
        if name not in there:
            raise StageError(f"model folder {folder.name}: {_INDEX} names {name!r}, which is no file of the folder")
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StageError(f"{path.name} of the model is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise StageError(f"{path.name} of the model is no JSON object")
    return values


def check_weight_file(path: Path) -> None:
    """Raises StageError unless the header's tensors, each as long as its shape says, tile the file exactly."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= size - 8:
            raise StageError(f"{path.name} is no safetensors file, or is cut off ({size} bytes)")
        if length > MAX_HEADER_BYTES:
            raise StageError(f"{path.name}: a safetensors header of {length} bytes; {MAX_HEADER_BYTES} is the most")
        spans = sorted(_span(path.name, *entry) for entry in _tensors(path.name, file.read(length)))
    end = 0
    for begin, stop in spans:
        if begin != end:
            raise StageError(f"{path.name}: its tensors overlap or leave a gap at byte {end}")
        end = stop
    if end != size - 8 - length:
        raise StageError(f"{path.name}: {size - 8 - length} bytes of weights where its header says {end}")


def _tensors(name: str, header: bytes) -> list[tuple[str, Any]]:
    """(name, description) of each tensor that a safetensors header lists."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a key occurs twice")
        return values

    try:
        entries = json.loads(header, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise StageError(f"{name}: its safetensors header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise StageError(f"{name}: its safetensors header is no JSON object")
    return [entry for entry in entries.items() if entry[0] != "__metadata__"]


def _span(file: str, name: str, entry: Any) -> tuple[int, int]:
    """First byte and end of a tensor, from its description in the header."""
    found = entry if isinstance(entry, dict) else {}
    bits, shape, offsets = _BITS.get(str(found.get("dtype"))), found.get("shape"), found.get("data_offsets")
    if bits is None or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise StageError(f"{file}: tensor {name!r} is described by {str(entry)[:100]}; no dtype, shape and offsets")
    begin, stop = offsets
    if (stop - begin) * 8 != math.prod(shape) * bits:
        raise StageError(f"{file}: tensor {name!r} of shape {shape} and {found['dtype']} has {stop - begin} bytes")
    return begin, stop


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(entry) is int and entry >= 0 for entry in value)


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
        _require_finite(folder, name, parameter)


def check_finite(folder: Path) -> None:
    """Raises StageError for a weight in a model folder's files that is not finite; one tensor at a time is read."""
    from safetensors import safe_open

    for path in weight_files(folder):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118, which is no mapping
                _require_finite(folder, name, shard.get_tensor(name).float())


def _require_finite(folder: Path, name: str, values: Any) -> None:
    if bad := int((~values.isfinite()).sum()):
        raise StageError(f"model folder {folder.name}: {bad} of {values.numel()} values of {name} are not finite")
