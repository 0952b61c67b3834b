"""The objective of judged completions and its step-wide terms, against losses written out on separate rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from artifacts.errors import DataError
from stages.context import Context, local_context
from stages.losses.unpaired import UNPAIRED_LOSSES
from stages.training import density_ratio
from stages.training.batch import Branch, Group
from stages.training.density_ratio import logistic_regression, prompt_states
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.out_of_memory import TokenBudget
from stages.training.processes import prepare_process
from stages.training.unpaired import Judged, KLWindows, ShiftWindows, UnpairedLoss
from stages.training.windows import DatasetWindows
from stages.unpaired_preference import Config
from tests.training.conftest import packing_scorer, random_groups, tiny_model
from tests.training.test_objectives import agree, plain_logprobs

BETA = 0.3
MEASURED = {"kto": ["kl"], "bco": ["delta"], "apo_zero_unpaired": []}


def judged_groups(count: int = 8) -> list[Group]:
    """Completions whose references are made up, each with the next one's as its mismatched one."""
    made = random_groups(count, 1)
    groups = []
    for index, group in enumerate(made):
        other = tuple(made[(index + 1) % count].branches[0].token_ids)
        tokens = len(group.branches[0].token_ids)
        data = Judged(index % 3 != 1, -3.0 * tokens + index, other, -4.5 * len(other), density=0.5 + index)
        groups.append(replace(group, data=data))
    return groups


def objective(name: str) -> UnpairedLoss:
    return UnpairedLoss(UNPAIRED_LOSSES[name].with_settings({"beta": BETA}), BETA, MEASURED[name])


@pytest.mark.parametrize("name", MEASURED)
def test_objective(name: str) -> None:
    """Against the formulas with plain tensors; the step's terms are given."""
    scorer = Scorer(tiny_model().double())
    groups = [replace(group, data=replace(group.data, kl=0.7, shift=-0.4)) for group in judged_groups()]
    expected = torch.zeros((), dtype=torch.float64)
    rewards: dict[bool, list[float]] = {True: [], False: []}
    for group, row in zip(groups, plain_logprobs(scorer, groups), strict=True):
        known: Judged = group.data
        ratio, sign = row.sum() - known.reference, 1 if known.desirable else -1
        rewards[known.desirable].append(BETA * float(ratio.detach()))
        if name == "kto":
            expected = expected + 1 - (sign * BETA * (ratio - 0.7)).sigmoid()
        elif name == "apo_zero_unpaired":
            expected = expected + 1 - (sign * BETA * ratio).sigmoid()
        else:
            weight = 1.0 if known.desirable else known.density
            expected = expected - weight * (sign * (BETA * ratio + 0.4)).sigmoid().log()
    found = agree(scorer, objective(name), groups, expected)
    assert found["rewards/chosen"] == pytest.approx(sum(rewards[True]) / len(rewards[True]), rel=1e-9)
    assert found["rewards/rejected"] == pytest.approx(sum(rewards[False]) / len(rewards[False]), rel=1e-9)
    step = {"kto": {"kl": 0.7}, "bco": {"delta": -0.4}, "apo_zero_unpaired": {}}[name]
    assert {key: found[key] for key in ("kl", "delta") if key in found} == pytest.approx(step)


class Stop(Exception):
    """Stands for a kill between two steps."""


class StoppingWindows(DatasetWindows):
    stop_before = -1

    def window(self, step: int) -> Any:
        if step == self.stop_before:
            raise Stop
        return super().window(step)


def context_for(folder: Path, **settings: Any) -> Context:
    folder.mkdir(exist_ok=True)
    for name in ("model", "dataset"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "content").write_text(name)
    defaults = {"learning_rate": 1e-2, "train_batch_size": 4, "max_steps": 5, "checkpoint_steps": 1}
    inputs = {name: folder / name for name in ("model", "dataset")}
    return local_context("unpaired_preference", Config(**(defaults | settings)), folder=folder, inputs=inputs)


def train(
    folder: Path, name: str, groups: list[Group], *, stop_before: int = -1, **settings: Any
) -> tuple[Scorer, list[dict[str, float]]]:
    context = context_for(folder, **settings)
    scorer = packing_scorer(tiny_model())
    trainer = Trainer(context, context.config, prepare_process(context), scorer, objective(name))
    inner = StoppingWindows(groups, context.config)
    inner.stop_before = stop_before
    windows = KLWindows(inner, trainer) if name == "kto" else ShiftWindows(inner, trainer, BETA)
    return scorer, trainer.run(windows).metrics


