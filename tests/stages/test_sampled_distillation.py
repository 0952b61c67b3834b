"""Distillation by policy gradients, whole stages: the first loss by transformers' logits, servers, splits, and whether
it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from artifacts.errors import DataError, StageError
from stages.distill import Config, check
from stages.training import held_out_completions, start
from stages.training.batch import Group
from stages.training.loop import Trainer
from tests.rollouts.model_server import model_server
from tests.stages.small_models import output, read_lines, record_samples, save_dataset, save_model
from tests.stages.test_other_engines import done

PROMPTS = ("abc", "da", "hgf", "cab", "e", "bad", "ha", "fed")
SETTINGS: dict[str, Any] = {
    "train_batch_size": 8,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "max_completion_length": 5,
    "loss_type": "iw_opd",
}
SAMPLED_ALONE = {"loss_type": "minillm", "single_step_decomposition": False}
KINDS = [{}, {"loss_type": "minillm", "gamma": 0.9, "temperature": 0.7}, SAMPLED_ALONE]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    for seed, name in enumerate(("student", "teacher", "other"), start=1):
        save_model(tmp_path / name, seed)
    rows = save_dataset(tmp_path / "rows", "prompt", [{"prompt": prompt} for prompt in PROMPTS])
    return {"model": tmp_path / "student", "teacher": tmp_path / "teacher", "dataset": rows}


def metrics(folder: Path, inputs: dict[str, Path], **settings: Any) -> list[dict[str, float]]:
    return read_lines(output(done("distill", folder, inputs, **{**SETTINGS, **settings}), "model") / "metrics.jsonl")


def near(rows: list[dict[str, float]], rel: float = 2e-5) -> list[Any]:
    return [pytest.approx(row, rel=rel, abs=1e-5) for row in rows]


def test_the_first_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Path]) -> None:
    """The weighted advantages of what was sampled, times its log-probabilities, over all of its tokens."""
    models = [save_model(tmp_path / f"again{seed}", seed) for seed in (1, 2)]
    sampled = record_samples(monkeypatch)
    first, _ = metrics(tmp_path / "run", inputs)
    total, weighted, tokens = 0.0, 0.0, 0
    for prompt, completion in sampled[: len(PROMPTS)]:
        rows = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logs = [model(rows).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for model in models]
        ours, theirs = (one.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist() for one in logs)
        advantages = [other - own for own, other in zip(ours, theirs, strict=True)]
        whole = sum(map(abs, advantages))
        for place, advantage in enumerate(advantages):
            weight = 1.5 - 0.5 * sum(map(abs, advantages[:place])) / whole
            total -= weight * advantage * ours[place]
            weighted += weight * advantage
        tokens += len(completion)
    assert first["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert first["iw_opd/mean_advantage"] == pytest.approx(weighted / tokens, rel=1e-5)
    assert first["iw_opd/max_weight"] == 1.5


@pytest.mark.parametrize("settings", KINDS)
def test_however_a_step_is_cut(settings: dict[str, Any], tmp_path: Path, inputs: dict[str, Path]) -> None:
    """In one micro-batch, two, and one a completion."""
    whole = metrics(tmp_path / "whole", inputs, **settings)
    for budget in (40, 1):
        cut = metrics(tmp_path / f"cut{budget}", inputs, micro_batch_tokens=budget, **settings)
        assert cut == near(whole, rel=1e-3)
        assert cut[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, SAMPLED_ALONE])
def test_a_server_tells_one_number_a_token(settings: dict[str, Any], tmp_path: Path, inputs: dict[str, Path]) -> None:
    """And had another model's weights; the curves are those of a teacher beside the student."""
    here = metrics(tmp_path / "here", inputs, **settings)
    with model_server(tmp_path / "other") as (server, engine):
        there = metrics(tmp_path / "there", inputs, teacher_engine=engine, **settings)
        assert server.loads == 1
    assert there == near(here)


