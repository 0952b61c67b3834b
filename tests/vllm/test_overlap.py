"""One step off with a real server: each sync proved, weights of the version that is said, killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from stages.context import Context, local_context
from tests.stages.interruptions import process_killed_in_step
from tests.stages.small_models import output, read_lines, rows_of
from tests.stages.test_overlap import done
from tests.vllm.models import teacher_forced, worst
from tests.vllm.test_stage import saved

SETTINGS: dict[str, Any] = {
    "rewards": ["tests.stages.small_models:letters"],
    "num_generations": 4,
    "train_batch_size": 16,
    "max_completion_length": 6,
    "learning_rate": 1e-2,
    "max_steps": 4,
    "checkpoint_steps": 1,
    "rollouts": {"engine": "vllm_server", "kv_cache_gib": 0.05, "proof_interval": 1, "max_staleness": 1},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved(tmp_path_factory.mktemp("inputs"), tied=True)


@pytest.fixture(scope="module")
def whole(
    inputs: dict[str, Path], servers: tuple[dict[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Context:
    """By somebody else's server, which is there already."""
    folder = tmp_path_factory.mktemp("whole")
    given = {"urls": [servers[0]["tied"]], "weights_folder": str(folder)}
    return done(context_of(folder, inputs, **given))


def context_of(folder: Path, inputs: dict[str, Path], **engine: Any) -> Context:
    settings = {**SETTINGS, "rollouts": {**SETTINGS["rollouts"], **engine}}
    return local_context("rl", settings, folder=folder, inputs=dict(inputs))


def test_one_step_off(inputs: dict[str, Path], whole: Context) -> None:
    """Generations 0 and 1 are of the first weights: transformers finds their tokens as likely; the proof, which looks
    at every sync here, says the same of later ones."""
    metrics, rollouts = read_lines(output(whole, "model") / "metrics.jsonl"), rows_of(output(whole, "rollouts"))
    assert [row["weight_version"] for row in rollouts[::16]] == [0, 0, 1, 2]
    assert [row["sample/staleness_mean"] for row in metrics] == [0, 1, 1, 1]
    first = AutoModelForCausalLM.from_pretrained(inputs["model"]).eval()
    expected = [teacher_forced(first, row["prompt_ids"], row["token_ids"]) for row in rollouts[:48]]
    found = [row["logprobs"] for row in rollouts[:48]]
    assert worst(found[:32], expected[:32]) < 1e-3
    assert worst(found[32:], expected[32:]) > 1e-2  # these weights have learnt
    assert metrics[0]["sampling/sampling_logp_difference/max"] < 1e-3


@pytest.mark.nightly
def test_killed_and_resumed(inputs: dict[str, Path], whole: Context, tmp_path: Path) -> None:
    """SIGKILL before step 3, with its successor's rollouts in flight: the same tokens as if nothing had happened."""
    process_killed_in_step(context_of(tmp_path, inputs), 2, tmp_path / "spec.json")
    again = done(context_of(tmp_path, inputs))
    assert again.resumed_from == 2
    one, other = rows_of(output(whole, "rollouts")), rows_of(output(again, "rollouts"))
    for name in ("row_id", "token_ids", "weight_versions", "reward", "advantage"):
        assert [row[name] for row in other] == [row[name] for row in one]