def first_step(folder: Path, groups: list[Group]) -> list[Group]:
    by_id = {group.row_id: group for group in groups}
    window = DatasetWindows(groups, context_for(folder).config).window(0)
    return [by_id[group.row_id] for group in window.groups]


def test_kl_term_is_of_the_step(tmp_path: Path) -> None:
    """Against the mismatched completions scored alone; the same however the step is cut, and for any order of rows."""
    groups = judged_groups()
    used = first_step(tmp_path / "step", groups)
    others = [replace(group, branches=(Branch(group.data.mismatched),)) for group in used]
    sums = [float(row.detach().sum()) for row in plain_logprobs(packing_scorer(tiny_model()), others)]
    kl = sum(value - group.data.mismatched_reference for value, group in zip(sums, used, strict=True)) / len(used)
    _, whole_metrics = train(tmp_path / "whole", "kto", groups, micro_batch_tokens=8192)
    _, cut_metrics = train(tmp_path / "cut", "kto", groups, micro_batch_tokens=16)
    assert kl > 0 and whole_metrics[0]["kl"] == pytest.approx(kl, rel=1e-5)
    for one, other in zip(whole_metrics, cut_metrics, strict=True):
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-3)  # a difference of sums of about 30
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_kl_term_knows_neither_batch_size_nor_order(tmp_path: Path) -> None:
    """Whole steps of two and of eight rows: the KL terms of the small steps have the mean of the large one's. And a
    row's own term, with the completion it was given, is the same however the rows are ordered."""
    far = [-20.0 * len(one.data.mismatched) for one in judged_groups()]  # every term is above 0
    data = [replace(one.data, mismatched_reference=sums) for one, sums in zip(judged_groups(), far, strict=True)]
    groups = [replace(one, data=known) for one, known in zip(judged_groups(), data, strict=True)]
    context = context_for(tmp_path / "run", train_batch_size=8)
    trainer = Trainer(context, context.config, prepare_process(context), packing_scorer(tiny_model()), objective("kto"))
    windows = KLWindows(DatasetWindows(groups, context.config), trainer)
    whole = windows.data(0, groups)
    assert len({one.kl for one in whole}) == 1 and whole[0].kl > 0
    backwards = windows.data(0, groups[::-1])
    assert backwards[0].kl == pytest.approx(whole[0].kl, rel=1e-5)
    parts = [windows.data(0, groups[start : start + 2])[0].kl for start in range(0, 8, 2)]
    assert min(parts) > 0 and sum(parts) / 4 == pytest.approx(whole[0].kl, rel=1e-5)
    alone = [windows.data(0, [group])[0].kl for group in groups]
    assert sum(alone) / 8 == pytest.approx(whole[0].kl, rel=1e-5)


def test_kl_term_is_never_negative(tmp_path: Path) -> None:
    groups = [replace(one, data=replace(one.data, mismatched_reference=0.0)) for one in judged_groups()]
    _, metrics = train(tmp_path, "kto", groups, max_steps=1)
    assert metrics[0]["kl"] == 0.0


def test_reward_shift_is_the_mean_of_all_rewards_so_far(tmp_path: Path) -> None:
    """The first step's by hand; then every step's rewards, which the log has, are averaged in."""
    groups = judged_groups()
    used = first_step(tmp_path / "step", groups)
    rows = plain_logprobs(packing_scorer(tiny_model()), used)
    rewards = [BETA * (float(row.detach().sum()) - one.data.reference) for row, one in zip(rows, used, strict=True)]
    _, metrics = train(tmp_path / "run", "bco", groups)
    assert metrics[0]["delta"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-5)
    windows = DatasetWindows(groups, context_for(tmp_path / "step").config)
    total = 0.0
    for step, row in enumerate(metrics):
        good = sum(group.data.desirable for group in windows.window(step).groups)
        total += good * row.get("rewards/chosen", 0.0) + (4 - good) * row.get("rewards/rejected", 0.0)
        assert row["delta"] == pytest.approx(total / (4 * (step + 1)), rel=1e-4)


