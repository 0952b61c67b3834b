"""Recorded rollouts scored again, or with other weights, and made into rows to train on; nothing is generated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from artifacts.errors import StageError
from stages.rollouts.reward_spec import Reward, unknown_rewards
from stages.stage import Config, Input, Stage, operational
from stages.training.memory import scoring
from stages.training.memory_phase import Phase, phase
from stages.training.memory_request import Request

if TYPE_CHECKING:
    from stages.context import Context
    from stages.data.types import Dataset
    from stages.rollouts.recorded import Recorded
    from stages.rollouts.recorded_tables import Table
    from stages.rollouts.rewards import RewardSet

OutputName = Literal["rollouts", "best", "pairs", "labels"]


class RescoreConfig(Config):
    """Settings of scoring again."""

    rewards: tuple[Reward, ...] = ()
    """Functions that score every completion again, in place of the recorded rewards, as input reward_model does; with
    neither, those stay."""
    reward_weights: dict[str, float] | None = None
    """Weight of each reward by its name; what is not named does not count. null: all 1, and where nothing is scored
    again, the recorded sum."""
    outputs: tuple[OutputName, ...] = ("rollouts",)
    """The datasets to write: rollouts with their new rewards, the best completions, pairs, or judged completions."""
    threshold: float | None = None
    """A completion is right when its reward is at least this; null: none is right or wrong, only better or worse than
    another."""
    keep: Literal["best", "all_right"] = "best"
    """Rows of `best`: the right completion with the highest reward of every group, or every right one."""
    pairs_per_group: int = Field(1, gt=0)
    """Most pairs of one group: the best against the worst, then the second best against the second worst, ..."""
    min_gap: float = Field(0.0, ge=0)
    """The chosen completion's reward is higher than the rejected one's by at least this."""
    margin: bool = False
    """Give pairs a column `margin`, the gap of the two rewards, which the reward model's loss asks for."""
    micro_batch_tokens: int = operational(8192, gt=0)
    """Most tokens (padding included) of one forward pass of the reward model."""


def check(config: RescoreConfig, wired: frozenset[str]) -> list[str]:
    """What is wrong with the configuration and the inputs together."""
    problems = unknown_rewards(config.rewards)
    if not config.outputs:
        problems.append("outputs is empty: name rollouts, best, pairs or labels")
    if config.threshold is None and "labels" in config.outputs:
        problems.append("output labels needs threshold: the reward from which a completion is desirable")
    if config.threshold is None and config.keep == "all_right":
        problems.append("keep: all_right needs threshold: the reward from which a completion is right")
    if (config.rewards or "reward_model" in wired) and "dataset" not in wired:
        problems.append("rewards need input dataset: the prompts' rows, with the columns that rewards are given")
    return problems


def active_outputs(config: RescoreConfig) -> tuple[str, ...]:
    """The outputs that are written, in the order of declaration."""
    return tuple(name for name in STAGE.outputs if name in config.outputs)


def run(context: Context) -> None:
    """Score input `rollouts`, whose prompts are rows of input `dataset`, and write what is asked for; columns that the
    dataset has beside its prompts go along."""
    from stages.data.dataset import read_dataset
    from stages.rollouts.recorded import read_recorded, rescored
    from stages.rollouts.recorded_tables import TABLES

    config: RescoreConfig = context.config
    dataset = read_dataset(context.input("rollouts"))
    prompts = read_dataset(context.input("dataset")) if context.has("dataset") else None
    recorded = rescored(read_recorded(dataset, prompts), _rewards(context), config.reward_weights)
    _measure(context, recorded)
    for name in active_outputs(config):
        _publish(context, name, TABLES[name](recorded, config), dataset)


def _rewards(context: Context) -> RewardSet | None:
    """The functions, and input `reward_model`; None: nothing is scored again."""
    from stages.rollouts.rewards import RewardSet

    config: RescoreConfig = context.config
    judge = None
    if context.has("reward_model"):
        from stages.training.processes import prepare_process
        from stages.training.reward_scoring import RewardModelScorer

        device = prepare_process(context).device
        judge = RewardModelScorer(context, None, device, config.micro_batch_tokens)
    if not config.rewards and judge is None:
        return None
    return RewardSet(config.rewards, reward_model=judge, open_shards=context.store.shards, say=context.log)


def _measure(context: Context, recorded: Recorded) -> None:
    """Mean of the new rewards, and of each function's."""
    from statistics import fmean

    from stages.rollouts.rewards import failed_metric

    scored = [row["reward"] for row in recorded.rows if row["reward"] is not None]
    if not scored:
        raise StageError(
            f"no reward scores any of {len(recorded.rows)} completions, the first of row "
            f"{recorded.rows[0]['row_id']}; look at reward_weights, and at what the functions return"
        )
    context.metrics["reward"] = fmean(scored)
    for name in recorded.names:
        values = [row[f"reward_{name}"] for row in recorded.rows if row[f"reward_{name}"] is not None]
        if values:
            context.metrics[f"rewards/{name}/mean"] = fmean(values)
    for name, count in recorded.failed.items():
        context.metrics[failed_metric(name)] = float(count)
    context.counts |= {"completions": len(recorded.rows), "groups": len(recorded.groups)}


def _publish(context: Context, name: str, table: Table, dataset: Dataset) -> None:
    """Write a table as a dataset. Raises StageError when it is empty."""
    from stages.data.dataset import write_dataset
    from stages.data.ledger import say_dropped

    if not table.rows:
        raise StageError(
            f"output {name} has no row (rollouts: {table.ledger.summary()}): lower threshold or min_gap, or leave "
            f"{name} out of outputs"
        )
    context.counts[f"{name}_rows"] = len(table.rows)
    say_dropped(context, table.ledger.states, output=name)
    write_dataset(
        context.output(name),
        table.rows,
        type=table.type,
        conversational=dataset.conversational,
        ledger=table.ledger,
        source={"stage": "rescore"},
    )


def memory(request: Request) -> list[Phase]:
    """The passes of the reward model, where there is one; how long the rollouts are is not known before."""
    judge = request.models.get("reward_model")
    if judge is None:
        return [phase("scoring", {}, request.setup)]
    work = request.passes(row=min(judge.context, request.config.micro_batch_tokens), rows=1, read=1)
    return [scoring(judge, request.setup, work)]


STAGE = Stage(
    name="rescore",
    version=2,
    config=RescoreConfig,
    inputs={
        "rollouts": Input(("dataset",)),
        "dataset": Input(("dataset",), required=False),
        "reward_model": Input(("reward_model",), required=False),
    },
    outputs={"rollouts": "dataset", "best": "dataset", "pairs": "dataset", "labels": "dataset"},
    active_outputs=active_outputs,
    dataset_types=lambda config, inputs: {
        "rollouts": "prompt_completion",
        "best": "prompt_completion",
        "pairs": "preference",
        "labels": "unpaired_preference",
    },
    run=run,
    single=True,
    summary="recorded rollouts with other rewards or weights; their best as SFT rows, pairs, or judged completions",
    check=check,
    main_metric="reward",
    memory=memory,
)
