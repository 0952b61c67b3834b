"""Runs with a costly reward: repeated or killed, they pay once and end with the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from artifacts.digest import sha256_file
from stages.context import Context, local_context
from tests.stages.small_models import logged, output, read_json, read_lines, rows_of, save_dataset, save_model

# no two of its verdicts are equal, so a run that asked again would not end with the same bytes
JUDGE = """
from zlib import crc32
from pathlib import Path
HERE = Path(__file__).parent
def judge(completions, completion_ids, row_id):
    if (HERE / "die").exists() and len((HERE / "asked").read_text().splitlines()) > 20:
        (HERE / "die").unlink()
        raise KeyboardInterrupt
    before = len((HERE / "asked").read_text().splitlines())
    with open(HERE / "asked", "a") as stream:
        stream.writelines(f"{row} {ids} {text}\\n" for row, ids, text in zip(row_id, completion_ids, completions))
    return [crc32(b"%d" % number) / 2**32 for number in range(before, before + len(completions))]
"""

# raises for every completion whose digits add up to an odd number; a file makes it end the run once
FLAKY = """
from pathlib import Path
HERE = Path(__file__).parent
def judge(completions, completion_ids):
    if (HERE / "die").exists() and (HERE / "calls").exists() and len((HERE / "calls").read_text()) > 30:
        (HERE / "die").unlink()
        raise KeyboardInterrupt
    with open(HERE / "calls", "a") as stream:
        stream.write(".")
    for text, ids in zip(completions, completion_ids):
        if sum(ids) % 2:
            raise ValueError(text)
    return [len(set(ids)) / 3 for ids in completion_ids]
"""


@pytest.fixture
def world(tmp_path: Path) -> Any:
    """world(job, reward, store) -> the context of a run with a store, a model, prompts and a judge that all share."""
    save_model(tmp_path / "model", seed=1)
    data = save_dataset(tmp_path / "data", "prompt", [{"prompt": text} for text in ("abc", "da", "hgf", "cab")])
    (tmp_path / "judges.py").write_text(JUDGE)
    costly = {"name": f"{tmp_path}/judges.py:judge", "cache": True}
    config = {
        "learning_rate": 1e-2,
        "train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 6,
        "checkpoint_steps": 2,
    }

    def context(job: str, reward: dict[str, Any] = costly, store: str = "store") -> Context:
        AcceleratorState._reset_state(reset_partial_state=True)
        inputs = {"model": tmp_path / "model", "dataset": data}
        return local_context(
            "rl", config | {"rewards": [reward]}, folder=tmp_path / job, inputs=inputs, store=str(tmp_path / store)
        )

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


def test_failures_are_a_metric_and_the_same_after_a_kill(world: Any, tmp_path: Path) -> None:
    """As many as records without a value, in every step; and a killed run ends with the bytes of one that was not."""
    (tmp_path / "judges.py").write_text(FLAKY)
    made = {}
    for job in ("whole", "killed"):
        context = world(job, {"name": f"{tmp_path}/judges.py:judge", "on_error": "none"}, store=job)
        if job == "killed":
            (tmp_path / "calls").unlink()
            (tmp_path / "die").write_text("")
            with pytest.raises(KeyboardInterrupt):
                context.stage.run(context)
            context = world(job, {"name": f"{tmp_path}/judges.py:judge", "on_error": "none"}, store=job)
        context.stage.run(context)
        made[job] = context
    assert made["killed"].resumed_from is not None
    assert digests(made["killed"]) == digests(made["whole"])
    records = rows_of(output(made["whole"], "rollouts"))
    odd = [0.0] * 6
    for record in records:
        odd[record["step"] - 1] += sum(record["token_ids"]) % 2
        assert (record["reward_judge"] is None) == bool(sum(record["token_ids"]) % 2)
    steps = read_lines(output(made["whole"], "model") / "metrics.jsonl")
    assert [row["rewards/judge/failed"] for row in steps] == odd and 0 < sum(odd) < len(records)
    said = [text for text in logged(tmp_path / "whole" / "job") if text.startswith("reward function 'judge' failed")]
    assert len(said) == sum(count > 0 for count in odd)
    assert f"failed for {odd[0]:.0f} of 8 completions" in said[0] and "ValueError: " in said[0]
    assert said[0].endswith(" (judges.py:12)")
