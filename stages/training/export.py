"""The output of a training stage: a Hugging Face model folder, and what happened on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stages.context import Context, require_disk
from stages.training.loop import Trained

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")
_OURS = ("config.json", "metrics.jsonl", "steps.jsonl", "ledger.json", "samples.jsonl", "README.md")


def export(
    context: Context,
    trained: Trained,
    source: Path,
    ledger: Mapping[str, Any],
    samples: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Write output `model`: weights (adapters merged), config, tokenizer and chat template of the input model."""
    if not context.is_main:
        return
    folder = context.output("model")
    model = trained.model
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    require_disk(folder, int(size * 1.05) + 1_000_000, "the trained model")
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / "adapter")
        _forget_paths(folder / "adapter" / "adapter_config.json")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name not in _OURS:
            shutil.copyfile(path, folder / path.name)
    _forget_paths(folder / "config.json")
    write_jsonl(folder / "metrics.jsonl", trained.metrics)
    write_jsonl(folder / "steps.jsonl", trained.rows)
    (folder / "ledger.json").write_text(json.dumps(ledger, indent=1), encoding="utf-8")
    if samples := list(samples):
        write_jsonl(folder / "samples.jsonl", samples)


def _forget_paths(config: Path) -> None:
    """Where the model was loaded from is no part of what it is."""
    values = json.loads(config.read_text(encoding="utf-8"))
    for key in ("_name_or_path", "base_model_name_or_path"):
        if key in values:
            values[key] = None
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
