"""The stage `sdpo`: its steps worked out on transformers' logits, and that it is `rl` without a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import AutoModelForCausalLM

from artifacts.errors import DataError, StageError
from stages.losses.distillation import divergence_of
from stages.losses.self_distillation import OwnTop, own_top_divergence, sampled_token
from stages.training import generation, initial, measuring
from stages.training.batch import Group
from stages.training.following import Follower
from stages.training.reference import branch_logprobs
from stages.training.self_teacher import SelfTeacher
from tests.data.characters import IDS, build_tokenizer, ids
from tests.stages.small_models import (
    logged,
    output,
    read_lines,
    rows_of,
    run_stage,
    save_dataset,
    save_model,
)
from tests.training import multimodal_models
from tests.training.conftest import tiny_model
from tests.training.experts import EXPERTS

HERE = "tests.stages.test_sdpo"
PROMPTS = [{"prompt": prompt, "said": said} for prompt, said in (("abc", "h"), ("da", None), ("hgf", "eh"))]
SETTINGS: dict[str, Any] = {
    "rewards": [f"{HERE}:longer"],
    "train_batch_size": 12,
    "num_generations": 4,
    "max_completion_length": 5,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "temperature": 0.8,
    "reprompt_template": "{prompt}{solution}{feedback}",
    "solution_template": "ce{successful_previous_attempt}",
}
FEEDBACK = {"feedback_template": "f{feedback_raw}"}


def longer(completions: Sequence[Any], **_: Any) -> list[float | None]:
    """Completions of more than three characters succeed; of empty ones nothing is known."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [float(len(text) > 3) if text else None for text in texts]


def lengths(completions: Sequence[str], **_: Any) -> list[float]:
    return [len(one) / 2 for one in completions]


def one_prompt(completions: Sequence[str], prompts: Sequence[str], **_: Any) -> list[float]:
    """Of three prompts, one has completions that differ; none succeeds."""
    return [len(one) / 9 if prompt == "da" else 0.0 for one, prompt in zip(completions, prompts, strict=True)]


def first_alone(completions: Sequence[str], **_: Any) -> list[float]:
    return [1.0, *[0.0] * (len(completions) - 1)]


def broken(completions: Sequence[str], **_: Any) -> list[str | None]:
    return ["h\udc80"] * len(completions)


def short(completions: Sequence[str], **_: Any) -> list[str | None]:
    return ["h"]


def spoken(completions: Sequence[str], **_: Any) -> str:
    return "h"


def failing(completions: Sequence[str], **_: Any) -> list[str | None]:
    raise ValueError("no")


