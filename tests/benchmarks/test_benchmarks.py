"""The engine against the plain loop on every stage, and the benchmark's own arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import ours, plain
from tests.benchmarks.cases import STEPS, Architecture, Case, case_of
from tests.benchmarks.floor import step_flops
from tests.benchmarks.folder import CaseFolder
from tests.benchmarks.growth import slope
from tests.benchmarks.online import require_length
from tests.benchmarks.parity import ParityError, difference, require_parity
from tests.benchmarks.recorder import Recorder
from tests.benchmarks.report import quartiles, summary
from tests.benchmarks.rounds import Measured, Runs
from tests.benchmarks.rows import FIRST_TOKEN, Row, batches, make_rows
from tests.benchmarks.worker import case_from_json, case_to_json, prepare

TINY = Architecture(layers=2, hidden=32, intermediate=48, heads=4, kv_heads=2, head_dim=8)


def tiny_case(stage: str) -> Case:
    return replace(case_of(stage, "P12C6", steps=4), vocabulary=61, architecture=TINY, examples=16)


@pytest.mark.parametrize("stage", [name for name, step in STEPS.items() if not step.samples])
def test_ours_computes_what_the_plain_loop_computes(stage: str, tmp_path: Path) -> None:
    """Losses and gradient norms of every step, log-probabilities of the reference, gradients of the first step."""
    case, folder = tiny_case(stage), CaseFolder(tmp_path)
    prepare(case, folder)
    steps = batches(case, make_rows(case))
    recorded, gradients = [], []
    for make in (lambda: ours.STAGES[stage](case, folder), lambda: plain_step(case, folder)):
        recorder, step = Recorder(), make()
        kept = keep_first_gradients(step) if stage != "reference" else {}
        recorder.begin()
        for rows in steps:
            recorder.done(step(rows))
        recorded.append(recorder.result()["values"])
        gradients.append(kept)
    require_parity("ours", recorded[0], "plain", recorded[1])
    assert recorded[0][0].keys() == ({"logprobs"} if stage == "reference" else {"loss", "grad_norm"})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def plain_step(case: Case, folder: CaseFolder) -> Any:
    return PlainStep(plain.PlainLoop(case, folder), plain.STAGES[case.stage])


class PlainStep:
    """The plain loop as something to call with rows."""

    def __init__(self, loop: plain.PlainLoop, stage: Any) -> None:
        self.loop, self.stage = loop, stage

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        values: dict[str, Any] = self.stage(self.loop, rows)
        return values


def keep_first_gradients(step: Any) -> dict[str, torch.Tensor]:
    """Filled before the first update: parameter name -> gradient, clipped; ours is clipped inside the update."""
    own = isinstance(step, ours.Training)
    model, optimizer = (
        (step.trainer.scorer.model, step.trainer.parallel.optimization.parts[0].optimizer)
        if own
        else (
            step.loop.model,
            step.loop.optimizer,
        )
    )
    kept: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        if not kept:
            divisor = getattr(optimizer, "grad_scale", 1.0)
            kept.update({name: one.grad / divisor for name, one in model.named_parameters()})

    optimizer.register_step_pre_hook(keep)
    return kept


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("sft", 6816),
        ("reference", 2272),
        ("dpo", 7056),
        ("reward", 6096),
        ("grpo", 6816),
        ("distill", 9088),
        ("distill_kept", 7056),
        ("online", 9088),
    ],
)
def test_necessary_operations_by_hand(stage: str, expected: int) -> None:
    """A layer of hidden 4: q, o 4x4 each, k, v 4x2 each, three matrices 4x8: 144 weights, so 288 operations a token.

    Prompt 3, completions 2 and 1: 6 tokens, 1728. Pairs: 6 in the prompt, 2*3+3 and 1*3+1 of the completions: 19,
    times 2 products * 2 operations * 2 heads * 2 sizes = 16: 304. Forward 2032. The head, 4x10 for 3 tokens: 240.
    SFT 3*2032 + 3*240; DPO one product more; the reward model none; distillation a teacher of one layer too,
    or its head; a whole step of GRPO a pass that samples, 2032 + 240, and SFT's.
    """
    case = replace(case_of(stage, "P3C2"), vocabulary=10, architecture=Architecture(1, 4, 8, 2, 1, 2))
    row = Row("r", [3, 4, 5], ([6, 7], [8]), (0.0, 0.0))
    assert step_flops(case, [row]) == expected
    assert step_flops(case, [row, row]) == 2 * expected


def test_whole_steps_have_prompts_and_completions_of_one_length() -> None:
    case = case_of("online", "P20C5")
    rows = make_rows(case)
    assert {(len(row.prompt), *map(len, row.completions)) for row in rows} == {(20, *[5] * 8)}
    assert all({row.row_id for row in step} == {row.row_id for row in rows} for step in batches(case, rows))
    require_length(case, 4.8)
    with pytest.raises(RuntimeError, match=r"4\.7 tokens on average, not 5"):
        require_length(case, 4.7)


def test_rows_are_the_same_everywhere() -> None:
    case = case_of("dpo", "P384C32")
    rows = make_rows(case)
    assert rows == make_rows(case_from_json(json.loads(json.dumps(case_to_json(case)))))
    assert rows != make_rows(replace(case, seed=1))
    assert [(len(row.prompt), *map(len, row.completions)) for row in rows[:3]] == GOLDEN_LENGTHS
    assert all(FIRST_TOKEN <= token < 32_000 for row in rows for token in row.prompt)


GOLDEN_LENGTHS = [(363, 28, 73), (353, 38, 22), (239, 28, 45)]


def test_lengths_have_the_shape_s_means() -> None:
    """Of 2000 rows; the mean of a log-normal of spread 0.6 then has a standard error of 1.3 %."""
    rows = make_rows(replace(case_of("sft", "P40C20"), examples=2000))
    assert sum(len(row.prompt) for row in rows) / 2000 == pytest.approx(40, rel=0.05)
    assert sum(row.completion_tokens for row in rows) / 2000 == pytest.approx(20, rel=0.05)


def test_every_row_is_in_one_step_of_a_round() -> None:
    case = case_of("sft", "P8C8")
    steps = batches(case, make_rows(case))
    assert len(steps) == 10
    assert sorted(row.row_id for rows in steps[:8] for row in rows) == sorted(f"r{index}" for index in range(64))
    assert steps[8:] == steps[:2]


def test_the_gate_stops_on_a_difference_and_on_nan() -> None:
    own = [{"loss": [2.0]}, {"loss": [1.0]}]
    require_parity("ours", own, "plain", [{"loss": [2.0001]}, {"loss": [1.0], "other": [3.0]}])
    assert difference(own, [{"loss": [2.0]}, {"loss": [0.8]}]) == pytest.approx(0.2)
    with pytest.raises(ParityError, match=r"step 2 loss[\s\S]*ours 1, plain 1.01"):
        require_parity("ours", own, "plain", [{"loss": [2.0]}, {"loss": [1.01]}])
    with pytest.raises(ParityError):
        require_parity("ours", own, "plain", [{"loss": [2.0]}, {"loss": [float("nan")]}])


def test_slope_of_a_power() -> None:
    assert slope([1, 2, 4, 8], [3 * size**1.5 for size in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_figures_by_hand() -> None:
    """Two warm-up steps that do not count; rounds whose median steps are 2 and 4 s, and 6 and 6 s for the other."""
    case = case_of("sft", "P128C128")
    runs = {
        "ours": Runs("ours", 2, [run([9, 9, 1, 2, 3], 100), run([9, 9, 4, 4, 4], 300)]),
        "plain": Runs("plain", 2, [run([9, 9, 6, 6, 6], 400), run([9, 9, 6, 7, 6], 400)]),
    }
    rates = {"slow": [10.0, 10.0], "fast": [20.0, 40.0], "oneDNN fast": [60.0, 60.0]}
    found = summary(Measured(case, runs, rates, flops=60.0, tokens=12.0, loads=[0.0, 0.0], versions={}))
    assert found["floor"]["step_seconds"] == 2.0
    assert found["contestants"]["ours"]["step_over_onednn_floor"] == 3.0
    own, other = found["contestants"]["ours"], found["contestants"]["plain"]
    assert (own["step_seconds"], own["tokens_per_second"], own["step_over_floor"]) == (3.0, 4.0, 1.5)
    assert own["working_memory_mib"] == pytest.approx(200 / 2**20)
    assert (other["times_ours_tokens_per_second"], other["times_ours_working_memory"]) == (2.0, 0.5)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0]


def run(seconds: list[float], memory: int) -> dict[str, Any]:
    return {"seconds": seconds, "working_memory": memory, "memory_method": "peak", "values": []}
