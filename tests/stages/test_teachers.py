"""Distillation from a teacher's likeliest tokens, told by a model beside the student or by a server of vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts.errors import StageError
from stages.distill import Config, check
from tests.data.characters import IDS, ids
from tests.rollouts.model_server import model_server
from tests.stages.small_models import EOS, output, read_lines, save_dataset, save_model
from tests.stages.test_other_engines import done

ROWS = [("abc", "def"), ("hg", "a"), ("ab", "hhhhgg"), ("eeee", "bad")]
PRIVILEGED = [{"prompt": "abc", "privileged_context": "de"}, {"prompt": "da", "privileged_context": "bbcaaa"}]
GIVEN = {"lmbda": 0.0, "train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    for seed, name in enumerate(("student", "teacher", "other"), start=1):
        save_model(tmp_path / name, seed)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in ROWS]
    return {
        "model": tmp_path / "student",
        "teacher": tmp_path / "teacher",
        "dataset": save_dataset(tmp_path / "rows", "prompt_completion", rows),
    }


def metrics(folder: Path, inputs: dict[str, Path], **settings: Any) -> list[dict[str, float]]:
    return read_lines(output(done("distill", folder, inputs, **{**GIVEN, **settings}), "model") / "metrics.jsonl")


def near(rows: list[dict[str, float]]) -> list[Any]:
    return [pytest.approx({name: row[name] for name in ("loss", "divergence", "grad_norm")}, rel=2e-5) for row in rows]


def same(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: row[name] for name in ("loss", "divergence", "grad_norm")} for row in rows]


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.4, 0.7), (1.0, 1.3)])
def test_all_tokens_are_the_whole_divergence(
    beta: float, temperature: float, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    settings = {"beta": beta, "temperature": temperature}
    dense = metrics(tmp_path / "dense", inputs, **settings)
    every = metrics(tmp_path / "top", inputs, **settings, loss_top_k=len(IDS))
    assert same(every) == near(dense)
    assert [row["teacher/rest_probability"] for row in every] == [0.0, 0.0]


def test_the_first_loss_is_of_the_likeliest_tokens_and_the_rest(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Forward KL by hand from transformers' distributions, three tokens and the others."""
    student, teacher = save_model(tmp_path / "again", 1), save_model(tmp_path / "again2", 2)
    values, rests = [], []
    for prompt, completion in ROWS:
        tokens = torch.tensor([[*ids(prompt), *ids(completion), EOS]])
        with torch.no_grad():
            s_TV, t_TV = (one(tokens).logits[0, len(prompt) - 1 : -1].softmax(-1) for one in (student, teacher))
        for s_V, t_V in zip(s_TV, t_TV, strict=True):
            likely = t_V.argsort(descending=True)[:3]
            s, t = s_V[likely], t_V[likely]
            rests.append(float(1 - t.sum()))
            last = (1 - t.sum()) * ((1 - t.sum()) / (1 - s.sum())).log()
            values.append(float((t * (t / s).log()).sum() + last))
    first, _ = metrics(tmp_path / "run", inputs, beta=0.0, loss_top_k=3)
    assert first["loss"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert first["teacher/rest_probability"] == pytest.approx(sum(rests) / len(rests), rel=1e-5)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": 0.5, "lmbda": 1.0, "max_completion_length": 5}])
def test_a_server_teaches_what_a_model_here_does(
    settings: dict[str, Any], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """It had another model's weights; on given completions, and on those of the student."""
    here = metrics(tmp_path / "here", inputs, loss_top_k=4, **settings)
    with model_server(tmp_path / "other") as (server, engine):
        there = metrics(tmp_path / "there", inputs, loss_top_k=4, teacher_engine=engine, **settings)
        assert server.loads == 1
    assert same(there) == near(here)


def test_a_server_sees_the_privileged_context(tmp_path: Path, inputs: dict[str, Path]) -> None:
    inputs["dataset"] = save_dataset(tmp_path / "private", "privileged_context", PRIVILEGED)
    template = "{prompt} {privileged_context}"
    settings = {"lmbda": 1.0, "max_completion_length": 5, "loss_top_k": 4, "teacher_prompt_template": template}
    here = metrics(tmp_path / "here", inputs, **settings)
    with model_server(tmp_path / "other") as (_, engine):
        assert same(metrics(tmp_path / "there", inputs, **settings, teacher_engine=engine)) == near(here)


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda place: dict(list(place.items())[:2]), "no 4 likeliest tokens of each place of a prompt"),
        (lambda place: {str(int(name) + 90): value for name, value in place.items()}, "the student knows"),
    ],
)
def test_answers_that_are_none(spoilt: Any, message: str, tmp_path: Path, inputs: dict[str, Path]) -> None:
    with model_server(tmp_path / "other") as (server, engine):
        plain = server._of_prompt

        def answer(logprobs_TV: torch.Tensor, prompt: list[int], most: int) -> list[Any]:
            found = plain(logprobs_TV, prompt, most)
            return found if most == 0 else [place and spoilt(place) for place in found]

        server._of_prompt = answer
        with pytest.raises(StageError, match=message):
            metrics(tmp_path / "there", inputs, loss_top_k=4, teacher_engine=engine)


def test_a_server_that_keeps_other_weights(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with model_server(tmp_path / "other") as (server, engine):
        server._load = lambda folder: {}
        with pytest.raises(StageError, match="the sync did not reach the engine"):
            metrics(tmp_path / "there", inputs, loss_top_k=4, teacher_engine=engine)


@pytest.mark.parametrize(
    ("settings", "wired", "message"),
    [
        ({"teacher_engine": {"engine": "vllm"}}, {"teacher"}, "what computes a teacher elsewhere is vllm_server"),
        ({"teacher_engine": {"engine": "vllm_server"}}, {"teacher"}, "give loss_top_k"),
        ({"teacher_engine": {"engine": "vllm_server"}, "loss_top_k": 4}, set(), "input teacher, which is not wired in"),
        (
            {"teacher_engine": {"engine": "vllm_server"}, "loss_top_k": 4, "temperature": 0.5},
            {"teacher"},
            "temperature is 0.5",
        ),
        (
            {"teacher_engine": {"engine": "vllm_server", "urls": ["http://a:1"]}, "loss_top_k": 4},
            {"teacher"},
            "teacher_engine.urls needs teacher_engine.weights_folder",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], wired: set[str], message: str) -> None:
    assert any(message in problem for problem in check(Config(**settings), frozenset(wired)))


def test_a_teacher_elsewhere_that_can_be() -> None:
    config = Config(teacher_engine={"engine": "vllm_server"}, loss_top_k=4)
    assert not check(config, frozenset({"teacher"}))
