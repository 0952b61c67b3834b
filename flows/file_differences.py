"""How the files of two artifacts differ, in words: the first line, the tensors and by how much."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from artifacts import Manifest, Store
from flows.reporting.text import number


def differing_files(old_store: Store, old: Manifest, new_store: Store, new: Manifest) -> dict[str, str]:
    """Path -> what differs, of two artifacts of one kind; empty where all files are equal."""
    before, after = ({file.path: file.sha256 for file in manifest.files} for manifest in (old, new))
    paths = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
    if not paths:
        return {}
    folders = old_store.materialize(old.artifact), new_store.materialize(new.artifact)
    return {path: _words(path, *folders, path in before, path in after) for path in paths}


def _words(path: str, old: Path, new: Path, was: bool, is_there: bool) -> str:
    if not was or not is_there:
        return "is new" if is_there else "is not there any more"
    compare = {".jsonl": _lines, ".json": _json, ".safetensors": _tensors}.get(Path(path).suffix, _bytes)
    return compare(old / path, new / path)


def _bytes(old: Path, new: Path) -> str:
    sizes = old.stat().st_size, new.stat().st_size
    return "other bytes" if sizes[0] == sizes[1] else f"{sizes[0]:,} bytes -> {sizes[1]:,} bytes"


def _json(old: Path, new: Path) -> str:
    found = list(_values(json.loads(old.read_bytes()), json.loads(new.read_bytes())))
    return f"{'; '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''}" or "written otherwise"


def _lines(old: Path, new: Path) -> str:
    """The first line that differs, and in what."""
    with open(old, encoding="utf-8") as before, open(new, encoding="utf-8") as after:
        for index, (was, now) in enumerate(zip(before, after, strict=False), start=1):
            if was != now:
                found = list(_values(json.loads(was), json.loads(now)))
                return f"from line {index}: {'; '.join(found[:3]) or 'written otherwise'}"
    return "has more or fewer lines"


def _values(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _values(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    elif old != new:
        short = [text if len(text) <= 40 else f"{text[:37]}..." for text in (json.dumps(old), json.dumps(new))]
        yield f"{name or 'value'} {short[0]} -> {short[1]}"


def _tensors(old: Path, new: Path) -> str:
    """How many tensors differ, and the largest difference of a number."""
    from safetensors import safe_open

    differ, names, largest = 0, [], 0.0
    with safe_open(old, "np") as before, safe_open(new, "np") as after:
        if set(before.keys()) != set(after.keys()):
            return "holds other tensors"
        for name in before.keys():  # noqa: SIM118 (no mapping)
            try:
                was, now = before.get_tensor(name), after.get_tensor(name)
            except TypeError:  # numpy has no bfloat16
                return "other weights"
            if was.shape != now.shape:
                return f"{name} has shape {list(now.shape)} instead of {list(was.shape)}"
            names.append(name)
            if (was != now).any():
                differ += 1
                largest = max(largest, float(abs(was.astype("float64") - now.astype("float64")).max()))
    if not differ:
        return "equal tensors, written otherwise"
    return f"{differ} of {len(names)} tensors differ, by at most {number(largest)}"
