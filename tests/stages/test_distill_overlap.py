"""Distillation whose student is sampled ahead, and whose teachers' servers are asked ahead: which weights say what,
whatever is slow; what the loss is of; killed and resumed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from artifacts.errors import DataError, StageError
from stages.context import Context, local_context
from stages.distill import Config, check
from stages.seeds import generator
from stages.training.planner import RowOrder
from tests.rollouts.model_server import ModelServer, model_server
from tests.stages.interruptions import process_killed_in_step
from tests.stages.overlapped_runs import SlowOnes, Weights, before_steps, copied, name_of
from tests.stages.small_models import output, read_lines, save_dataset, save_model
from tests.stages.test_other_engines import divergence
from tests.stages.test_overlap import done, logprobs
from tests.warm import Warm

ROWS = [("abc", "de", 0), ("da", "b", 1), ("hgf", "cc", 1), ("cab", "a", 0), ("e", "ha", 1), ("bad", "fg", 0)]
A_STEP = 2
STEPS = 6
SETTINGS: dict[str, Any] = {
    "train_batch_size": A_STEP,
    "max_completion_length": 5,
    "learning_rate": 3e-2,
    "lr_scheduler_type": "constant",
    "max_steps": STEPS,
    "loss_top_k": 4,
}
TWO = {"teacher_column": "teacher"}
Server = tuple[ModelServer, dict[str, Any]]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    for seed, name in enumerate(("model", "teacher", "second", "other"), start=1):
        save_model(tmp_path / name, seed)
    named = [{"prompt": prompt, "completion": said, "teacher": teacher} for prompt, said, teacher in ROWS]
    return {
        "model": tmp_path / "model",
        "teacher": tmp_path / "teacher",
        "dataset": save_dataset(tmp_path / "rows", "prompt_completion", named),
    }


@pytest.fixture
def student(tmp_path: Path, inputs: dict[str, Any]) -> Iterator[Server]:
    with model_server(tmp_path / "other") as opened:
        yield opened


@pytest.fixture
def teacher(tmp_path: Path, inputs: dict[str, Any]) -> Iterator[Server]:
    with model_server(tmp_path / "other") as opened:
        yield opened


def context_of(folder: Path, inputs: dict[str, Any], rollouts: dict[str, Any], **more: Any) -> Context:
    return local_context("distill", {**SETTINGS, **more, "rollouts": rollouts}, folder=folder, inputs=dict(inputs))


def results(context: Context) -> tuple[list[dict[str, Any]], list[dict[str, Any]], bytes]:
    """(rows of metrics, samples, weights)"""
    folder = output(context, "model")
    (weights,) = folder.glob("*.safetensors")
    return read_lines(folder / "metrics.jsonl"), read_lines(folder / "samples.jsonl"), weights.read_bytes()


def noted(model: ModelServer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int], str]]:
    """(prompt, completion, name of the weights) of what the server samples from now on."""
    one, found = model._one, []

    def asked(body: dict[str, Any], seed: int) -> dict[str, Any]:
        made = one(body, seed)
        if "prompt_logprobs" not in body:  # else a proof
            found.append((list(body["prompt"]), made["token_ids"], name_of(copied(model.model))))
        return made

    monkeypatch.setattr(model, "_one", asked)
    return found


def weights_of_steps(monkeypatch: pytest.MonkeyPatch) -> dict[int, Weights]:
    found: dict[int, Weights] = {}
    before_steps(
        monkeypatch,
        lambda number, trainer: found.setdefault(number, copied(trainer.scorer.transformers_model)),
    )
    return found


def own_steps(lmbda: float) -> list[int]:
    return [step for step in range(STEPS) if generator(42, "on-policy", step).random() < lmbda]


@pytest.mark.parametrize(("staleness", "lmbda"), [(1, 1.0), (2, 1.0), (9, 1.0), (1, 0.6)])
def test_weights_follow_from_the_number_of_the_step(
    staleness: int,
    lmbda: float,
    tmp_path: Path,
    inputs: dict[str, Any],
    student: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the n-th step on own completions they are those from before the one that is so many such steps earlier; and
    its loss is the reverse KL at these completions of the student of the step, by transformers: nothing corrects for
    who wrote them."""
    model, rollouts = student
    weights, said = weights_of_steps(monkeypatch), noted(model, monkeypatch)
    engine = {**rollouts, "max_staleness": staleness, "proof_interval": 2}
    more = {"lmbda": lmbda, "loss_top_k": None, "seed": 42}
    metrics, _, _ = results(done(context_of(tmp_path, inputs, engine, **more)))
    steps = own_steps(lmbda)
    assert len(steps) > 2 and (lmbda == 1) == (len(steps) == STEPS)
    versions = [steps[max(0, number - staleness)] for number in range(len(steps))]
    assert [row["on_policy"] for row in metrics] == [float(step in steps) for step in range(STEPS)]
    names = {name_of(one): step for step, one in weights.items()}
    of_steps = AutoModelForCausalLM.from_pretrained(inputs["model"]).eval()
    teacher = AutoModelForCausalLM.from_pretrained(inputs["teacher"]).eval()
    assert len(said) == A_STEP * len(steps)  # nothing else was sampled, and nothing twice
    for number, (step, version) in enumerate(zip(steps, versions, strict=True)):
        found = said[number * A_STEP : (number + 1) * A_STEP]
        assert {names[one[2]] for one in found} == {version}
        assert metrics[step]["sample/staleness_max"] == metrics[step]["sample/staleness_mean"] == step - version
        of_steps.load_state_dict(weights[step])
        values = torch.cat([divergence(of_steps, teacher, *one[:2]) for one in found])
        assert metrics[step]["loss"] == pytest.approx(float(values.mean()), rel=1e-4)
    assert model.loads == len(set(versions))


