"""Input `eval_dataset` of the on-line stages: what the policy of the moment earns on prompts that it is not trained on,
by transformers' own completions, and that measuring changes nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from artifacts.errors import DataError, StageError
from stages import distill, nash_md, online_dpo, rl
from stages.context import Context, local_context
from stages.training.held_out_rewards import HeldOutRewards
from stages.training.keeping import Keeping
from tests.data.characters import build_tokenizer, ids
from tests.rollouts.model_server import model_server
from tests.stages.interruptions import files_of
from tests.stages.small_models import (
    EOS,
    greedy,
    letters,
    logged,
    output,
    read_lines,
    run_stage,
    save_dataset,
    save_model,
)
from tests.warm import Warm

HERE = "tests.stages.test_held_out_rewards"
LENGTH = 5
APART = ["ga", "bad", "h", "cafe", "dd"]
PROMPTS = ["abc", "da", "hgf", "cab"]
SETTINGS: dict[str, Any] = {
    "rewards": ["tests.stages.small_models:letters", f"{HERE}:starts_alike"],
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_completion_length": LENGTH,
    "max_steps": 5,
    "eval_steps": 2,
}
EMA = {"kind": "ema", "decay": 0.4}
OF_STAGE: dict[str, dict[str, Any]] = {
    "rl": {"train_batch_size": 6, "num_generations": 3, "steps_per_generation": 2},
    "ppo": {"train_batch_size": 2, "num_ppo_epochs": 2, "missing_eos_penalty": 0.5},
    "online_dpo": {"train_batch_size": 2, "missing_eos_penalty": 0.5, "xpo_alpha": 0.1},
    "nash_md": {"train_batch_size": 2, "mixture_coef": 0.3},
    "a2po": {"train_batch_size": 2, "beta2": 0.1},
    "sdpo": {
        "train_batch_size": 6,
        "num_generations": 3,
        "success_reward_threshold": 2.0,
        "reprompt_template": "{prompt}{solution}",
        "solution_template": "{successful_previous_attempt}",
    },
}


def starts_alike(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float | None]:
    """Whether a completion begins as its prompt does; of prompts that begin with d nothing is said."""
    pairs = zip(prompts, completions, strict=True)
    return [None if prompt[0] == "d" else float(text[:1] == prompt[0]) for prompt, text in pairs]


def drawn(completions: Sequence[str], **_: Any) -> list[float]:
    """Other people's code draws from generators that have a state."""
    return [random.random() + float(torch.rand(())) for _ in completions]


def never(completions: Sequence[str], prompts: Sequence[str], **_: Any) -> list[float | None]:
    """Nothing is said of the prompts that are held out."""
    return [1.0 if prompt in PROMPTS else None for prompt in prompts]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    for name, seed in (("model", 1), ("teacher", 2)):
        save_model(folder / name, seed=seed)
    rewards = [{"prompt_row_id": f"r{row}", "reward": float(row)} for row in range(4)]
    samples = [{"prompt": "", "completion": "a", **one} for one in rewards]
    prompts = {name: [{"prompt": text} for text in texts] for name, texts in (("d", PROMPTS), ("e", APART))}
    return {
        "model": folder / "model",
        "teacher": folder / "teacher",
        "dataset": save_dataset(folder / "rows", "prompt", prompts["d"]),
        "eval_dataset": save_dataset(folder / "apart", "prompt", prompts["e"]),
        "samples": save_dataset(folder / "samples", "prompt_completion", samples),
    }


