"""Stages that train nothing, interrupted and run again: passes of a fixed model over rows, and averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from accelerate.state import AcceleratorState

from stages import averaging
from stages.context import Context, local_context
from tests.stages.interruptions import Killed, assert_same, kill_after, killed_in
from tests.stages.resuming import PAIRS, run, save_inputs
from tests.stages.small_models import output, save_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_inputs(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("rows", [PAIRS, "unpaired_preference", "prompt_completion"])
def test_reference_logprobs(tmp_path: Path, made: dict[str, Path], rows: str) -> None:
    """Killed after two shards."""

    def context(folder: Path) -> Context:
        inputs: dict[str, Any] = {"model": made["model"], "dataset": made[rows]}
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = {"per_token": True, "shard_rows": 1}
        return local_context("reference_logprobs", settings, folder=folder, inputs=inputs)

    whole = run(context(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        run(context(tmp_path / "killed"))
    last = run(context(tmp_path / "killed"))
    assert last.resumed_from == 2
    assert_same(last, whole, "logprobs")


@pytest.mark.parametrize("stage", ["reference_logprobs", "teacher_states"])
@pytest.mark.parametrize(("before", "after"), [(4, 2), (1, 4), (2, 3)])
def test_rows_that_are_cut_another_way(
    tmp_path: Path, made: dict[str, Path], stage: str, before: int, after: int
) -> None:
    """`shard_rows` is no part of the result but for rounding: a piece of another cut is not taken for one of this."""

    def context(folder: Path, rows: int) -> Context:
        inputs: dict[str, Any] = {"model": made["model"], "dataset": made["prompt_completion"]}
        AcceleratorState._reset_state(reset_partial_state=True)
        return local_context(stage, {"shard_rows": rows}, folder=folder, inputs=inputs)

    whole = run(context(tmp_path / "whole", before))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 1)
        run(context(tmp_path / "killed", before))
    last = run(context(tmp_path / "killed", after))
    name = next(iter(last.stage.outputs))
    found, expected = (
        parquet.read_table(next(output(one, name).glob("*.parquet"))).to_pydict() for one in (last, whole)
    )
    assert last.counts == whole.counts and found.keys() == expected.keys() and len(found["row_id"]) >= after
    for column, values in expected.items():
        assert found[column] == (pytest.approx(values, rel=1e-5) if column.endswith("logps") else values)


def test_average(tmp_path: Path, made: dict[str, Path]) -> None:
    """Killed between weights and the rest: it begins anew, over whatever lies there."""
    save_model(tmp_path / "other", seed=2)
    inputs: dict[str, Any] = {"models": [made["model"], tmp_path / "other"]}

    def context(folder: Path) -> Context:
        return local_context("average", {"weights": [2.0, 1.0]}, folder=folder, inputs=inputs)

    whole = run(context(tmp_path / "whole"))
    with killed_in(averaging.shutil, "copyfile", calls=2):
        run(context(tmp_path / "killed"))
    assert_same(run(context(tmp_path / "killed")), whole)
