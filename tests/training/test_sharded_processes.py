"""Two processes, spread in every way, killed and taken up by one another, give the run of one process."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from artifacts import open_store
from flows.command import stage_command, stage_environment
from flows.launch_settings import Launch
from stages.context import Context
from tests.training import training_process
from tests.training.conftest import tiny_model
from tests.training.experts import EXPERTS
from tests.training.test_loop import context_for
from tests.training.training_process import Stop, stop_me, train
from tests.warm import Warm

SCRIPT = Path(training_process.__file__)
ROOT = SCRIPT.parents[2]
STEPS, EVERY = 20, 2
BUILT_SECONDS = 1500
"""On a fresh machine DeepSpeed compiles a minute's C++ first, beside other tests."""

pytestmark = pytest.mark.timeout(1800)


def context(folder: Path, store: Path | None = None, model_type: str = "llama", **changes: Any) -> Context:
    """Unequal micro-batches, so that two processes have unequal numbers of them in most steps. What is left is the
    average of the weights, which the processes share out."""
    settings: dict[str, Any] = {"max_steps": STEPS, "checkpoint_steps": EVERY, "learning_rate": 3e-3}
    settings["weight_averaging"] = {"kind": "bema", "update_freq": 3, "update_after": 1}
    tiny_model(model_type, **EXPERTS.get(model_type, {})).save_pretrained(folder / "model")
    made = context_for(folder, micro_batch_tokens=13, weight_decay=0.1, **(settings | changes))
    spec = made.spec if store is None else replace(made.spec, store=str(store))
    return Context(spec, open_store(spec.store))


def run_together(
    folder: Path,
    store: Path,
    config: Path | str,
    warm: Warm,
    kill_before: int = -1,
    kill_rank: int = 0,
    model_type: str = "llama",
    **changes: Any,
) -> Context:
    """Two processes through the launcher; the context of the first."""
    made = context(folder, store, model_type, **changes)
    spec = replace(made.spec, processes=2)
    settings = {
        "spec": asdict(spec),
        "kill_before": kill_before,
        "kill_rank": kill_rank,
        "model_type": model_type,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    launch = Launch(processes=2, config=str(config))
    command = stage_command(launch, Path(spec.job), threads=1)
    ranks = warm.command(str(SCRIPT), str(folder / "settings.json"))
    arguments = [*command.arguments[:-3], "--no_python", *ranks]
    environment = stage_environment(command) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=BUILT_SECONDS)
    if kill_before < 0:
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert done.returncode != 0 and "-9" in done.stderr, done.stderr[-3000:]
    return made


def rows(made: Context) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output(made) / "metrics.jsonl").read_text().splitlines()]


def output(made: Context) -> Path:
    return Path(made.spec.job) / "out" / "model"


@pytest.mark.slow
def test_any_way_goes_on_where_another_was_killed(tmp_path: Path, warm_process: Warm) -> None:
    whole = context(tmp_path / "whole")
    train(whole, -1, None)

    store = tmp_path / "store"
    small = tmp_path / "zero3.json"  # small parameters stay gathered in ZeRO-3, and all of these are small
    small.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    zero3 = tmp_path / "zero3.yaml"
    zero3.write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {small.name}}}\n")
    for number, (config, until, rank) in enumerate([("ddp", 5, 1), ("zero2", 9, 0), (None, 11, 0), ("fsdp2", 15, 1)]):
        folder = tmp_path / str(number)
        if config is None:  # and a single process in between
            with pytest.raises(Stop):
                train(context(folder, store), until, stop_me)
        else:
            run_together(folder, store, config, warm_process, until, rank)
        saved = open_store(str(store)).checkpoints(whole.fingerprint).latest_step()
        assert saved is not None and until - 2 * EVERY <= saved < until
    last = run_together(tmp_path / "last", store, zero3, warm_process)

    expected, found = rows(whole), rows(last)
    assert len(expected) == STEPS
    for wanted, row in zip(expected, found, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
        assert row["num_tokens"] == wanted["num_tokens"]
    models = [AutoModelForCausalLM.from_pretrained(output(made)) for made in (whole, last)]
    for left, right in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)
    assert not torch.equal(models[0].get_input_embeddings().weight, tiny_model().get_input_embeddings().weight)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_experts_are_balanced_as_in_one_process(tmp_path: Path, config: str, warm_process: Warm) -> None:
    """Loss, gradient norm and load of every step; the coefficient is so large that the loss follows from it."""
    settings: dict[str, Any] = {
        "max_steps": 4,
        "checkpoint_steps": None,
        "router_aux_loss_coef": 0.3,
        "gradient_checkpointing": config == "fsdp2",
    }
    whole = context(tmp_path / "whole", None, "mixtral", **settings)
    train(whole, -1, None, "mixtral")
    folder, store = tmp_path / "spread", tmp_path / "store"
    spread = run_together(folder, store, config, warm_process, model_type="mixtral", **settings)
    expected, found = rows(whole), rows(spread)
    assert len(expected) == len(found) == 4
    for wanted, row in zip(expected, found, strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)
        assert row["aux_loss"] > 2.0 and row["router/max_load"] > 1.0
