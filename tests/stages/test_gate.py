"""The stage `gate` in real runs: what it hands on, what it stops, and what it will not compare."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from artifacts import Artifact, open_store
from artifacts.errors import RequestError
from stages.evaluation.scores import recomputed
from tests.every_stage import EVERY_STAGE, Done, local_run  # noqa: F401
from tests.in_process import Payload, failures, run_here, states

NAMES = ("rows", "pairs", "base", "sft", "judge", "scores", "scores_before")


def gated(done: Done, folder: Path, gate: dict[str, Any], **others: Any) -> Payload:
    """A run in the store of `local_run`, where all that is not named here is cached."""
    (folder / "task.py").write_bytes((done.recipe.parent / "task.py").read_bytes())
    stages = {name: EVERY_STAGE[name] for name in NAMES} | others | {"gate": {"uses": "gate", **gate}}
    recipe = folder / "gated.yaml"
    recipe.write_text(json.dumps({"name": "gated", "launch": {"threads": 1}, "stages": stages}))
    return run_here(recipe, done.store)


def sides(model: str = "sft", candidate: str = "scores", baseline: str = "scores_before") -> dict[str, str]:
    return {"model": model, "candidate": candidate, "baseline": baseline}


def samples(done: Done, name: str) -> list[dict[str, Any]]:
    store, output = open_store(str(done.store)), done.payload["stages"][name]["outputs"]["evaluation"]
    text = (store.materialize(Artifact.from_json(output)) / "samples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_what_passes_is_handed_on_as_it_is(local_run: Done) -> None:  # noqa: F811
    stages = local_run.payload["stages"]
    gate = stages["better"]["outputs"]
    assert gate["model"] == stages["sft"]["outputs"]["model"]
    assert gate["evaluation"] == stages["scores"]["outputs"]["evaluation"]
    verdict = open_store(str(local_run.store)).materialize(Artifact.from_json(gate["verdict"]))
    limit, loss = json.loads((verdict / "verdict.json").read_text())["metrics"]
    after, before = (recomputed("loss", samples(local_run, name)) for name in ("scores", "scores_before"))
    assert (loss["candidate"], loss["baseline"]) == pytest.approx((after, before), rel=1e-9)
    assert loss["difference"] == pytest.approx(after - before, rel=1e-6) and loss["high"] < -0.001
    assert (loss["rows"], loss["passed"], limit["passed"], limit["limit"]) == (16, True, True, 0.0)
    assert loss["p"] <= loss["level"] == 0.05
    metrics = stages["better"]["metrics"]
    assert metrics["difference"] == metrics["loss/difference"] == loss["difference"]


def test_what_is_worse_goes_no_further(local_run: Done, tmp_path: Path) -> None:  # noqa: F811
    """The untrained model against the trained one; the stage that would take it does not run."""
    after = {"uses": "reference_logprobs", "inputs": {"model": "gate", "dataset": "pairs"}, "with": {"max_length": 48}}
    gate = {"inputs": sides("base", "scores_before", "scores"), "with": {"metrics": {"loss": 0.001, "accuracy": 0}}}
    payload = gated(local_run, tmp_path, gate, after=after)
    assert states(payload)["gate"] == "failed" and states(payload)["after"] == "skipped"
    (message,) = failures(payload).values()
    assert message.startswith("the gate (unless_worse) stays shut: loss ") and "accuracy" not in message
    assert "tolerated 0.001, p 0.0" in message and "of 0.025" in message


def test_a_limit_stops_too(local_run: Done, tmp_path: Path) -> None:  # noqa: F811
    inputs = {"model": "sft", "candidate": "scores"}
    payload = gated(local_run, tmp_path, {"inputs": inputs, "with": {"limits": {"loss": 0.5, "accuracy": 0.0}}})
    loss = recomputed("loss", samples(local_run, "scores"))
    assert failures(payload) == {"gate": f"the gate (unless_worse) stays shut: loss {loss:.4g}, at most 0.5 asked for"}


def test_the_evaluation_of_another_model_is_refused(local_run: Done, tmp_path: Path) -> None:  # noqa: F811
    gate = {"inputs": sides("sft", "scores_before", "scores"), "with": {"metrics": {"loss": 0.001}}}
    (message,) = failures(gated(local_run, tmp_path, gate)).values()
    models = [local_run.payload["stages"][name]["outputs"]["model"]["id"][len("sha256:") :] for name in ("base", "sft")]
    assert message == (
        f"input candidate is an evaluation of {models[0]}, but input model is {models[1]}; evaluate that one"
    )


def test_evaluations_of_other_rows_or_settings_are_not_compared(local_run: Done, tmp_path: Path) -> None:  # noqa: F811
    fewer = copy.deepcopy(EVERY_STAGE["scores_before"])
    fewer["with"]["limit"] = 12
    gate = {"inputs": sides(baseline="fewer"), "with": {"metrics": {"loss": 0.001}}}
    (message,) = failures(gated(local_run, tmp_path, gate, fewer=fewer)).values()
    assert message == (
        "the evaluations differ in more than the model (with.limit: 12 -> 16); evaluate both in the same way"
    )


def test_a_metric_that_was_not_measured_is_named(local_run: Done, tmp_path: Path) -> None:  # noqa: F811
    gate = {"inputs": sides(), "with": {"metrics": {"preference/margin": 0.0}}}
    (message,) = failures(gated(local_run, tmp_path, gate)).values()
    assert message.startswith("input candidate did not measure preference/margin; have it measured there, or leave it")


def test_a_column_of_the_rows_is_no_measurement(local_run: Done, tmp_path: Path) -> None:  # noqa: F811
    """Rows with a column `score`, which is what samples call the score of a reward model."""
    kept = {"uses": "normalize", "with": {**EVERY_STAGE["rows"]["with"], "columns": {"score": "answer"}}}
    evaluate = {"uses": "evaluate", "inputs": {"model": "sft", "dataset": "scored_rows"}, "with": {"tasks": ["loss"]}}
    inputs = {"model": "sft", "candidate": "loss_alone"}
    gate = {"inputs": inputs, "with": {"limits": {"reward": 1.0}}}
    payload = gated(local_run, tmp_path, gate, scored_rows=kept, loss_alone=evaluate)
    (message,) = failures(payload).values()
    assert message.startswith("input candidate did not measure reward; ")


def test_an_adapter_is_handed_on_as_one(local_run: Done, tmp_path: Path) -> None:  # noqa: F811
    evaluate = {**EVERY_STAGE["scores"], "inputs": {**EVERY_STAGE["scores"]["inputs"], "model": "adapter"}}
    others = {"adapter": EVERY_STAGE["adapter"], "of_adapter": evaluate}
    gate: dict[str, Any] = {"inputs": {"model": "adapter", "candidate": "of_adapter"}, "with": {"limits": {"loss": 9}}}
    (message,) = failures(gated(local_run, tmp_path, gate, **others)).values()
    assert message == "input model is of kind adapter; set kind: adapter, as which it is handed on"
    gate["with"]["kind"] = "adapter"
    payload = gated(local_run, tmp_path, gate, **others)
    made = payload["stages"]
    assert made["gate"]["outputs"]["adapter"] == made["adapter"]["outputs"]["adapter"]


@pytest.mark.parametrize(
    ("inputs", "settings", "problem"),
    [
        (sides(), {}, "nothing is asked"),
        (sides(), {"limits": {"loss": 1}}, "input baseline is wired in, but metrics names none"),
        (
            {"model": "sft", "candidate": "scores"},
            {"metrics": {"loss": 0}},
            "compared with input baseline, which is",
        ),
        (
            sides(),
            {"metrics": {"acuracy": 0}},
            "'acuracy' is no metric that can be better or worse; did you mean",
        ),
        (sides(), {"metrics": {"loss": -1}}, "expected a number of at least 0, found -1"),
        (sides(), {"metrics": {"loss": 0}, "level": 0.0001, "draws": 1000}, "give draws: 100000, or a larger level"),
        (sides(), {"metrics": {"loss": 0}, "passes": "if_not_worse"}, "give metrics.loss a number above 0"),
    ],
)
def test_what_cannot_decide_is_refused_before_anything_runs(
    local_run: Done,  # noqa: F811
    tmp_path: Path,
    inputs: dict[str, str],
    settings: dict[str, Any],
    problem: str,
) -> None:
    with pytest.raises(RequestError, match=problem):
        gated(local_run, tmp_path, {"inputs": inputs, "with": settings})
