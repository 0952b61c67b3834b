"""Sharded work over several processes."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from artifacts import Shards
from stages.context import Context, local_context
from stages.shards import in_shards
from tests.stages.small_models import save_dataset, save_model


def test_processes_share_the_shards_and_all_get_all_rows(tmp_path: Path) -> None:
    save_model(tmp_path / "model", seed=1)
    data = save_dataset(tmp_path / "data", "prompt", [{"prompt": "a"}])
    inputs: dict[str, Any] = {"model": tmp_path / "model", "dataset": data}
    barrier, worked, results = threading.Barrier(3), [[], [], []], [None] * 3

    def work(rank: int) -> None:
        local = local_context("evaluate", {}, folder=tmp_path / "run", inputs=inputs)
        context = Context(local.spec, local.store, rank=rank)
        process: Any = SimpleNamespace(process_index=rank, num_processes=3, wait_for_everyone=barrier.wait)

        def square(part: Any) -> list[dict[str, int]]:
            worked[rank] += list(part)
            return [{"square": number**2} for number in part]

        results[rank] = in_shards(context, process, "squares", range(20), square, size=3)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[{"square": number**2} for number in range(20)]] * 3
    assert worked == [[0, 1, 2, 9, 10, 11, 18, 19], [3, 4, 5, 12, 13, 14], [6, 7, 8, 15, 16, 17]]


def test_a_shard_that_is_listed_and_gone_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model", seed=1)
    data = save_dataset(tmp_path / "data", "prompt", [{"prompt": "a"}])
    context = local_context("evaluate", {}, folder=tmp_path, inputs={"model": tmp_path / "model", "dataset": data})
    monkeypatch.setattr(Shards, "names", lambda self: {"squares-00000000-00000001"})
    process: Any = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)
    rows = in_shards(context, process, "squares", [3], lambda part: [{"square": one**2} for one in part], size=1)
    assert rows == [{"square": 9}] and context.resumed_from is None