def test_completions_of_a_server_are_compared_with_the_student(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """It computes as the student does, once it has the student's weights."""
    with model_server(tmp_path / "other") as (server, engine):
        rows = metrics(tmp_path / "run", inputs, rollouts=engine, importance_sampling_mode="sequence_truncate")
        assert server.loads == 2
    assert [row["sampling/importance_sampling_ratio/mean"] for row in rows] == pytest.approx([1.0, 1.0], rel=1e-4)
    assert all(0 <= row["sampling/sampling_logp_difference/max"] < 1e-4 for row in rows)


def test_a_model_teaches_itself_by_what_it_sees_besides(tmp_path: Path, inputs: dict[str, Path]) -> None:
    rows = [{"prompt": prompt, "privileged_context": "abc"} for prompt in PROMPTS]
    private = {"model": inputs["model"], "dataset": save_dataset(tmp_path / "seen", "privileged_context", rows)}
    template = "{prompt} {privileged_context}"
    found = metrics(tmp_path / "run", private, teacher_prompt_template=template, teacher_update_rate=0.5)
    assert all(abs(row["divergence"]) > 1e-3 for row in found)


@pytest.mark.parametrize("settings", [{}, {"loss_type": "minillm"}])
def test_the_student_comes_nearer_to_its_teacher(
    settings: dict[str, Any], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """Measured on what it draws of held-out prompts, whose loss is their divergence, and not the policy gradient's."""
    apart = save_dataset(tmp_path / "apart", "prompt", [{"prompt": prompt} for prompt in ("ba", "dce", "gab", "hh")])
    learning = {"max_steps": 40, "learning_rate": 2e-2, "train_batch_size": 16, "keep": "best", "eval_steps": 20}
    measured = {"eval_temperature": 1.0, "eval_num_generations": 16}
    rows = metrics(tmp_path / "run", {**inputs, "eval_dataset": apart}, **settings, **learning, **measured)
    held_out = [row["eval/divergence"] for row in rows if "eval/divergence" in row]
    assert [row["eval/loss"] for row in rows if "eval/loss" in row] == held_out
    assert held_out[-1] < 0.75 * held_out[0]
    divergences = [row["divergence"] for row in rows if "divergence" in row]
    assert fmean(divergences[-5:]) < 0.75 * fmean(divergences[:5])


def test_a_sampler_of_held_out_prompts_that_disagrees(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step, where nothing else is sampled yet."""
    plain = held_out_completions.measure

    def measure(trainer: Trainer, groups: Sequence[Group]) -> dict[str, float]:
        off = [[replace(one, logprobs=[value - 2 for value in one.logprobs]) for one in g.branches] for g in groups]
        return plain(trainer, [replace(g, branches=tuple(one)) for g, one in zip(groups, off, strict=True)])

    monkeypatch.setattr(held_out_completions, "measure", measure)
    apart = save_dataset(tmp_path / "apart", "prompt", [{"prompt": prompt} for prompt in ("ba", "dce")])
    with pytest.raises(StageError, match=r"input eval_dataset: the sampler gave token .* or computes differently"):
        metrics(tmp_path / "run", {**inputs, "eval_dataset": apart}, eval_temperature=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lmbda": 0.5}, "lmbda is 0.5, but loss_type iw_opd learns from what the student samples"),
        ({"beta": 0.5}, "beta is 0.5, but loss_type iw_opd is of the reverse KL divergence"),
        ({"loss_top_k": 4}, "loss_top_k is of loss_type divergence"),
        ({"cross_tokenizer": {}}, "cross_tokenizer is of loss_type divergence"),
        ({"gamma": 0.5}, "gamma is of loss_type minillm, and it is iw_opd"),
        ({"length_normalization": False}, "length_normalization is of loss_type minillm"),
        ({"loss_type": "minillm", "iw_opd_gamma": 1.0}, "iw_opd_gamma is of loss_type iw_opd, and it is minillm"),
        ({"loss_type": "divergence", "single_step_decomposition": False}, "and it is divergence: leave it out"),
        ({"loss_type": "divergence", "importance_sampling_mode": "token_mask"}, "is of policy gradients"),
        ({"importance_sampling_clip_max": 2.0}, "but importance_sampling_mode is null"),
        ({"loss_type": "minillm", "gamma": 0.0}, "nothing of loss_type minillm is left but the reverse KL"),
        (
            {"loss_type": "minillm", "teacher_engine": {"engine": "vllm_server"}},
            "single_step_decomposition needs the teacher's whole distribution",
        ),
        ({"teacher_engine": {"engine": "vllm_server"}, "temperature": 0.5}, "temperature is 0.5"),
        ({"lora_r": 2, "lora_dropout": 0.1}, "lora_dropout is 0.1, but completions are sampled without dropout"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    problems = check(Config(**{"loss_type": "iw_opd", **settings}), frozenset({"teacher"}))
    assert any(message in problem for problem in problems)


def test_held_out_rows_with_completions(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose sampler nobody knows; it is said before a model is loaded, and whatever eval_temperature is."""
    apart = save_dataset(tmp_path / "apart", "prompt_completion", [{"prompt": "ba", "completion": "c"}])

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(start, "load_causal_lm", loaded)
    for number, settings in enumerate(({}, {"eval_temperature": 1.0})):
        with pytest.raises(DataError, match="loss_type iw_opd measures what the student draws: give rows of type pro"):
            metrics(tmp_path / f"run{number}", {**inputs, "eval_dataset": apart}, **settings)


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_teacher_that_has_spoken_before_is_refused_once(lmbda: float) -> None:
    """No advice leads from one refusal to the next."""
    problems = check(Config(loss_type="iw_opd", lmbda=lmbda), frozenset({"teacher_states"}))
    assert [one for one in problems if "teacher_states" in one or "use lmbda" in one] == [
        "loss_type iw_opd asks a teacher of what the student samples, and teacher_states are of the dataset's "
        "completions: wire teacher in their place, or take loss_type divergence with lmbda 0"
    ]


def test_inputs_that_do_not_go_with_them() -> None:
    config = Config(loss_type="iw_opd")
    assert any("eval_temperature is 0" in one for one in check(config, frozenset({"teacher", "eval_dataset"})))
    assert check(config, frozenset({"teacher_states"}))
    assert not check(config, frozenset({"teacher"})) and not check(Config(loss_type="minillm"), frozenset({"teacher"}))
    served = Config(loss_type="iw_opd", teacher_engine={"engine": "vllm_server"})
    assert not check(served, frozenset({"teacher"}))
