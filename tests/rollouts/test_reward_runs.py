"""Runs with a costly reward: repeated or killed, they pay once and end with the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from artifacts.digest import sha256_file
from stages.context import Context, local_context
from tests.stages.small_models import output, read_json, save_dataset, save_model

# no two of its verdicts are equal, so a run that asked again would not end with the same bytes
JUDGE = """
import secrets
from pathlib import Path
HERE = Path(__file__).parent
def judge(completions, completion_ids, row_id):
    if (HERE / "die").exists() and len((HERE / "asked").read_text().splitlines()) > 20:
        (HERE / "die").unlink()
        raise KeyboardInterrupt
    with open(HERE / "asked", "a") as stream:
        stream.writelines(f"{row} {ids} {text}\\n" for row, ids, text in zip(row_id, completion_ids, completions))
    return [secrets.randbelow(10**9) / 10**9 for _ in completions]
"""


@pytest.fixture
def world(tmp_path: Path) -> Any:
    """world(job) -> the context of a run with a store, a model, prompts and a judge that all share."""
    save_model(tmp_path / "model", seed=1)
    data = save_dataset(tmp_path / "data", "prompt", [{"prompt": text} for text in ("abc", "da", "hgf", "cab")])
    (tmp_path / "judges.py").write_text(JUDGE)
    config = {
        "rewards": [{"name": f"{tmp_path}/judges.py:judge", "cache": True}],
        "learning_rate": 1e-2,
        "train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 6,
        "checkpoint_steps": 2,
    }

    def context(job: str) -> Context:
        AcceleratorState._reset_state(reset_partial_state=True)
        inputs = {"model": tmp_path / "model", "dataset": data}
        return local_context("rl", config, folder=tmp_path / job, inputs=inputs, store=str(tmp_path / "store"))

    return context


def digests(context: Context) -> dict[str, str]:
    """Of every file of the outputs."""
    folders = [output(context, name) for name in ("model", "rollouts")]
    return {
        f"{folder.name}/{path.relative_to(folder)}": sha256_file(path)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_killed_and_run_again_and_repeated(world: Any, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    asked.write_text("")
    (tmp_path / "die").write_text("")
    with pytest.raises(KeyboardInterrupt):
        context = world("killed")
        context.stage.run(context)
    before = asked.read_text().splitlines()
    assert len(before) > 20
    resumed = world("killed")
    resumed.stage.run(resumed)
    assert resumed.resumed_from is not None
    paid = asked.read_text().splitlines()
    assert len(paid) > len(before) and paid[: len(before)] == before
    assert len(set(paid)) == len(paid)
    # its checkpoints gone, as after a run that was published, it is computed from the start, and nothing is asked
    resumed.checkpoints.clear()
    resumed.shards.clear()
    repeated = world("repeated")
    repeated.stage.run(repeated)
    assert repeated.resumed_from is None
    assert asked.read_text().splitlines() == paid
    assert digests(repeated) == digests(resumed)
    assert read_json(output(repeated, "rollouts") / "ledger.json")["input"] == 48
