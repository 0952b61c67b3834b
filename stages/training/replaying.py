"""Recorded rollouts in the place of a sampler: the update runs on them, and nothing is generated or scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from artifacts.errors import DataError, StageError
from stages.data.dataset import read_dataset
from stages.data.ledger import RowLedger
from stages.data.open_prompts import open_prompts
from stages.data.types import ROW_ID, Row
from stages.rollouts.recorded import FREE, REWARD, Recorded, completion_of, prompt_of, read_recorded, text_of
from stages.training.batch import Group
from stages.training.generation import Generation, end_token_ids
from stages.training.loop import Trainer
from stages.training.multi_turn import multi_turn_of, with_tools
from stages.training.rollout_drawing import Drawing, Draws
from stages.training.rollout_plan import Plan
from stages.training.rollout_records import Sampled
from stages.training.rollouts_ahead import ahead_of

Measure = Callable[[list[Group]], list[Group]]


class Replaying:
    """Gives the recorded groups in the order they were sampled in, and begins anew after the last one."""

    on_policy = False

    def __init__(self, recorded: Recorded, plan: Plan) -> None:
        self.recorded, self.plan = recorded, plan

    def __len__(self) -> int:
        return len(self.recorded.groups)

    def draw(self, generation: int) -> tuple[list[Sampled], list[Sampled]]:
        """(The groups of a generation, none that they replaced)."""
        size, groups = self.plan.prompts_per_generation, self.recorded.groups
        places = range(generation * size, (generation + 1) * size)
        return [_sampled([self.recorded.rows[i] for i in groups[place % len(groups)]]) for place in places], []

    def moved_on(self) -> None:
        """Nothing is drawn by any weights."""

    def metrics(self, kept: Sequence[Sampled], replaced: Sequence[Sampled]) -> dict[str, float]:
        """Nothing is chosen."""
        return {}

    def note_unused(self, ledger: RowLedger) -> None:
        """Every group has its turn."""

    def state(self) -> dict[str, Any]:
        """All follows from the number of the generation."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """There is nothing to take up."""


def _sampled(rows: Sequence[Row]) -> Sampled:
    names = [name for name in rows[0] if name.startswith(REWARD)]
    return Sampled(
        prompt_of(rows[0]),
        [completion_of(row) for row in rows],
        [text_of(row["completion"]) for row in rows],
        {name.removeprefix(REWARD): [row[name] for row in rows] for name in names},
        [row["reward"] for row in rows],
        weight_version=rows[0]["weight_version"],
    )


def read_replay(trainer: Trainer, num_generations: int, ledger: RowLedger) -> Recorded:
    """Input `rollouts` of the stage, every row of it in the ledger.

    Raises StageError or DataError, naming the row, for groups of another size, tokens that the model does not know and
    rows that are too long for it.
    """
    recorded = read_recorded(read_dataset(trainer.context.input("rollouts")))
    scorer = trainer.scorer
    for members in recorded.groups:
        first = recorded.rows[members[0]][ROW_ID]
        if len(members) != num_generations:
            raise StageError(
                f"input rollouts: the group of row {first} has {len(members)} completions, num_generations is "
                f"{num_generations}; set it to {len(members)}"
            )
        for row in (recorded.rows[i] for i in members):
            ids = [*row["prompt_ids"], *row["token_ids"]]
            if len(ids) > scorer.context_length:
                raise StageError(
                    f"input rollouts: row {row[ROW_ID]} has {len(ids)} tokens, the model takes {scorer.context_length}"
                )
            if not 0 <= min(ids) <= max(ids) < scorer.vocabulary:
                raise DataError(
                    f"input rollouts: row {row[ROW_ID]} has token {max(ids)}, the model knows {scorer.vocabulary}: "
                    "they were sampled with another tokenizer; train a model that has that one"
                )
            if any(map(math.isnan, row.get(FREE) or [])):
                raise DataError(
                    f"input rollouts: row {row[ROW_ID]} was held to a form (structured) by vLLM, which does not say "
                    "how likely its tokens were among all; sample them with the embedded engine"
                )
            ledger.use(row[ROW_ID], tokens=len(ids))
    return recorded


def of_old_weights(measure: Measure) -> Measure:
    """As `measure`, for rollouts of other weights than the present ones: the ratios of the loss are to what the sampler
    recorded."""

    def measured(groups: list[Group]) -> list[Group]:
        old = [replace(group, data=replace(group.data, old_logprobs=group.data.sampled_logprobs)) for group in groups]
        return measure(old)

    return measured


def drawing_of(trainer: Trainer, tokenizer: Any, plan: Plan, ledger: RowLedger) -> Draws:
    """Where the groups of a stage come from: its input `rollouts`, or the prompts of its input `dataset`."""
    context, config = trainer.context, trainer.context.config
    if context.has("rollouts"):
        return Replaying(read_replay(trainer, plan.num_generations, ledger), plan)
    ends = end_token_ids(trainer.scorer.transformers_model, tokenizer)
    multi_turn = multi_turn_of(trainer.accelerator, tokenizer, config, ends)
    dataset, length = read_dataset(context.input("dataset")), trainer.scorer.context_length
    prompts = open_prompts(config, dataset, tokenizer, length, ledger, complete=with_tools(multi_turn))
    generation = Generation.of(context, trainer, tokenizer, config, multi_turn)
    return ahead_of(context, Drawing(prompts, plan, generation), plan, generation.sampling)
