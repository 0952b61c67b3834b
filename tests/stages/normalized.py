"""Runs the stage `normalize` on files that a test writes, and reads what it made."""

import json
from pathlib import Path
from typing import Any

from artifacts.digest import canonical_json, sha256_bytes
from stages.context import local_context
from stages.data import Dataset, read_dataset


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class Normalized:
    """One run: `train` and `test` datasets, their ledgers and descriptions."""

    def __init__(self, folder: Path, source: Any, **config: Any) -> None:
        given = source if isinstance(source, dict) else {"path": str(source)}
        self.context = local_context("normalize", {"source": given, **config}, folder=folder)
        self.context.stage.run(self.context)
        self.out = folder / "job" / "out"

    def dataset(self, name: str = "train") -> Dataset:
        return read_dataset(self.out / name)

    def rows(self, name: str = "train", *, ids: bool = False) -> list[dict[str, Any]]:
        rows = list(self.dataset(name))
        return rows if ids else [{key: row[key] for key in row if key != "row_id"} for row in rows]

    def ledger(self, name: str = "train") -> dict[str, Any]:
        ledger = json.loads((self.out / name / "ledger.json").read_bytes())
        assert sum(ledger["states"].values()) == ledger["input"]
        return ledger

    def logged(self) -> list[str]:
        """The lines of the log, in their order."""
        events = (self.out.parent / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [event["text"] for event in map(json.loads, events) if event["kind"] == "log"]

    def digest(self, name: str = "train") -> str:
        """Of the rows, not of Parquet's bytes, which are the library's business."""
        return sha256_bytes(canonical_json(list(self.dataset(name))))


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}
