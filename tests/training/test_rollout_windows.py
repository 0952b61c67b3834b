"""Which rollouts are trained, on a sampler that gives known completions: numbers by hand, and the same windows after a
resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import pvariance
from typing import Any

import pytest

from stages.context import local_context
from stages.data.ledger import RowLedger
from stages.data.tokenize import TokenizedPrompt
from stages.rollouts.requests import Completion
from stages.seeds import generator
from stages.training.advantage_settings import AdvantageConfig
from stages.training.advantages import advantages_of
from stages.training.batch import Group
from stages.training.objective import Window
from stages.training.prompt_order import Curriculum, PromptOrder
from stages.training.rollout_drawing import Drawing
from stages.training.rollout_plan import Plan
from stages.training.rollout_records import Sampled
from stages.training.rollout_selection import ReplayBuffer, Selection, has_signal, most_varied
from stages.training.rollout_windows import Learning, RolloutWindows

Rewards = Callable[[int, Sequence[int]], list[float | None]]
"""(number of the prompt, seeds) -> the rewards of its completions"""

EASY = {0, 2, 5}
"""Prompts whose completions all pass."""


def by_prompt(number: int, seeds: Sequence[int]) -> list[float | None]:
    """Prompts of EASY give no signal; of the others the first completion is worth 1."""
    return [1.0 if index == 0 or number in EASY else 0.0 for index, _ in enumerate(seeds)]


def by_seed(number: int, seeds: Sequence[int]) -> list[float | None]:
    """Verdicts that follow from the seeds: some groups with signal, some without."""
    return [float(seed % (number + 2) == 0) for seed in seeds]


class FakeSampler:
    """Completion i of prompt n is the tokens (n, i), with log-probability -(i + 1) / 10 each."""

    def __init__(self, rewards: Rewards) -> None:
        self.rewards = rewards
        self.calls: list[list[str]] = []

    def __call__(
        self, prompts: Sequence[TokenizedPrompt], seeds: Sequence[tuple[int, ...]], *, some_scored: bool = True
    ) -> list[Sampled]:
        self.calls.append([prompt.row_id for prompt in prompts])
        return [self._sampled(prompt, own) for prompt, own in zip(prompts, seeds, strict=True)]

    def _sampled(self, prompt: TokenizedPrompt, seeds: tuple[int, ...]) -> Sampled:
        number = prompt.prompt_ids[0]
        totals = self.rewards(number, seeds)
        completions = [Completion([number, index], [-(index + 1) / 10] * 2, True) for index, _ in enumerate(seeds)]
        return Sampled(prompt, completions, ["x"] * len(seeds), {"r": totals}, totals)


class Made:
    """Windows over ten prompts with what they were made of."""

    def __init__(self, folder: Path, rewards: Rewards, selection: Selection, **changes: Any) -> None:
        context = local_context("rl", {"rewards": ["exact_match"]}, folder=folder)
        plan: dict[str, Any] = {
            "prompts_per_step": 2,
            "num_generations": 4,
            "steps_per_generation": 1,
            "num_iterations": 1,
            "mask_truncated": False,
            "seed": 5,
            "epochs": 1.0,
            "max_steps": 12,
        }
        prompts = [TokenizedPrompt(f"r{number}", [number], {"prompt": "p"}) for number in range(10)]
        learning = Learning(
            advantages=advantages_of(AdvantageConfig(scale_rewards="none")),
            measure=measured,
            count=lambda group: float(len(group.branches)),
            skippable=True,
        )
        self.sampler = FakeSampler(rewards)
        made = Plan(**plan | changes, selection=selection)
        self.windows = RolloutWindows(context, Drawing(prompts, made, self.sampler), made, learning)

    def all(self) -> list[Window]:
        return [self.windows.window(step) for step in range(self.windows.total_steps)]


def measured(groups: list[Group]) -> list[Group]:
    """Old log-probabilities of -7, which only fresh groups may have."""
    return [
        replace(group, data=replace(group.data, old_logprobs=tuple([-7.0] * len(b.token_ids) for b in group.branches)))
        for group in groups
    ]


def order_of(made: Made) -> Iterator[str]:
    """Every row id in the order of sampling."""
    for call in made.sampler.calls:
        yield from call


def test_without_a_choice_every_prompt_has_its_turn(tmp_path: Path) -> None:
    """Ten prompts, two a step: five steps are one pass, whatever the rewards."""
    made = Made(tmp_path, by_prompt, Selection())
    made.all()
    assert [len(call) for call in made.sampler.calls] == [2] * 12
    rows = list(order_of(made))
    assert sorted(rows[:10]) == sorted(rows[10:20]) == [f"r{number}" for number in range(10)]
    assert rows[:10] != rows[10:20]


# --- dynamic sampling


def test_groups_without_signal_are_replaced_by_the_next_prompts(tmp_path: Path) -> None:
    """The stream goes on where it was; a step is full of groups with signal as soon as the rounds allow it."""
    plain = Made(tmp_path / "plain", by_prompt, Selection())
    plain.all()
    stream = list(order_of(plain))
    made = Made(tmp_path / "dynamic", by_prompt, Selection(dynamic_sampling_rounds=10), max_steps=6)
    windows = made.all()
    rows = list(order_of(made))
    assert rows == stream[: len(rows)]
    useful = [row for row in rows if int(row[1:]) not in EASY]
    steps = [{group.row_id for group in window.groups} for window in windows]
    assert steps == [set(useful[start : start + 2]) for start in range(0, 12, 2)]
    assert all(window.uncounted_items == 0 and len(window.groups) == 2 for window in windows)
    assert sum(window.metrics["dynamic_sampling/replaced_groups"] for window in windows) == len(rows) - 12
    assert {window.metrics["dynamic_sampling/remaining_groups"] for window in windows} == {0.0}


def test_what_is_without_signal_after_the_last_round_stays(tmp_path: Path) -> None:
    """No prompt has a signal: two rounds sample two more each, then the step has two idle groups of 4 completions."""
    made = Made(tmp_path, lambda _, seeds: [0.5] * len(seeds), Selection(dynamic_sampling_rounds=2), max_steps=1)
    (window,) = made.all()
    assert [len(call) for call in made.sampler.calls] == [2, 2, 2]
    assert window.groups == [] and window.uncounted_items == 8
    assert window.metrics["dynamic_sampling/replaced_groups"] == 4
    assert window.metrics["dynamic_sampling/remaining_groups"] == 2
    assert window.metrics["frac_reward_zero_std"] == 1.0


def test_rows_that_never_gave_a_signal_are_said_in_the_ledger(tmp_path: Path) -> None:
    """Ten rows of one token are used at first; the easy ones that were sampled end as without signal."""
    made = Made(tmp_path, by_prompt, Selection(dynamic_sampling_rounds=10), max_steps=6)
    made.all()
    ledger = RowLedger()
    for number in range(10):
        ledger.use(f"r{number}", tokens=1)
    made.windows.drawing.note_unused(ledger)
    sampled_easy = {row for row in order_of(made) if int(row[1:]) in EASY}
    assert len(sampled_easy) == 3
    told = ledger.to_json()
    assert told["states"] == {"used": 7, "without signal": 3}
    assert told["tokens"]["states"] == {"used": 7, "without signal": 3}
    ledger.check(10)


def test_replaced_groups_are_recorded_too(tmp_path: Path) -> None:
    made = Made(tmp_path, by_prompt, Selection(dynamic_sampling_rounds=10), max_steps=6)
    made.all()
    records = made.windows.records()
    assert sorted(record["prompt_row_id"] for record in records) == sorted(4 * list(order_of(made)))
    of_easy = [record["advantage"] for record in records if int(record["prompt_row_id"][1:]) in EASY]
    assert of_easy and set(of_easy) == {0.0}


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([1, 1, 1], False), ([1, None, 1], False), ([None, None], False), ([0, 1], True), ([0, None, 1], True)],
)
def test_signal(rewards: list[float | None], expected: bool) -> None:
    assert has_signal(rewards) is expected


# --- down-sampling


def test_most_varied_by_hand() -> None:
    """Of 0, 1, 2, 9, 10 two are 0 and 10 (variance 25); three are 0, 9, 10 (variance 60.67 / 3 = 20.2; 0, 1, 10 has
    20.2 too: 182 / 9 against 182 / 9), so the tie goes to the cut with fewer high rewards: 0, 1, 10."""
    rewards = [2.0, 9.0, 0.0, 10.0, 1.0]
    assert most_varied(rewards, 2) == [2, 3]
    assert most_varied(rewards, 3) == [2, 3, 4]
    assert most_varied(rewards, 5) == [0, 1, 2, 3, 4]


def test_most_varied_of_verdicts_takes_half_of_each() -> None:
    assert most_varied([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0], 4) == [0, 2, 4, 5]


def test_what_is_not_scored_comes_last() -> None:
    assert most_varied([None, 3.0, None, 1.0], 2) == [1, 3]
    assert most_varied([None, 3.0, None, None], 2) == [0, 1]


def test_most_varied_is_the_best_of_all_subsets() -> None:
    """Against trying them all."""
    for case in range(40):
        rewards = [float(value) for value in generator(case, "rewards").integers(0, 6, 8)]
        for count in (2, 3, 5):
            found = pvariance([rewards[index] for index in most_varied(rewards, count)])
            assert found == pytest.approx(max(pvariance(subset) for subset in combinations(rewards, count)))


def test_advantages_are_those_of_the_completions_that_are_trained(tmp_path: Path) -> None:
    """Of 0, 1, 2, 9 those worth 0 and 9 are trained: advantages -4.5 and 4.5; the others are recorded with 0."""
    made = Made(tmp_path, lambda *_: [1.0, 9.0, 2.0, 0.0], Selection(trained=2), max_steps=1)
    (window,) = made.all()
    for group in window.groups:
        number = int(group.row_id[1:])
        assert [branch.token_ids for branch in group.branches] == [[number, 1], [number, 3]]
        assert group.data.advantages == (4.5, -4.5)
        assert group.data.sampled_logprobs == ([-0.2, -0.2], [-0.4, -0.4])
    assert [record["advantage"] for record in made.windows.records()] == [0.0, 4.5, 0.0, -4.5] * 2
    assert window.metrics["reward"] == 3.0  # of all four: 12 / 4


# --- replay


def test_a_kept_group_takes_the_place_of_one_without_signal(tmp_path: Path) -> None:
    """The prompts of the first two steps have a signal, later ones have none."""
    sampled: list[int] = []

    def rewards(number: int, seeds: Sequence[int]) -> list[float | None]:
        sampled.append(number)
        return [1.0, 0.0, 0.0, 0.0] if len(sampled) <= 4 else [0.0] * 4

    made = Made(tmp_path, rewards, Selection(replay_buffer_size=3), max_steps=4)
    first, second, *later = made.all()
    assert [window.metrics["replay/groups"] for window in (first, second, *later)] == [0, 0, 2, 2]
    assert [window.metrics["replay/buffer_size"] for window in (first, second, *later)] == [2, 3, 3, 3]
    fresh = {group.row_id: group for window in (first, second) for group in window.groups}
    # four groups of one score: the two of step 1 and, of those of step 0, the first
    kept = {first.groups[0].row_id, *(group.row_id for group in second.groups)}
    for window in later:
        assert window.uncounted_items == 0
        for group in window.groups:
            assert group.row_id in kept
            assert group.branches == fresh[group.row_id].branches
            assert group.data.advantages == (0.75, -0.25, -0.25, -0.25)
            # the sampler's, not the -7 that were measured when it was fresh
            assert group.data.old_logprobs == ([-0.1, -0.1], [-0.2, -0.2], [-0.3, -0.3], [-0.4, -0.4])


def test_the_buffer_keeps_the_most_informative_groups(tmp_path: Path) -> None:
    """Score: sum |A| x deviation of A. Of rewards 0, 0, 0, s: A = 3 s/4 once, -s/4 three times; 1.5 s x s sqrt(3)/4."""
    sampled: list[int] = []

    def rewards(number: int, seeds: Sequence[int]) -> list[float | None]:
        sampled.append(number)
        return [float(len(sampled)), 0.0, 0.0, 0.0]

    made = Made(tmp_path, rewards, Selection(replay_buffer_size=3), max_steps=4)
    made.all()
    assert [entry.score for entry in made.windows.replay.entries] == pytest.approx(
        [1.5 * s * s * 3**0.5 / 4 for s in (8, 7, 6)]
    )


def test_a_group_that_tells_nothing_apart_is_not_kept(tmp_path: Path) -> None:
    """An estimator that compares with the batch gives equal rewards equal advantages that are not 0: the group is
    replaced by kept ones, and not kept itself, for it would have no chance to be drawn."""
    sampled: list[int] = []

    def rewards(number: int, seeds: Sequence[int]) -> list[float | None]:
        sampled.append(number)
        return [1.0, 0.0, 0.0, 0.0] if len(sampled) == 1 else [1.0] * 4

    made = Made(tmp_path, rewards, Selection(replay_buffer_size=3), max_steps=2)
    made.windows.learning = replace(
        made.windows.learning,
        advantages=lambda sampled: [[(total or 0.0) - 0.5 for total in one.totals] for one in sampled],
    )
    first, second = made.all()
    assert [window.metrics["replay/buffer_size"] for window in (first, second)] == [1, 1]
    (kept,) = (entry.group for entry in made.windows.replay.entries)
    assert [window.metrics["replay/groups"] for window in (first, second)] == [0, 1]
    assert kept in second.groups and kept.data.advantages == (0.5, -0.5, -0.5, -0.5)


def test_draws_follow_the_scores(tmp_path: Path) -> None:
    """Scores 3 and 1: the first comes in about three of four draws (2000 draws, 5 standard deviations)."""
    buffer = ReplayBuffer(2, seed=0)
    made = Made(tmp_path, lambda *_: [1.0, 0.0, 0.0, 0.0], Selection(replay_buffer_size=2), max_steps=1)
    made.all()
    high, low = made.windows.replay.entries
    buffer.entries = [replace(high, score=3.0), replace(low, score=1.0)]
    hits = sum(buffer.draw(1, step)[0].score == 3.0 for step in range(2000))
    assert abs(hits - 1500) < 5 * (2000 * 0.75 * 0.25) ** 0.5
    assert {entry.score for entry in buffer.draw(2, 0)} == {1.0, 3.0}
    assert len(buffer.draw(9, 0)) == 2


# --- curriculum


@pytest.mark.parametrize(
    ("curriculum", "chances"),
    [
        (Curriculum.weighted(0.1, 1.0), {0.0: 0.1, 0.5: 1.0, 0.25: 0.75, 1.0: 0.1}),
        (Curriculum.filtered(0.2, 1.0, low=0.25, high=0.75), {0.0: 0.2, 0.25: 1.0, 0.75: 1.0, 0.8: 0.2}),
    ],
)
def test_chances(curriculum: Curriculum, chances: dict[float, float]) -> None:
    assert {rate: curriculum.chance(rate) for rate in chances} == chances


def test_pass_rates() -> None:
    """Of the scored completions; 0.5 passes where pass_reward is 0.5."""
    curriculum = Curriculum.weighted(0.1, 0.5)
    assert curriculum.pass_rate([0.5, 0.4, None, 1.0]) == 2 / 3
    assert curriculum.pass_rate([None]) is None


def test_prompts_have_the_chance_of_their_pass_rate() -> None:
    """Prompt 0 always passes (chance 0.1), 1 does half the time (1), 2 once in four (0.75), 3 was never scored (1).

    1000 turns of each, 5 standard deviations; one turn a pass, so at most once between two turns of another.
    """
    order = PromptOrder(4, 3, Curriculum.weighted(0.1, 1.0))
    for row, rewards in enumerate([[1.0] * 4, [1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [None]]):
        order.note(row, rewards)
    taken: list[int] = []
    while order.position < 4000:
        taken += order.take(1)
    counts = [taken.count(row) for row in range(4)]
    assert counts[1] == counts[3] == pytest.approx(1000, abs=1)
    assert abs(counts[0] - 100) < 5 * (1000 * 0.1 * 0.9) ** 0.5
    assert abs(counts[2] - 750) < 5 * (1000 * 0.75 * 0.25) ** 0.5


def test_unmeasured_prompts_come_first_and_then_those_in_reach(tmp_path: Path) -> None:
    """The first pass takes every prompt; with a floor of nearly nothing the easy ones (rate 1) then stay away."""
    curriculum = Curriculum.filtered(1e-9, 1.0, low=0.1, high=0.9)
    made = Made(tmp_path, by_prompt, Selection(curriculum=curriculum))
    windows = made.all()
    rows = list(order_of(made))
    assert sorted(rows[:10]) == [f"r{number}" for number in range(10)]
    assert {int(row[1:]) for row in rows[10:]} <= set(range(10)) - EASY
    # after the first pass: three rates of 1, seven of 1/4
    assert windows[-1].metrics["curriculum/pass_rate"] == pytest.approx((3 + 7 / 4) / 10)
    assert windows[-1].metrics["curriculum/measured_prompts"] == 10


# --- resume

SELECTIONS = {
    "none": Selection(),
    "dynamic sampling": Selection(dynamic_sampling_rounds=2),
    "replay": Selection(replay_buffer_size=3),
    "down-sampling": Selection(trained=2),
    "curriculum": Selection(curriculum=Curriculum.weighted(0.1, 1.0)),
    "all": Selection(
        trained=3, dynamic_sampling_rounds=1, replay_buffer_size=4, curriculum=Curriculum.weighted(0.3, 1.0)
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("plan", [{}, {"steps_per_generation": 2, "num_iterations": 2}])
def test_a_resumed_run_has_the_same_windows(tmp_path: Path, name: str, plan: dict[str, Any]) -> None:
    """From the state after every step, gone through JSON; and the state itself does not change while it is saved."""
    whole = Made(tmp_path / "whole", by_seed, SELECTIONS[name], **plan)
    expected, states, texts = [], [], []
    for step in range(whole.windows.total_steps):
        expected.append(whole.windows.window(step))
        states.append(whole.windows.state())
        texts.append(json.dumps(states[-1]))
    assert [json.dumps(state) for state in states] == texts
    for killed_after in (0, 2, 5, 6, 9):
        again = Made(tmp_path / f"again{killed_after}", by_seed, SELECTIONS[name], **plan)
        again.windows.load(json.loads(texts[killed_after]), {})
        found = [again.windows.window(step) for step in range(killed_after + 1, whole.windows.total_steps)]
        assert found == expected[killed_after + 1 :]
        assert json.dumps(again.windows.state()) == texts[-1]


def test_the_cases_of_a_resume_have_something_to_lose(tmp_path: Path) -> None:
    """Groups were replaced and replayed, and pass rates differ: a state that forgot them would be noticed."""
    windows = Made(tmp_path, by_seed, SELECTIONS["all"]).all()
    assert sum(window.metrics["dynamic_sampling/replaced_groups"] for window in windows) > 2
    assert sum(window.metrics["replay/groups"] for window in windows) > 2
    assert len({window.metrics["curriculum/pass_rate"] for window in windows}) > 5