def never(completions: Sequence[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def remark(completions: Sequence[Any], prompts: Sequence[Any], **_: Any) -> list[str | None]:
    """Of a completion of two characters, its first one."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [text[0] if len(text) == 2 else None for text in texts]


def numbers(completions: Sequence[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("made")
    start = save_model(folder / "model", seed=1)
    return {"start": start, "model": folder / "model", "dataset": save_dataset(folder / "rows", "prompt", PROMPTS)}


def trained(
    made: dict[str, Any], folder: Path, stage: str = "sdpo", **settings: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(metrics, rollouts) of a run in that folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    inputs = {"model": made["model"], "dataset": made["dataset"]}
    context = run_stage(stage, folder, inputs, **{**SETTINGS, **settings})
    return read_lines(output(context, "model") / "metrics.jsonl"), rows_of(output(context, "rollouts"))


def exported(folder: Path) -> Path:
    return folder / "job" / "out" / "model"


def logits(model: Any, before: Sequence[int], completion: Sequence[int]) -> Tensor:
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([[*before, *completion]])).logits[0].double()
    return whole[len(before) - 1 : -1] / SETTINGS["temperature"]


def distillation(policy: Any, teacher: Any, rows: list[dict[str, Any]], compare: Any) -> float:
    """The mean over completions of the mean over their tokens, 0 where there is no teacher."""
    values = [
        float(compare(*(logits(*one, row["token_ids"]) for one in read), torch.tensor(row["token_ids"])).mean())
        for row in rows
        if row["teacher_prompt_ids"]
        for read in [((policy, row["prompt_ids"]), (teacher, row["teacher_prompt_ids"]))]
    ]
    assert values
    return sum(values) / len(rows)


def of_samples(student_NV: Tensor, teacher_NV: Tensor, tokens_N: Tensor) -> Tensor:
    logs = [one.log_softmax(1).gather(1, tokens_N[:, None])[:, 0] for one in (student_NV, teacher_NV)]
    return sampled_token(*logs)


MODES: dict[str, tuple[dict[str, Any], Any]] = {
    "sampled": ({}, of_samples),
    "all": (
        {"distillation_mode": "full_logits", "distillation_alpha": 0.3},
        lambda student, teacher, _: divergence_of(0.3).of_logits(student, teacher),
    ),
    "likeliest": (
        {
            "distillation_mode": "topk_logits",
            "distillation_topk": 3,
            "distillation_add_tail": True,
            "distillation_weight": 0.4,
            "rewards": [f"{HERE}:lengths"],
            "success_reward_threshold": 2.0,
        },
        lambda student, teacher, _: own_top_divergence(student, teacher, OwnTop(3, True), divergence_of(1.0)),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_first_loss(made: dict[str, Any], tmp_path: Path, mode: str) -> None:
    settings, compare = MODES[mode]
    weight = settings.get("distillation_weight", 1.0)
    metrics, rollouts = trained(made, tmp_path / "whole", **settings)
    rows = [row for row in rollouts if row["step"] == 1]
    # on policy the policy's loss is the mean of -A over all tokens
    lengths = [len(row["token_ids"]) for row in rows]
    assert 0 < sum(bool(row["teacher_prompt_ids"]) for row in rows) < len(rows)
    assert weight == 1 or any(row["advantage"] for row in rows)
    policy = -sum(row["advantage"] * length for row, length in zip(rows, lengths, strict=True)) / sum(lengths)
    expected = weight * distillation(made["start"], made["start"], rows, compare) + (1 - weight) * policy
    assert metrics[0]["loss"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert not any("teacher_prompt_ids" in row for row in read_lines(exported(tmp_path / "whole") / "samples.jsonl"))
    # cut into other micro-batches, the steps are the same
    cut, _ = trained(made, tmp_path / "cut", **settings, micro_batch_tokens=4)
    for row, other in zip(metrics, cut, strict=True):
        assert (other["loss"], other["grad_norm"]) == pytest.approx((row["loss"], row["grad_norm"]), rel=1e-4)


@pytest.mark.parametrize(("kind", "rate"), [("base", 0.0), ("ema", 0.25), ("live", 1.0)])
def test_the_teacher_of_the_second_step(made: dict[str, Any], tmp_path: Path, kind: str, rate: float) -> None:
    """The model as it came, moved towards the policy after the first step, or the policy itself."""
    settings: dict[str, Any] = {"teacher_model_kind": kind, **MODES["all"][0]}
    if kind == "ema":
        settings["teacher_update_rate"] = rate
    trained(made, tmp_path / "one", **settings, max_steps=1)
    after = AutoModelForCausalLM.from_pretrained(exported(tmp_path / "one"))
    metrics, rollouts = trained(made, tmp_path / "two", **settings)
    teacher = deepcopy(made["start"])
    with torch.no_grad():
        for weight, moved in zip(teacher.parameters(), after.parameters(), strict=True):
            weight.copy_((1 - rate) * weight + rate * moved)
    second = [row for row in rollouts if row["step"] == 2]
    expected = distillation(after, teacher, second, MODES["all"][1])
    assert metrics[1]["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_teacher_that_follows_computes_in_bfloat16_and_moves_in_float32(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    states: set[torch.dtype] = set()
    before, hidden = Follower.before, SelfTeacher.hidden

    def moved(self: Follower, step: int) -> None:
        policy = {name: self.trainer.parallel.weight(name).clone() for name in self.trainer.parallel.shapes()}
        kept = {name: one.clone() for name, one in self.tensors().items()}
        before(self, step)
        name = next(name for name in policy if not torch.equal(policy[name], kept[name])) if step else next(iter(kept))
        expected = kept[name].double().lerp(policy[name].double(), 0.05 if step else 0.0)
        used = self.scorer.state_dict()[name].clone()
        seen.append({"expected": expected, "kept": self.tensors()[name].clone(), "used": used})

    def told(self: SelfTeacher, batch: Any) -> Tensor:
        found = hidden(self, batch)
        states.add(found.dtype)
        return found

    monkeypatch.setattr(Follower, "before", moved)
    monkeypatch.setattr(SelfTeacher, "hidden", told)
    trained(made, tmp_path, bf16=True, max_steps=3, learning_rate=1e-4)
    assert states == {torch.bfloat16} and len(seen) == 3
    for one in seen:
        assert one["kept"].dtype == torch.float32
        torch.testing.assert_close(one["kept"].double(), one["expected"], rtol=1e-7, atol=1e-9)
        assert torch.equal(one["used"], one["kept"].bfloat16())


def seen_of_old(made: dict[str, Any], folder: Path, **settings: Any) -> tuple[list[Group], list[dict[str, Any]], Any]:
    """(groups of which the policy's log-probabilities were computed for later steps, rollouts, metrics)."""
    found: list[Group] = []

    def computed(scorer: Any, groups: Sequence[Group], *rest: Any, **more: Any) -> Any:
        found.extend(groups)
        return branch_logprobs(scorer, groups, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        for module in (generation, measuring):
            patch.setattr(module, "branch_logprobs", computed, raising=False)
        metrics, rollouts = trained(made, folder, num_iterations=2, **settings)
    return found, rollouts, metrics


def test_completions_that_are_not_taught_have_no_old_logprobs(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same steps, where a second one compares with the policy at sampling time; without a bound of what a token
    counts, nothing compares."""
    found, rollouts, metrics = seen_of_old(made, tmp_path / "some")
    taught = [row["token_ids"] for row in rollouts if row["teacher_prompt_ids"]]
    assert 0 < len(taught) < len(rollouts) == SETTINGS["train_batch_size"]
    assert [list(branch.token_ids) for group in found for branch in group.branches] == taught
    none, _, unbounded = seen_of_old(made, tmp_path / "none", distillation_is_clip=None)
    assert not none and unbounded[1]["loss"] != metrics[1]["loss"]
    monkeypatch.setattr(measuring, "only_where", lambda teaches, compared: measuring.every_branch)
    every, _, same = seen_of_old(made, tmp_path / "all")
    assert sum(len(group.branches) for group in every) == len(rollouts)
    for row, other in zip(metrics, same, strict=True):
        assert (other["loss"], other["grad_norm"]) == pytest.approx((row["loss"], row["grad_norm"]), rel=1e-4)


def test_the_records(made: dict[str, Any], tmp_path: Path) -> None:
    """The first success of a group that is not oneself, its text in the teacher's prompt."""
    metrics, rollouts = trained(made, tmp_path, max_steps=1)
    by_id = {row["row_id"]: row for row in rollouts}
    for row in rollouts:
        siblings = [one for one in rollouts if one["group"] == row["group"] and one is not row]
        wins = [one["row_id"] for one in siblings if one["reward"] == 1.0]
        assert row["taught_by"] == (wins[0] if wins else None) and row["feedback"] is None
        shown = f"{row['prompt']}ce{by_id[wins[0]]['completion']}" if wins else ""
        assert row["teacher_prompt_ids"] == ids(shown)
    taught = sum(row["taught_by"] is not None for row in rollouts)
    assert metrics[0]["self_distillation/reprompt_sample_fraction"] == pytest.approx(taught / len(rollouts))


def test_without_a_teacher_it_is_rl(made: dict[str, Any], tmp_path: Path) -> None:
    """The same bytes: metrics, weights and rollouts."""
    plain = {name: value for name, value in SETTINGS.items() if not name.endswith("_template")}
    settings = plain | {"num_iterations": 2, "beta": 0.1, "max_steps": 4}
    found = []
    for stage, more in (("rl", {}), ("sdpo", {"distillation_weight": 0.0})):
        folder = tmp_path / stage
        AcceleratorState._reset_state(reset_partial_state=True)
        inputs = {"model": made["model"], "dataset": made["dataset"]}
        context = run_stage(stage, folder, inputs, **settings, **more)
        weights = (exported(folder) / "model.safetensors").read_bytes()
        found.append(((exported(folder) / "metrics.jsonl").read_bytes(), weights, rows_of(output(context, "rollouts"))))
    assert found[0] == found[1]


def test_conversations_with_what_is_said_of_them(tmp_path: Path) -> None:
    """The user's last turn becomes the prompt of the teacher."""
    save_model(tmp_path / "model", seed=1)
    chats = [{"prompt": [{"role": "user", "content": text}]} for text in ("abc", "da", "hgf")]
    made = {
        "model": tmp_path / "model",
        "dataset": save_dataset(tmp_path / "rows", "prompt", chats, conversational=True),
    }
    settings = {"feedback_function": f"{HERE}:remark", **FEEDBACK, "max_steps": 3}
    metrics, rollouts = trained(made, tmp_path / "run", **settings)
    by_id = {row["row_id"]: row for row in rollouts}
    seen = set()
    for row in rollouts:
        text = row["completion"][0]["content"]
        said = text[0] if len(text) == 2 else None
        taught = row["taught_by"]
        solution = "" if taught is None else f"ce{by_id[taught]['completion'][0]['content']}"
        shown = f"<{row['prompt'][0]['content']}{solution}{'' if said is None else f'f{said}'}>"
        expected = [] if taught is None and said is None else ids(shown)
        assert row["feedback"] == said and row["teacher_prompt_ids"] == expected
        seen.add((taught is not None, said is not None))
    assert {(True, False), (True, True)} <= seen
    assert metrics[0]["self_distillation/feedback_used_fraction"] == pytest.approx(
        sum(row["feedback"] is not None for row in rollouts if row["step"] == 1) / 12
    )


def test_feedback_of_a_column_alone(made: dict[str, Any], tmp_path: Path) -> None:
    settings = {"feedback_column": "said", **FEEDBACK, "use_successful_as_teacher": False, "rewards": [f"{HERE}:never"]}
    plain = {name: value for name, value in SETTINGS.items() if name != "solution_template"}
    AcceleratorState._reset_state(reset_partial_state=True)
    inputs = {"model": made["model"], "dataset": made["dataset"]}
    context = run_stage("sdpo", tmp_path, inputs, **{**plain, **settings, "max_steps": 1})
    rows = rows_of(output(context, "rollouts"))
    assert {(row["prompt"], tuple(row["teacher_prompt_ids"])) for row in rows} == {
        ("abc", tuple(ids("abcfh"))),
        ("da", ()),
        ("hgf", tuple(ids("hgffeh"))),
    }
    (metrics,) = read_lines(output(context, "model") / "metrics.jsonl")
    # rewards are flat, and yet two groups of three teach
    assert metrics["self_distillation/reprompt_sample_fraction"] == pytest.approx(2 / 3) and metrics["grad_norm"] > 0


def test_the_policys_loss_is_logged_as_it_counts(made: dict[str, Any], tmp_path: Path) -> None:
    """Over all items of the step, those of groups that are not computed among them; the passes see one group alone."""
    settings = {"rewards": [f"{HERE}:one_prompt"], "distillation_weight": 0.5, "max_steps": 1}
    (row,), _ = trained(made, tmp_path, **settings)
    assert row["self_distillation/reprompt_sample_fraction"] == 0 and row["frac_reward_zero_std"] > 0.5
    assert row["loss"] != 0 and row["self_distillation/policy_loss"] == pytest.approx(row["loss"] / 0.5)


def test_what_is_not_trained_is_not_taught(made: dict[str, Any], tmp_path: Path) -> None:
    """Nor counted, nor recorded."""
    metrics, rollouts = trained(made, tmp_path, mask_truncated_completions=True)
    taught = [bool(row["teacher_prompt_ids"]) for row in rollouts]
    assert any(taught) and all(row["finished"] for row, one in zip(rollouts, taught, strict=True) if one)
    assert not any(row["taught_by"] for row in rollouts if not row["finished"])
    shares = [row["self_distillation/reprompt_sample_fraction"] for row in metrics]
    assert sum(shares) / 2 == pytest.approx(sum(taught) / len(taught))


def test_all_completions_count_in_the_balance_of_experts(made: dict[str, Any], tmp_path: Path) -> None:
    """As where the policy's loss needs them."""
    model = tiny_model("mixtral", **{**EXPERTS["mixtral"], "vocab_size": len(IDS), "eos_token_id": IDS["<eos>"]})
    model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    found = []
    for name, weight in (("alone", 1.0), ("beside", 1 - 1e-6)):
        settings: dict[str, Any] = {"router_aux_loss_coef": 0.1, "max_steps": 1, "distillation_weight": weight}
        settings["rewards"] = [f"{HERE}:first_alone"]
        (row,), _ = trained({**made, "model": tmp_path / "model"}, tmp_path / name, **settings)
        assert 0 < row["self_distillation/reprompt_sample_fraction"] < 1
        found.append(row["aux_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_where_nothing_is_taught_nothing_moves(made: dict[str, Any], tmp_path: Path) -> None:
    """And the log says so once there were enough steps; prompts that are too long are told from failures."""
    settings = {"max_steps": 20, "train_batch_size": 4, "weight_decay": 0.0, "temperature": 1.0}
    metrics, _ = trained(made, tmp_path / "failed", **settings, rewards=[f"{HERE}:never"])
    assert {(row["loss"], row["grad_norm"]) for row in metrics} == {(0.0, 0.0)}
    said = [line for line in logged(tmp_path / "failed" / "job") if "nothing_taught" in line]
    assert len(said) == 1 and "lower success_reward_threshold" in said[0]
    metrics, rollouts = trained(made, tmp_path / "long", **settings | {"max_steps": 1}, max_reprompt_len=3)
    assert metrics[0]["self_distillation/too_long_fraction"] > 0 and metrics[0]["grad_norm"] == 0
    assert any(row["taught_by"] for row in rollouts) and not any(row["teacher_prompt_ids"] for row in rollouts)
    assert not any("prompts of the teacher may have" in line for line in logged(tmp_path / "long" / "job"))
    # the model's context of 64 has room for 59
    assert "prompts of the teacher may have 59 tokens" in "".join(logged(tmp_path / "failed" / "job"))


def test_one_that_follows_weights_in_bfloat16(made: dict[str, Any], tmp_path: Path) -> None:
    """It stays in float32."""
    metrics, _ = trained(made, tmp_path, bf16=True, pure_bf16=True)
    assert all(row["grad_norm"] > 0 for row in metrics)


def test_one_that_follows_the_text_of_a_multimodal_model(made: dict[str, Any], tmp_path: Path) -> None:
    """What does not train is no part of what follows, nor of the checkpoints."""
    multimodal_models.save(tmp_path / "model", "gemma3")
    metrics, _ = trained({**made, "model": tmp_path / "model"}, tmp_path / "run", max_steps=3)
    assert len(metrics) == 3


def test_adapters_of_a_live_teacher(made: dict[str, Any], tmp_path: Path) -> None:
    metrics, _ = trained(made, tmp_path, teacher_model_kind="live", lora_r=2)
    assert all(row["grad_norm"] > 0 for row in metrics)


@pytest.mark.parametrize("start", ["default", "pissa"])
def test_a_base_without_its_adapters_is_no_second_model(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """As from a copy of the model, also where adapters hold a part of its weights."""
    settings = {**MODES["all"][0], "teacher_model_kind": "base", "lora_r": 2, "init_lora_weights": start}
    loads: list[str] = []
    original = initial.frozen_scorer
    monkeypatch.setattr(initial, "frozen_scorer", lambda *given, **more: loads.append("") or original(*given, **more))
    metrics, _ = trained(made, tmp_path / "one", **settings, max_steps=3)
    assert not loads
    monkeypatch.setattr(initial, "is_adapted", lambda model: False)
    copied, _ = trained(made, tmp_path / "two", **settings, max_steps=3)
    assert len(loads) == 1
    for row, other in zip(metrics, copied, strict=True):
        assert row["loss"] > 1e-4
        assert (row["loss"], row["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"feedback_column": "sad"},
            DataError,
            r"feedback_column is sad; the dataset's columns are row_id, prompt, said",
        ),
        (
            {"feedback_function": f"{HERE}:numbers"},
            StageError,
            r"'numbers' returned 1.0 for row r\d, completion 0; give",
        ),
        (
            {"feedback_function": f"{HERE}:broken"},
            StageError,
            r"feedback_function 'broken' returned 'h\\udc80' for row r\d, completion 0; give a text, or None",
        ),
        (
            {"feedback_function": f"{HERE}:short"},
            StageError,
            r"feedback_function 'short' returned 1 values for 12 .* a list of 12, one text \(or None\) a completion",
        ),
        (
            {"feedback_function": f"{HERE}:spoken"},
            StageError,
            r"feedback_function 'spoken' returned 'h'; it must return a list of 12, one text",
        ),
        (
            {"feedback_function": f"{HERE}:failing"},
            StageError,
            r"feedback_function 'failing' raised ValueError: no.* for row r\d, completion 0",
        ),
    ],
)
def test_feedback_that_is_none(
    made: dict[str, Any], tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trained(made, tmp_path, **settings)
