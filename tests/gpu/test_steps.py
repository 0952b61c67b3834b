"""Steps of every stage on the GPU against the plain loop, and against themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.cases import Case, case_of
from tests.benchmarks.folder import CaseFolder
from tests.benchmarks.ours import run as run_ours
from tests.benchmarks.parity import BF16_TOLERANCE, TOLERANCE, require_parity
from tests.benchmarks.plain import run as run_plain
from tests.benchmarks.recorder import Recorder
from tests.benchmarks.rows import batches, make_rows
from tests.benchmarks.worker import prepare

STAGES = ("sft", "reference", "dpo", "reward", "grpo", "distill")


def case_for(stage: str, **precision: Any) -> Case:
    return replace(case_of(stage, "P96C24", vocabulary=4096, model="XS", group_size=None, steps=4), **precision)


def values(run: Any, case: Case, folder: Path) -> Any:
    recorder = Recorder()
    run(case, batches(case, make_rows(case)), CaseFolder(folder), recorder)
    return recorder.result()["values"]


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, TOLERANCE), (True, BF16_TOLERANCE)])
@pytest.mark.parametrize("stage", STAGES)
def test_numbers_are_those_of_the_plain_loop_and_the_same_again(
    stage: str, bf16: bool, tolerance: float, tmp_path: Path
) -> None:
    case = case_for(stage, bf16=bf16)
    prepare(case, CaseFolder(tmp_path))
    ours = values(run_ours, case, tmp_path)
    require_parity("ours", ours, "plain", values(run_plain, case, tmp_path), tolerance)
    assert values(run_ours, case, tmp_path) == ours


@pytest.mark.parametrize("precision", [{"checkpointing": True}, {"lora_r": 8}])
def test_checkpointing_and_adapters(precision: dict[str, Any], tmp_path: Path) -> None:
    case = case_for("sft", bf16=True, **precision)
    prepare(case, CaseFolder(tmp_path))
    ours, plain = (values(run, case, tmp_path) for run in (run_ours, run_plain))
    losses = [[{"loss": row["loss"]} for row in one] for one in (ours, plain)]
    require_parity("ours", losses[0], "plain", losses[1], BF16_TOLERANCE)