@pytest.mark.parametrize("more", [{}, {"in_flight_updates": True}])
def test_with_weights_that_stay_the_same_it_is_the_synchronous_run(
    more: dict[str, Any], tmp_path: Path, inputs: dict[str, Any], student: Server, teacher: Server
) -> None:
    """A learning rate that changes no weight: the same completions, losses and weights."""
    _, rollouts = student
    runs = []
    for staleness in (0, 2):
        engine = {**rollouts, "max_staleness": staleness, **(more if staleness else {})}
        settings = {"learning_rate": 1e-30, "teacher_engine": teacher[1]}
        runs.append(results(done(context_of(tmp_path / str(staleness), inputs, engine, **settings))))
    assert runs[0][1:] == runs[1][1:]
    for now, ahead in zip(runs[0][0], runs[1][0], strict=True):
        assert {"sample/staleness_mean", "sample/staleness_max"} <= {*ahead} - {*now}
        assert {name: ahead[name] for name in now} == pytest.approx(now, abs=1e-6)


@pytest.mark.parametrize("several", [False, True])
def test_whoever_is_slow_the_run_is_the_same(
    several: bool,
    tmp_path: Path,
    inputs: dict[str, Any],
    student: Server,
    teacher: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (model, engine), more = teacher, {"teacher_engine": teacher[1]}
    rollouts = {**student[1], "max_staleness": 1}
    if several:  # the other one is here, and reads its rows with the batch
        inputs = {**inputs, "teacher": [tmp_path / "second", inputs["teacher"]]}
        more = {**TWO, "teacher_engines": [{}, engine]}
    order = RowOrder(len(ROWS), A_STEP, Config().seed, 1, STEPS)
    its = [[row for row in order.rows(step) if ROWS[row][2] == 1 or not several] for step in range(STEPS)]
    ends = list(accumulate(map(len, its)))
    # what has none is a proof that it has the weights
    slow = SlowOnes(model, ends, monkeypatch, counts=lambda body: bool(body["prompt_logprobs"]))
    found = []
    for is_slow in (True, False):
        slow.begin(server_is_slow=is_slow)
        found.append(results(done(context_of(tmp_path / str(is_slow), inputs, rollouts, **more))))
        assert slow.answered == ends[-1] == slow.asked
    assert found[0] == found[1]


def test_what_is_asked_ahead_is_what_is_asked_with_the_batch(
    tmp_path: Path, inputs: dict[str, Any], student: Server, teacher: Server
) -> None:
    """A teacher here says it with the batch, of the same completions of older weights."""
    rollouts = {**student[1], "max_staleness": 2}
    here = results(done(context_of(tmp_path / "here", inputs, rollouts)))
    there = results(done(context_of(tmp_path / "there", inputs, rollouts, teacher_engine=teacher[1])))
    for one, other in zip(here[0], there[0], strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("loss", [{"loss_type": "iw_opd"}, {"loss_type": "minillm"}])
def test_a_policy_gradient_corrects_for_older_weights(
    loss: dict[str, Any], tmp_path: Path, inputs: dict[str, Any], student: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ratios are those of the student of the step to the one that sampled, by transformers."""
    model, rollouts = student
    weights, said = weights_of_steps(monkeypatch), noted(model, monkeypatch)
    settings = {**loss, "loss_top_k": None, "importance_sampling_mode": "token_truncate"}
    metrics, _, _ = results(done(context_of(tmp_path, inputs, {**rollouts, "max_staleness": 1}, **settings)))
    names = {name_of(one): step for step, one in weights.items()}
    now, then = (AutoModelForCausalLM.from_pretrained(inputs["model"]).eval() for _ in range(2))
    for step, row in enumerate(metrics):
        ratios = []
        for prompt, made, name in said[step * A_STEP : (step + 1) * A_STEP]:
            now.load_state_dict(weights[step])
            then.load_state_dict(weights[names[name]])
            record = {"prompt_ids": prompt, "token_ids": made}
            ratios.append((logprobs(now, record, 1.0) - logprobs(then, record, 1.0)).exp().clamp(max=3.0))
        found = row["sampling/importance_sampling_ratio/mean"]
        assert found == pytest.approx(float(torch.cat(ratios).mean()), abs=1e-4)
        assert row["sample/staleness_mean"] == min(step, 1)
    assert abs(metrics[-1]["sampling/importance_sampling_ratio/mean"] - 1) > 1e-3


# --- killed and resumed


@pytest.mark.parametrize("case", [(1, 3, 1.0, False), (2, 3, 0.8, True)])
def test_killed_and_resumed(
    case: tuple[int, int, float, bool],
    tmp_path: Path,
    inputs: dict[str, Any],
    student: Server,
    teacher: Server,
    warm_process: Warm,
) -> None:
    """SIGKILL with completions and answers in flight: the resumed run has the metrics, samples and weights of one that
    was not disturbed, and asks for nothing twice that it was told."""
    staleness, number, lmbda, several = case
    rollouts, more = {**student[1], "max_staleness": staleness}, {"teacher_engine": teacher[1]}
    if several:
        inputs = {**inputs, "teacher": [tmp_path / "second", inputs["teacher"]]}
        more = {**TWO, "teacher_engines": [{}, teacher[1]]}
    more |= {"checkpoint_steps": 1, "lmbda": lmbda}
    whole = results(done(context_of(tmp_path / "whole", inputs, rollouts, **more)))
    killed = context_of(tmp_path / "killed", inputs, rollouts, **more)
    process_killed_in_step(killed, number, tmp_path / "spec.json", warm_process)
    before = student[0].asked
    again = done(context_of(tmp_path / "killed", inputs, rollouts, **more))
    assert again.resumed_from == number
    assert results(again) == whole
    if lmbda == 1:  # completions of the steps that are left and were not in flight
        assert student[0].asked - before - PROOF <= A_STEP * (STEPS - number - staleness)


PROOF = A_STEP
"""Questions of the proof that the first weights after a resume have arrived."""


# --- measured meanwhile


def test_held_out_prompts_are_completed_in_between(
    tmp_path: Path, inputs: dict[str, Any], student: Server, teacher: Server
) -> None:
    """By the weights of the moment, and it changes nothing of what is trained."""
    inputs["eval_dataset"] = save_dataset(tmp_path / "unseen", "prompt", [{"prompt": "hc"}, {"prompt": "gab"}])
    rollouts, more = {**student[1], "max_staleness": 2}, {"teacher_engine": teacher[1], "eval_steps": 2}
    measured = results(done(context_of(tmp_path / "measured", inputs, rollouts, **more)))
    alone = {name: path for name, path in inputs.items() if name != "eval_dataset"}
    plain = results(done(context_of(tmp_path / "plain", alone, rollouts, teacher_engine=teacher[1])))
    assert measured[1:] == plain[1:]
    found = {row["step"]: row["eval/loss"] for row in measured[0] if "eval/loss" in row}
    assert list(found) == [0, 2, 4, 6]
    here = context_of(tmp_path / "here", inputs, {**student[1]}, eval_steps=2, learning_rate=1e-30)
    assert found[0] == pytest.approx(results(done(here))[0][0]["eval/loss"], rel=1e-4)


def test_held_out_prompts_do_not_go_with_updates_in_flight(
    tmp_path: Path, inputs: dict[str, Any], student: Server
) -> None:
    inputs["eval_dataset"] = save_dataset(tmp_path / "unseen", "prompt", [{"prompt": "hc"}])
    rollouts = {**student[1], "max_staleness": 1, "in_flight_updates": True}
    with pytest.raises(DataError, match="to complete its prompts would change what is trained"):
        done(context_of(tmp_path, inputs, rollouts, eval_steps=2))


# --- what goes wrong


def test_a_teacher_that_fails_ahead(
    tmp_path: Path, inputs: dict[str, Any], student: Server, teacher: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = teacher[0], teacher[0]._of_prompt

    def spoilt(logprobs_TV: torch.Tensor, prompt: list[int], most: int) -> list[Any]:
        found = plain(logprobs_TV, prompt, most)
        return (
            [place and {str(int(name) + 90): value for name, value in place.items()} for place in found]
            if most
            else found
        )

    monkeypatch.setattr(model, "_of_prompt", spoilt)
    rollouts = {**student[1], "max_staleness": 1}
    with pytest.raises(StageError, match="the student knows"):
        done(context_of(tmp_path, inputs, rollouts, teacher_engine=teacher[1]))
    assert not [thread for thread in threading.enumerate() if thread.name == "job queue"]


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"max_staleness": 1, "engine": "vllm"}, "rollouts.max_staleness is of engine vllm_server; vllm has none"),
        ({"in_flight_updates": True}, "rollouts.in_flight_updates is true, but with rollouts.max_staleness 0"),
        (
            {"max_staleness": 1, "weight_transfer": "nccl", "devices": "1", "max_restarts": 0},
            "rollouts.weight_transfer nccl sends weights that are still the trainer's",
        ),
    ],
)
def test_refused(engine: dict[str, Any], said: str) -> None:
    config = Config(rollouts={"engine": "vllm_server", **engine})
    assert any(said in problem for problem in check(config, frozenset({"teacher", "dataset"})))


def test_a_policy_gradient_without_a_correction_is_refused() -> None:
    config = Config(rollouts={"engine": "vllm_server", "max_staleness": 1}, loss_type="iw_opd")
    (said,) = check(config, frozenset({"teacher", "dataset"}))
    assert "importance_sampling_mode is null, but rollouts.max_staleness has completions sampled by older" in said
