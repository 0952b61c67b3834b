"""What training stages have left that gave no model: metrics and completions up to where they failed or were killed.

From the stage's job folder on this machine, else from the store's work in progress, which another run of the same
stage may have taken further.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from artifacts.digest import is_sha256
from artifacts.errors import DamagedError, MissingError, PosttrainError
from flows.entries import BROKEN
from flows.reporting.reading import MAX_FILE_BYTES, Reader
from stages.stage import STAGES, load_stage
from stages.training.config import TrainingConfig
from stages.training.metrics_log import METRICS, PROGRESS, ROLLOUTS

_NOT_READ = frozenset({"prompt_ids", "token_ids", "logprobs", "free_logprobs", "loss_mask", "weight_versions"})
"""Columns of rollouts with a number a token."""


@dataclass(frozen=True)
class Unfinished:
    """A stage's metrics so far, one row a step. `words`: how far they reach; `error` is empty while it is at work."""

    stage: str
    rows: tuple[dict[str, Any], ...]
    words: str
    error: str


def is_unfinished(entry: Mapping[str, Any]) -> bool:
    """Whether it is a training stage that was at work and gave nothing (yet)."""
    uses = str(entry["uses"])
    if entry["state"] not in (*BROKEN, "running") or uses not in STAGES:
        return False
    return issubclass(load_stage(uses).config, TrainingConfig)


def metrics_so_far(
    run: Mapping[str, Any], stage: str, entry: Mapping[str, Any], reader: Reader, limit: int
) -> Unfinished:
    """At most `limit` steps of an unfinished stage of a run; no rows where nothing was kept, which `words` say."""
    rows, source = _logged(str(run["run"]), stage, reader, limit), "its job folder"
    if not rows:
        rows, source = _saved(stage, entry, reader)[:limit], "its last checkpoint in the store"
    state = "at work" if entry["state"] == "running" else str(entry["state"])
    if rows:
        words = f"{state}: an unfinished stage, whose curves end with step {rows[-1].get('step', len(rows))}, "
        words += f"the last in {source}"
    else:
        words = f"{state}: no metrics of it were kept, neither in its job folder on this machine nor in a checkpoint"
    return Unfinished(stage, tuple(rows), words, str(entry.get("error") or ""))


def completions_so_far(stage: str, entry: Mapping[str, Any], reader: Reader) -> list[dict[str, Any]]:
    """The generation of completions that an unfinished stage recorded last; noted where it should have and there are
    none."""
    if not is_unfinished(entry) or "rollouts" not in load_stage(str(entry["uses"])).outputs:
        return []
    found = _recorded(stage, entry, reader)
    if not found:
        reader.note(f"{stage}: {entry['state']}, and the store holds no completions that it sampled")
    return found


def _logged(run_id: str, stage: str, reader: Reader, limit: int) -> list[dict[str, Any]]:
    scratch = reader.store.scratch
    path = scratch / run_id / stage / METRICS
    if path.parent.parent.parent != scratch or ".." in (run_id, stage) or not path.is_file():
        return []  # names come from the store
    try:
        with open(path, "rb") as file:
            return list(reader.objects(file, METRICS, stage, limit))
    except OSError as error:
        reader.note(f"{stage}: {METRICS} of its job folder cannot be read: {error.strerror}")
        return []


def _saved(stage: str, entry: Mapping[str, Any], reader: Reader) -> list[dict[str, Any]]:
    fingerprint = str(entry.get("fingerprint"))
    if not is_sha256(fingerprint):
        return []
    try:
        found = reader.store.checkpoints(fingerprint).newest_file(PROGRESS, MAX_FILE_BYTES)
        rows = [] if found is None else json.loads(found[1])["metrics"]
    except (PosttrainError, ValueError, KeyError, TypeError) as error:
        reader.note(f"{stage}: its last checkpoint cannot be read: {error}")
        return []
    return [row for row in rows if isinstance(row, dict)]


def _recorded(stage: str, entry: Mapping[str, Any], reader: Reader) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    fingerprint = str(entry.get("fingerprint"))
    if not is_sha256(fingerprint):
        return []
    try:
        shards = reader.store.shards(fingerprint)
        for name in sorted((name for name in shards.names() if name.startswith(ROLLOUTS)), reverse=True):
            try:
                file = ParquetFile(BytesIO(shards.load(name)))
            except (DamagedError, MissingError) as error:
                reader.note(f"{stage}: {error}")
                continue
            columns = [column for column in file.schema_arrow.names if column not in _NOT_READ]
            rows: list[dict[str, Any]] = file.read(columns=columns, use_threads=False).to_pylist()
            return rows
    except (PosttrainError, pyarrow.ArrowException) as error:
        reader.note(f"{stage}: the completions that it recorded cannot be read: {error}")
    return []
