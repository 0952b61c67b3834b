"""What earlier attempts at a stage took: from the times of the files in their job folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

from flows.attempts import earlier_seconds


def attempt(scratch: Path, run: str, began: float, fingerprint: str = "f", **signs: float) -> Path:
    """A job folder whose spec was written at `began`, and other files so many seconds later."""
    job = scratch / run / "sft"
    job.mkdir(parents=True)
    (job / "spec.json").write_text(json.dumps({"fingerprint": fingerprint}))
    for name, after in {"spec.json": 0.0, **{key.replace("_", "."): value for key, value in signs.items()}}.items():
        (job / name).touch()
        os.utime(job / name, (began + after, began + after))
    return job


def test_the_attempts_since_the_last_result_are_summed(tmp_path: Path) -> None:
    attempt(tmp_path, "before", 1000.0, events_jsonl=50.0)
    attempt(tmp_path, "whole", 2000.0, log_txt=60.0, result_json=61.0)
    attempt(tmp_path, "killed", 3000.0, events_jsonl=10.0, log_txt=7.0)
    attempt(tmp_path, "failed", 4000.0, events_jsonl=1.0, exit_json=2.5)
    attempt(tmp_path, "another", 5000.0, fingerprint="g", events_jsonl=70.0)
    mine = attempt(tmp_path, "mine", 6000.0, events_jsonl=80.0)
    assert sum(earlier_seconds(tmp_path, "f", mine)) == 10.0 + 2.5
    assert earlier_seconds(tmp_path, "g", mine) == [70.0]


def test_nothing_is_known_of_another_machines_attempts(tmp_path: Path) -> None:
    mine = attempt(tmp_path, "mine", 6000.0)
    (tmp_path / "torn" / "sft").mkdir(parents=True)
    (tmp_path / "torn" / "sft" / "spec.json").write_text("{")
    assert earlier_seconds(tmp_path, "f", mine) == []
