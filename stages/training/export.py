"""The output of a training stage: a Hugging Face model folder, and what happened on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stages.adapters import CONFIG, ModelSource, model_source, name_for_good
from stages.context import Context
from stages.disk import require_disk
from stages.training.adapters import is_adapted, write_adapter
from stages.training.config import PolicyConfig
from stages.training.dropout import restore_settings
from stages.training.loop import Trained

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")
_OURS = ("config.json", "metrics.jsonl", "steps.jsonl", "ledger.json", "samples.jsonl", "README.md")


def export(
    context: Context,
    trained: Trained,
    ledger: Mapping[str, Any],
    samples: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Write output `model`, or `adapter` where it is not to be merged; what happened on the way goes with it."""
    if not context.is_main:
        return
    config = context.config
    apart = isinstance(config, PolicyConfig) and not config.merge_adapters
    folder = context.output("adapter" if apart else "model")
    (_write_adapter if apart else _write_model)(context, folder, trained.model)
    write_jsonl(folder / "metrics.jsonl", trained.metrics)
    write_jsonl(folder / "steps.jsonl", trained.rows)
    (folder / "ledger.json").write_text(json.dumps(ledger, indent=1), encoding="utf-8")
    if samples := list(samples):
        write_jsonl(folder / "samples.jsonl", samples)


def _write_adapter(context: Context, folder: Path, model: Any) -> None:
    """With the name of its base, and with the tokenizer and chat template that it was trained with."""
    write_adapter(model, folder, name_for_good(context, "model"))
    source = model_source(context, "model")
    copy_settings(source.tokenizer, folder, leave=("config.json", CONFIG))


def _write_model(context: Context, folder: Path, model: Any) -> None:
    """Weights (adapters merged), config, tokenizer and chat template of the input model."""
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    require_disk(folder, int(size * 1.05) + 1_000_000, "the trained model")
    if is_adapted(model):
        write_adapter(model, folder / "adapter", None)
        model = model.merge_and_unload()
    write_merged(model, model_source(context, "model"), folder)


def write_merged(model: Any, source: ModelSource, folder: Path) -> None:
    """A whole model, with all that its source has beside weights."""
    restore_settings(model, source.folder)
    model.save_pretrained(folder)
    copy_settings(source.folder, folder)
    if source.tokenizer != source.folder:
        copy_settings(source.tokenizer, folder, leave=("config.json", CONFIG))
    forget_paths(folder / "config.json")


def copy_settings(source: Path, folder: Path, leave: tuple[str, ...] = ()) -> None:
    """Files of a model that are neither weights nor about how it was made."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name not in (*_OURS, *leave):
            shutil.copyfile(path, folder / path.name)


def forget_paths(config: Path) -> None:
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