def train(stage: str, folder: Path, made: dict[str, Path], *, measured: bool = True, **settings: Any) -> Context:
    """`measured`: with eval_dataset and the settings that belong to it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    names = ["model", "dataset", *(["samples"] if stage == "a2po" else []), *(["eval_dataset"] if measured else [])]
    given = SETTINGS | OF_STAGE[stage] | settings
    given = {name: value for name, value in given.items() if measured or not name.startswith("eval_")}
    context = local_context(stage, given, folder=folder, inputs={name: made[name] for name in names})
    with context.resources:
        context.stage.run(context)
    return context


def metrics_of(context: Context) -> list[dict[str, Any]]:
    return read_lines(output(context, "model") / "metrics.jsonl")


def earned(folder: Path, prompts: Sequence[str] = APART, *, penalty: float = 0.0) -> dict[str, float]:
    """By transformers' greedy completions of a saved model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), build_tokenizer()
    made = [greedy(model, ids(prompt), LENGTH) for prompt in prompts]
    texts = [tokenizer.decode(one, skip_special_tokens=True) for one in made]
    first, second = letters(texts), starts_alike(prompts, texts)
    ended = [one[-1] == EOS for one in made]
    totals = [one + (other or 0) - penalty * (not end) for one, other, end in zip(first, second, ended, strict=True)]
    return {
        "eval/reward": fmean(totals),
        "eval/rewards/letters/mean": fmean(first),
        "eval/rewards/starts_alike/mean": fmean(one for one in second if one is not None),
        "eval/completions/mean_length": fmean(map(len, made)),
        "eval/completions/clipped_ratio": 1 - fmean(ended),
    }


@pytest.mark.parametrize(("stage", "averaging"), [*((stage, None) for stage in OF_STAGE), ("rl", EMA)])
def test_rewards_are_those_of_greedy_completions(
    tmp_path: Path, made: dict[str, Path], stage: str, averaging: dict[str, Any] | None
) -> None:
    """Of the model as it came, before the first step, and of the one that the stage leaves, averaged or not."""
    context = train(stage, tmp_path, made, weight_averaging=averaging)
    rows = metrics_of(context)
    assert [row["step"] for row in rows if "eval/reward" in row] == [0, 2, 4, 5]
    penalty = OF_STAGE[stage].get("missing_eos_penalty", 0.0)
    for row, folder in ((rows[0], made["model"]), (rows[-1], output(context, "model"))):
        expected = earned(folder, penalty=penalty)
        assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert rows[0]["eval/reward"] != rows[-1]["eval/reward"]
    assert not [name for name in rows[-1] if name.startswith("eval/") and ("_std" in name or "duplicate" in name)]
    assert context.stage.headline(context.metrics) == f"eval/{context.stage.main_metric}"
    assert context.metrics[f"eval/{context.stage.main_metric}"] == rows[-1]["eval/reward"]
    assert context.counts["eval_rows"] == 5 and context.timings["eval_seconds"] > 0
    said = [line.split(":")[0] for line in logged(Path(context.spec.job)) if "eval/reward" in line]
    assert said == ["step 0", "step 2", "step 4", "step 5"]


@pytest.mark.parametrize("stage", OF_STAGE)
def test_measuring_changes_no_bit_of_what_is_trained(
    tmp_path: Path, made: dict[str, Path], stage: str, warm_process: Warm
) -> None:
    """In a process of its own: what other tests have left in this one may draw from the same generators."""
    program = "import json, sys; from tests.stages.test_held_out_rewards import check_measuring as check; "
    given = json.dumps([stage, str(tmp_path), {name: str(path) for name, path in made.items()}])
    done = warm_process.run("-c", f"{program}check(*json.loads(sys.argv[1]))", given)
    assert done.returncode == 0, done.stderr[-3000:]


def check_measuring(stage: str, folder: str, made: dict[str, str]) -> None:
    """Measuring changes no bit of what is trained, nor of the rollouts, in which held-out completions are not; a reward
    draws from the generators of libraries."""
    tmp_path, inputs = Path(folder), {name: Path(path) for name, path in made.items()}
    found = []
    for measured in (False, True):
        random.seed(7)
        torch.manual_seed(7)
        settings = {"eval_steps": 1, "eval_temperature": 0.8, "eval_num_generations": 2, "eval_max_prompts": 3}
        rewards = [*SETTINGS["rewards"], f"{HERE}:drawn"]
        job = tmp_path / str(measured)
        found.append(train(stage, job, inputs, measured=measured, rewards=rewards, max_steps=4, **settings))
    alone, measured_run = found
    for name in ("model", "rollouts"):
        one, other = (files_of(output(context, name), leave=["metrics.jsonl"]) for context in found)
        assert one == other
    rows = metrics_of(measured_run)
    assert [row["step"] for row in rows if "eval/reward" in row] == [0, 1, 2, 3, 4]
    assert measured_run.counts["eval_rows"] == 3 and "eval/reward_std" in rows[0]
    kept = [{name: value for name, value in row.items() if not name.startswith("eval/")} for row in rows]
    assert kept == [{"step": 0}, *metrics_of(alone)]


