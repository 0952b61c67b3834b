"""One task in a fresh process: `python -m tests.benchmarks.worker SPEC.json` writes its result beside the spec."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.cases import STEPS, Architecture, Case
from tests.benchmarks.folder import CaseFolder
from tests.benchmarks.recorder import CLOCKS, Recorder
from tests.benchmarks.rows import batches, make_rows

CONTESTANTS = {
    "ours": "tests.benchmarks.ours:run",
    "plain": "tests.benchmarks.plain:run",
    "trl-default": "tests.benchmarks.trl:run_default",
    "trl-best": "tests.benchmarks.trl:run_best",
}
"""Name -> function(case, steps, folder, recorder)."""
SAMPLING = {"ours": "tests.benchmarks.online:run_ours", "plain": "tests.benchmarks.online:run_plain"}
"""In their place where a step samples its completions."""


def case_to_json(case: Case) -> dict[str, Any]:
    """What `case_from_json` takes."""
    return asdict(case)


def case_from_json(values: dict[str, Any]) -> Case:
    """The case of a spec."""
    return Case(**{**values, "architecture": Architecture(**values["architecture"])})


def prepare(case: Case, folder: CaseFolder, _: str = "wall") -> dict[str, Any]:
    """Save the weights, and what is computed before the steps: references' log-probabilities, a teacher's states."""
    from tests.benchmarks.models import save_models
    from tests.benchmarks.plain import reference_sums

    save_models(case, folder)
    if case.stage == "dpo":
        folder.save_references(reference_sums(folder, make_rows(case), bf16=case.bf16))
    if case.stage == "distill_kept":
        from tests.benchmarks.ours import save_states

        save_states(case, folder)
    return {"versions": versions()}


def matrix_rate(case: Case, _: CaseFolder, clock: str) -> dict[str, Any]:
    """How fast this machine multiplies at the moment."""
    from tests.benchmarks.floor import measure_rate

    return {"rates": measure_rate(case, CLOCKS[clock])}


def contest(name: str, case: Case, folder: CaseFolder, clock: str) -> dict[str, Any]:
    """All steps of one contestant."""
    known = CONTESTANTS | (SAMPLING if STEPS[case.stage].samples else {})
    module, function = known[name].split(":")
    recorder = Recorder(CLOCKS[clock])
    run = getattr(importlib.import_module(module), function)
    run(case, batches(case, make_rows(case)), folder, recorder)
    return recorder.result()


TASKS: dict[str, Callable[[Case, CaseFolder, str], dict[str, Any]]] = {"prepare": prepare, "matrix-rate": matrix_rate}


def versions() -> dict[str, str]:
    """Of the libraries that the contestants use."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "accelerate", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(spec_path: str) -> None:
    """Run the task that the spec names."""
    path = Path(spec_path)
    spec = json.loads(path.read_text(encoding="utf-8"))
    case, folder, task, clock = case_from_json(spec["case"]), CaseFolder(path.parent), spec["task"], spec["clock"]
    result = TASKS[task](case, folder, clock) if task in TASKS else contest(task, case, folder, clock)
    (path.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
