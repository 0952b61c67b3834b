"""Stages beside rl and ppo with vLLM: evaluation and distillation sample with it, and a server of it is a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.rollouts.vllm_client import ServerEngine
from tests.data.characters import ids
from tests.stages.small_models import output, read_json, read_lines, rows_of, save_dataset
from tests.stages.test_other_engines import done
from tests.vllm.models import EOS, save_model

ROWS = [("abc", "def"), ("da", "a"), ("hgf", "hhhhgg"), ("cab", "bad")]
IN_PROCESS = {"engine": "vllm", "kv_cache_gib": 0.05}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    save_model(tmp_path / "model", 1, tied=True)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in ROWS]
    return {"model": tmp_path / "model", "dataset": save_dataset(tmp_path / "rows", "prompt_completion", rows)}


def test_an_evaluation_is_that_of_the_embedded_engine(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Greedy completions of a model in float32, and so all that is measured of them."""
    settings = {"rewards": ["tests.stages.small_models:letters"], "threshold": 3, "max_completion_length": 8}
    found = []
    for name, more in (("here", {}), ("vllm", {"rollouts": IN_PROCESS})):
        made = output(done("evaluate", tmp_path / name, inputs, **settings, **more), "evaluation")
        found.append((read_json(made / "results.json"), read_lines(made / "samples.jsonl")))
    assert found[0] == found[1]


def test_a_student_distills_what_vllm_samples_of_its_weights(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Each of three syncs is proved by the trainer's own log-probabilities."""
    save_model(tmp_path / "teacher", 2)
    settings = {"train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "max_completion_length": 6}
    engine = {**IN_PROCESS, "proof_interval": 1}
    wired = {**inputs, "teacher": tmp_path / "teacher"}
    context = done("distill", tmp_path / "run", wired, **settings, rollouts=engine)
    rows = read_lines(output(context, "model") / "metrics.jsonl")
    assert [row["on_policy"] for row in rows] == [1.0] * 3
    assert rows[2]["divergence"] < rows[0]["divergence"]


@pytest.mark.parametrize("changes", [{}, {"lora_r": 2}], ids=["whole", "adapters"])
def test_one_engine_samples_policy_and_reference_in_turn(
    changes: dict[str, Any], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """XPO: each of six syncs is proved, and the second completion of every prompt is the reference's at all steps."""
    reference = save_model(tmp_path / "again", 1, tied=True)
    settings = {"rewards": ["tests.stages.small_models:letters"], "max_completion_length": 6, "temperature": 1.0}
    settings |= {"train_batch_size": 4, "max_steps": 3, "learning_rate": 2e-2, "xpo_alpha": 0.5, **changes}
    context = done("online_dpo", tmp_path / "run", inputs, **settings, rollouts={**IN_PROCESS, "proof_interval": 1})
    rows = [row for row in rows_of(output(context, "rollouts")) if row["row_id"].endswith("/1")]
    assert len(rows) == 12
    for row in rows:
        with torch.no_grad():
            logits_TV = reference(torch.tensor([[*row["prompt_ids"], *row["token_ids"]]])).logits[0]
        logs_TV = logits_TV[len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
        found = logs_TV[range(len(row["token_ids"])), row["token_ids"]].tolist()
        assert row["logprobs"] == pytest.approx(found, abs=1e-3)


def test_a_server_tells_the_teachers_likeliest_tokens(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers does; and the training is the same as with the teacher beside the student."""
    teacher, most = save_model(tmp_path / "teacher", 2, tied=True), 6
    told: list[tuple[Any, Any]] = []
    plain = ServerEngine.top_logprobs

    def noted(self: ServerEngine, sequences: Any, most: int) -> Any:
        answers = plain(self, sequences, most)
        told.extend(zip(sequences, answers, strict=True))
        return answers

    monkeypatch.setattr(ServerEngine, "top_logprobs", noted)
    wired = {**inputs, "teacher": tmp_path / "teacher"}
    settings = {"lmbda": 0.0, "train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "loss_top_k": most}
    engine = {"engine": "vllm_server", "kv_cache_gib": 0.05}
    there = done("distill", tmp_path / "there", wired, **settings, teacher_engine=engine)
    # apart from those of servers that sample for the student
    assert (Path(there.spec.job) / "vllm-teacher.log").exists() and "teacher/server_1/tokens" in there.timings
    assert len(told) == 8 and {(*p, *c) for (p, c), _ in told} == {(*ids(p), *ids(c), EOS) for p, c in ROWS}
    for (prompt, completion), places in told:
        with torch.no_grad():
            logits_TV = teacher(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        for logs_V, place in zip(logits_TV.log_softmax(-1), places, strict=True):
            likely = logs_V.topk(most)
            assert [value for _, value in place] == pytest.approx(likely.values.tolist(), abs=1e-3)
            assert [value for _, value in place] == pytest.approx(
                [float(logs_V[token]) for token, _ in place], abs=1e-3
            )
    here = done("distill", tmp_path / "here", wired, **settings)
    rows = [read_lines(output(context, "model") / "metrics.jsonl") for context in (there, here)]
    for one, other in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_student_sampled_ahead_learns_from_two_teachers(
    tmp_path: Path, inputs: dict[str, Path], servers: tuple[dict[str, str], Path]
) -> None:
    """One of them on a server of its own, asked ahead; the student's is somebody else's. The first two steps are on
    what the first weights say, and so the same as with both teachers beside the student; each sync is proved."""
    for seed, name in enumerate(("here", "there"), start=2):
        save_model(tmp_path / name, seed, tied=True)
    rows = [{"prompt": prompt, "completion": "", "teacher": place % 2} for place, (prompt, _) in enumerate(ROWS)]
    inputs["dataset"] = save_dataset(tmp_path / "taught", "prompt_completion", rows)
    wired: Any = {**inputs, "teacher": [tmp_path / "here", tmp_path / "there"]}
    server = {"engine": "vllm_server", "kv_cache_gib": 0.05}
    settings: dict[str, Any] = {"train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "loss_top_k": 6}
    settings |= {"max_completion_length": 6, "teacher_column": "teacher"}
    given = {"engine": "vllm_server", "urls": [servers[0]["tied"]], "weights_folder": str(tmp_path)}
    settings |= {"rollouts": {**given, "max_staleness": 1, "proof_interval": 1}}
    found = []
    for name, more in (("apart", {"teacher_engines": [{}, server]}), ("beside", {})):
        context = done("distill", tmp_path / name, wired, **settings, **more)
        found.append(read_lines(output(context, "model") / "metrics.jsonl"))
    assert [row["sample/staleness_mean"] for row in found[0]] == [0, 1, 1]
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        for name in ("loss", "divergence/0", "divergence/1", "teacher/rest_probability"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)