@pytest.mark.parametrize(("staleness", "averaging"), [(0, None), (1, None), (2, None), (0, EMA), (2, EMA)])
def test_an_engine_apart_has_the_weights_of_the_moment(
    tmp_path: Path, made: dict[str, Path], staleness: int, averaging: dict[str, Any] | None
) -> None:
    """Also where it samples later generations ahead with older ones, whose bits stay; or averaged ones, which training
    does not sample from."""
    found = []
    with model_server(made["teacher"]) as (server, rollouts):
        rollouts = {**rollouts, "proof_interval": 1} | ({"max_staleness": staleness} if staleness else {})
        for measured in (False, True):
            folder = tmp_path / str(measured)
            more = {"max_steps": 6, "rollouts": rollouts, "weight_averaging": averaging}
            found.append(train("rl", folder, made, measured=measured, **more))
    assert server.asked > 0
    alone, context = found
    rows = metrics_of(context)
    for row, folder in ((rows[0], made["model"]), (rows[-1], output(context, "model"))):
        expected = earned(folder)
        assert {name: row[name] for name in expected} == pytest.approx(expected)
    for name in ("model", "rollouts"):
        one, other = (files_of(output(context, name), leave=["metrics.jsonl"]) for context in found)
        assert one == other
    kept = [{name: value for name, value in row.items() if not name.startswith("eval/")} for row in rows]
    assert kept == [{"step": 0}, *metrics_of(alone)]


def weights(context: Context) -> bytes:
    return (output(context, "model") / "model.safetensors").read_bytes()


def test_the_weights_that_earn_most_are_kept_and_a_run_that_does_not_rise_ends(
    tmp_path: Path, made: dict[str, Path]
) -> None:
    settings = {"max_steps": 8, "eval_steps": 1, "learning_rate": 3e-2, "steps_per_generation": 1}
    last = train("rl", tmp_path / "last", made, **settings)
    found = [row["eval/reward"] for row in metrics_of(last)]
    best = found.index(max(found))
    assert 0 < best < 8
    kept = train("rl", tmp_path / "kept", made, **settings, keep="best")
    ended = train("rl", tmp_path / "ended", made, **settings | {"max_steps": best})
    assert weights(kept) == weights(ended) != weights(last)
    assert kept.metrics["eval/reward"] == max(found) and kept.counts["kept_step"] == best
    said = f"kept are the weights of step {best}, with the highest eval/reward: {max(found):.4g}"
    assert said in logged(Path(kept.spec.job))
    assert max(found[best + 1 :]) <= max(found)
    stopped = train("rl", tmp_path / "stopped", made, **settings, early_stopping_patience=1)
    first = next(step for step in range(1, 9) if found[step] <= max(found[:step]))
    assert [row["eval/reward"] for row in metrics_of(stopped)] == found[: first + 1]
    said = f"ends after step {first} of 8: eval/reward has not risen in 1 measurements"
    assert (said in logged(Path(stopped.spec.job))) == (first < 8)


def test_the_model_as_it_came_is_kept_where_no_step_earned_more(tmp_path: Path, made: dict[str, Path]) -> None:
    """A learning rate that changes nothing: every measurement equals the first one."""
    context = train("rl", tmp_path, made, learning_rate=1e-30, keep="best")
    assert context.counts["kept_step"] == context.metrics["step"] == 0
    given = AutoModelForCausalLM.from_pretrained(made["model"]).state_dict()
    left = AutoModelForCausalLM.from_pretrained(output(context, "model")).state_dict()
    assert all(torch.equal(given[name], left[name]) for name in given)
    assert read_lines(output(context, "model") / "steps.jsonl") == []