def test_reward_shift_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of two rows with log-ratios 2 and 4, then 0 and -2: means 3, then (2 + 4 + 0 - 2) / 4 = 1, times beta."""
    context = context_for(tmp_path)
    trainer = Trainer(context, context.config, prepare_process(context), packing_scorer(tiny_model()), objective("bco"))
    windows = ShiftWindows(DatasetWindows(judged_groups(), context.config), trainer, BETA)
    steps = iter([[2.0, 4.0], [0.0, -2.0], [1.0, 1.0]])
    monkeypatch.setattr(windows, "measured", lambda *_: torch.tensor([[row] for row in next(steps)]).double())
    groups = [replace(group, data=Judged(True, 0.0)) for group in judged_groups(2)]
    assert [one.shift for one in windows.data(0, groups)] == pytest.approx([3 * BETA] * 2)
    assert [one.shift for one in windows.data(1, groups)] == pytest.approx([1 * BETA] * 2)
    # and on from what a checkpoint holds: 4 rows of mean beta, two of beta
    again = ShiftWindows(DatasetWindows(judged_groups(), context.config), trainer, BETA)
    again.load(windows.state(), {})
    monkeypatch.setattr(again, "measured", windows.measured)
    assert again.data(2, groups)[0].shift == pytest.approx(BETA) and again.count == 6


def test_density_ratios_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts whose states are 1 for the desirable and -1 for the undesirable ones. The slope w of the regression then
    solves w = 2 s(-w) for two rows: 0.674832, so the ratios are e^0.674832 = 1.963703 and its inverse 0.509242."""
    rows = [Group(f"r{index}", [3, 4], (Branch([5]),), Judged(index == 0, 0.0)) for index in range(2)]
    states = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    monkeypatch.setattr(density_ratio, "prompt_states", lambda *_: states)
    context, scorer = context_for(tmp_path, loss_type="bco", use_density_ratio=True), packing_scorer(tiny_model())
    found = density_ratio.density_ratios(scorer, rows, context, context.config)
    assert found == pytest.approx([1.963703, 0.509242], abs=1e-5)
    # within bounds, and neither units nor an offset of the states matter
    states = 7.0 + 50.0 * states
    bounded = context.config.model_copy(update={"min_density_ratio": 0.6, "max_density_ratio": 1.5})
    assert density_ratio.density_ratios(scorer, rows, context, bounded) == [1.5, 0.6]
    assert density_ratio.density_ratios(scorer, rows, context, context.config) == pytest.approx(found, abs=1e-5)
    with pytest.raises(DataError, match="all 2 rows are of one kind"):
        density_ratio.density_ratios(
            scorer, [replace(row, data=Judged(True, 0.0)) for row in rows], context, context.config
        )


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_resume_gives_the_same_bits(tmp_path: Path, name: str) -> None:
    """The running mean of rewards travels in the checkpoint."""
    groups = judged_groups()
    whole, expected = train(tmp_path / "whole", name, groups)
    with pytest.raises(Stop):
        train(tmp_path / "stopped", name, groups, stop_before=3)
    resumed, metrics = train(tmp_path / "stopped", name, groups)
    assert metrics == expected
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_logistic_regression_stands_where_its_gradient_is_zero() -> None:
    """The optimum of the balanced, penalized cross-entropy, by its own equations; and one that is known: without
    features, the log-odds of balanced kinds are 0."""
    torch.manual_seed(0)
    features = torch.randn(30, 4, dtype=torch.float64)
    labels = (features[:, 0] + 0.5 * torch.randn(30, dtype=torch.float64) > 0.6).double()
    weight, bias = logistic_regression(features, labels)
    good = labels.sum()
    balance = torch.where(labels == 1, 30 / (2 * good), 30 / (2 * (30 - good)))
    errors = balance * ((features @ weight + bias).sigmoid() - labels)
    assert_close(features.t() @ errors + weight, torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)
    assert float(errors.sum()) == pytest.approx(0, abs=1e-6)
    assert weight[0] > 0.5
    _, alone = logistic_regression(torch.zeros(30, 4, dtype=torch.float64), labels)
    assert float(alone) == pytest.approx(0, abs=1e-6)


def test_prompt_states_are_the_last_hidden_states(tmp_path: Path) -> None:
    model = tiny_model()
    rows = [Group(f"r{i}", list(range(3, 6 + 2 * i)), (Branch([1]),)) for i in range(3)]
    states = prompt_states(packing_scorer(model), rows, TokenBudget(context_for(tmp_path), 8192))
    for row, state in zip(rows, states, strict=True):
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([row.prefix_ids])).last_hidden_state[0, -1]
        assert_close(state, hidden.double(), atol=1e-5, rtol=1e-5)
