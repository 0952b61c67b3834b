"""What is said of a run that was cancelled: what is kept of it, and where it goes on."""

from __future__ import annotations

from pathlib import Path

from artifacts import Record, open_store
from flows.cancelled import Answer, in_words
from flows.entries import ENDED_BEFORE
from flows.left import Left

KEY = "ab" * 32


def test_results_checkpoints_and_what_had_not_begun(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    store.shards("cd" * 32).save("0", b"rows")
    stages = {
        "rows": {"state": "cached"},
        "sft": {"state": "ran"},
        "dpo": {"state": "interrupted", "fingerprint": KEY},
        "logps": {"state": "interrupted", "fingerprint": "cd" * 32},
        "never": {"state": "skipped", "reason": "not selected by --until dpo"},
        "scores": {"state": "skipped", "reason": ENDED_BEFORE},
        "after": {"state": "waiting"},
    }
    left = Left.of(store, {"stages": stages})
    said = in_words(Answer("20261129-070809-abcdef", "small", "cancelled", ("dpo", "logps"), left=left))
    assert said == [
        "cancelled: run 20261129-070809-abcdef (small, dpo, logps at work); no process of it is left",
        "kept: rows, sft; dpo had saved nothing yet and begins anew; logps goes on from 1 shard of its rows; "
        "not begun: scores, after",
        "to go on, give the same command again; the next run of its deployment, if any, goes on too",
    ]
    assert Left(("a",), {"b": "step 1,200"}, ()).in_words() == "kept: a; b goes on from step 1,200"


def test_what_was_forced_goes_on_only_without_force(tmp_path: Path) -> None:
    """`--force` clears checkpoints; without it a result of before comes first, where there is one."""
    store = open_store(str(tmp_path / "store"))
    store.shards(KEY).save("0", b"rows")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("x")
    made = store.put("model", tmp_path / "out", producer={"stage": "sft"})
    store.append_record(Record("sft", "cd" * 32, outputs={"model": made}))
    forced = {"state": "interrupted", "reasons": ["forced"], "uses": "sft"}
    stages = {
        "rows": {"state": "ran", "reasons": ["forced"]},
        "dpo": {**forced, "fingerprint": KEY},
        "sft": {**forced, "fingerprint": "cd" * 32},
    }
    said = in_words(Answer("20261129-070809-abcdef", "small", "cancelled", left=Left.of(store, {"stages": stages})))
    assert said[1:] == [
        "kept: rows; dpo goes on from 1 shard of its rows; sft has its result of before, which is taken without "
        "`--force`",
        "to go on, give the same command again without `--force` of rows, dpo, sft, which would begin anew; the next "
        "run of its deployment, if any, goes on too",
    ]