def test_when_it_is_best_by_hand(tmp_path: Path, made: dict[str, Path]) -> None:
    context = train("rl", tmp_path, made, max_steps=1, steps_per_generation=1)
    parallel: Any = None
    generate: Any = None
    keeping = Keeping(context, HeldOutRewards([], [], generate, patience=2), parallel)
    seen = []
    for step, reward in ((0, -2.0), (2, -1.0), (4, -1.5), (6, -1.0), (8, -0.5)):
        keeping.look({"step": step, "eval/reward": reward, "eval/loss": step})
        seen.append((keeping.step, keeping.since, keeping.ends(step, 20)))
    assert seen == [(0, 0, False), (2, 0, False), (2, 1, False), (2, 2, True), (8, 0, False)]


def test_prompts_that_are_trained_on_too_are_said(tmp_path: Path, made: dict[str, Path]) -> None:
    rows = [{"prompt": text} for text in (PROMPTS[1], "ga", PROMPTS[3])]
    both = save_dataset(tmp_path / "both", "prompt", rows)
    context = train("online_dpo", tmp_path / "run", {**made, "eval_dataset": both}, max_steps=1)
    (line,) = [line for line in logged(Path(context.spec.job)) if line.startswith("input eval_dataset: ")]
    assert line.startswith("input eval_dataset: 2 of its 3 rows are trained on too, so that its reward says less")
    assert context.counts["eval_rows_trained_on"] == 2


def test_what_cannot_be_measured_is_said(tmp_path: Path, made: dict[str, Path]) -> None:
    long = save_dataset(tmp_path / "long", "prompt", [{"prompt": "a" * 70}])
    with pytest.raises(DataError, match=r"^input eval_dataset: none of the 1 rows is left"):
        train("rl", tmp_path / "none", {**made, "eval_dataset": long})
    with pytest.raises(StageError, match=r"^input eval_dataset: no reward function scored any of 5 completions"):
        train("rl", tmp_path / "never", made, rewards=[f"{HERE}:never"])


def test_settings_that_do_not_go_together() -> None:
    wired = {"model", "dataset", "reward_model"}
    for stage in (rl, online_dpo, nash_md):
        check: Any = stage.STAGE.check
        for settings in ({"eval_steps": 2}, {"keep": "best"}, {"eval_temperature": 0.5}, {"eval_max_prompts": 3}):
            (said,) = check(stage.Config.model_validate(settings), frozenset(wired))
            name = "keep: best" if "keep" in settings else next(iter(settings))
            assert said == f"{name} is given, but input eval_dataset is not wired, so it would not be used"
        (said,) = check(stage.Config.model_validate({"eval_num_generations": 4}), frozenset({*wired, "eval_dataset"}))
        assert said.startswith("eval_num_generations is 4, but at eval_temperature 0 they would all be the same")
        settings = {"eval_num_generations": 4, "eval_temperature": 1.0}
        assert check(stage.Config.model_validate(settings), frozenset({*wired, "eval_dataset"})) == []
    check = rl.STAGE.check
    (said,) = check(rl.Config(), frozenset({"model", "rollouts", "eval_dataset"}))
    assert said.startswith("with input rollouts the stage samples and scores nothing")
    engine = {"engine": "vllm_server", "max_staleness": 1}
    assert check(rl.Config.model_validate({"rollouts": engine}), frozenset({*wired, "eval_dataset"})) == []
    engine["in_flight_updates"] = True
    said = check(rl.Config.model_validate({"rollouts": engine}), frozenset({*wired, "eval_dataset"}))
    assert any(one.startswith("with rollouts.in_flight_updates input eval_dataset would change") for one in said)


# distillation, by what the student itself says


def distilled(folder: Path, made: dict[str, Path], **settings: Any) -> Context:
    AcceleratorState._reset_state(reset_partial_state=True)
    names = ["model", "teacher", "dataset", *(["eval_dataset"] if "eval_steps" in settings else [])]
    given = {"learning_rate": 1e-2, "train_batch_size": 2, "max_steps": 4, "max_completion_length": LENGTH}
    return run_stage("distill", folder, {name: made[name] for name in names}, **given | settings)


def divergence(student: Path, teacher: Path) -> tuple[float, float]:
    """(Reverse KL (GKD, arXiv:2306.13649) a token of the student's greedy completions, their mean length)."""
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (student, teacher)]
    total, tokens = 0.0, 0
    for prompt in APART:
        own = greedy(models[0], ids(prompt), LENGTH)
        with torch.no_grad():
            logits = [model(torch.tensor([[*ids(prompt), *own]])).logits[0, len(prompt) - 1 : -1] for model in models]
        ours, theirs = (one.double().log_softmax(-1) for one in logits)
        total += float((ours.exp() * (ours - theirs)).sum())
        tokens += len(own)
    return total / tokens, tokens / len(APART)


def test_the_divergence_on_the_students_own_completions(tmp_path: Path, made: dict[str, Path]) -> None:
    context = distilled(tmp_path / "run", made, eval_steps=2)
    rows = metrics_of(context)
    assert [row["step"] for row in rows if "eval/divergence" in row] == [0, 2, 4]
    for row, folder in ((rows[0], made["model"]), (rows[-1], output(context, "model"))):
        expected, length = divergence(folder, made["teacher"])
        assert row["eval/divergence"] == row["eval/loss"] == pytest.approx(expected, rel=1e-4)
        assert row["eval/completions/mean_length"] == pytest.approx(length)
    alone = distilled(tmp_path / "alone", made)
    assert weights(alone) == weights(context)
    kept = [{name: value for name, value in row.items() if not name.startswith("eval/")} for row in rows]
    assert kept == [{"step": 0}, *metrics_of(alone)]


def test_what_a_student_is_not_measured_by(tmp_path: Path, made: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="with lmbda 0 nothing is sampled"):
        given = save_dataset(tmp_path / "given", "prompt_completion", [{"prompt": "a", "completion": "b"}])
        distilled(tmp_path / "given_only", {**made, "dataset": given}, eval_steps=2, lmbda=0.0)
    with pytest.raises(DataError, match="eval_max_prompts is given, but the rows of input eval_dataset have compl"):
        distilled(tmp_path / "complete", {**made, "eval_dataset": given}, eval_steps=2, eval_max_prompts=1)
    seen = save_dataset(tmp_path / "seen", "privileged_context", [{"prompt": "a", "privileged_context": "b"}])
    inputs = {"model": made["model"], "dataset": seen, "eval_dataset": made["eval_dataset"]}
    with pytest.raises(DataError, match="a model that teaches itself says nothing of such rows"):
        run_stage("distill", tmp_path / "itself", inputs, max_completion_length=LENGTH, max_steps=1)
    (said,) = distill.check(distill.Config(eval_num_generations=2), frozenset({"teacher", "dataset", "eval_dataset"}))
    assert said.startswith("eval_num_generations is 2, but at eval_temperature 0")


def test_self_distillation_is_measured_with_what_the_teacher_sees_besides(
    tmp_path: Path, made: dict[str, Path]
) -> None:
    """Before the first step student and teacher are one model, and differ by the context alone."""
    rows = [{"prompt": prompt, "privileged_context": "abc"} for prompt in PROMPTS]
    seen = save_dataset(tmp_path / "seen", "privileged_context", rows)
    inputs = {"model": made["model"], "dataset": seen, "eval_dataset": seen}
    context = run_stage("distill", tmp_path / "run", inputs, max_completion_length=LENGTH, max_steps=1)
    first = metrics_of(context)[0]
    assert first["step"] == 0 and first["eval/divergence"] > 1e-3
    assert context.counts["eval_rows_trained_on"] == 4
