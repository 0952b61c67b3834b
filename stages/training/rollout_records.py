"""What is kept of on-line learning: every completion with its log-probabilities, rewards and advantage.

A generation's rollouts are saved as a shard before anything is trained on them, so a resumed run finds or makes the
same bytes; the artifact joins the shards in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any

from artifacts import Shards
from stages.context import Context
from stages.data.dataset import ROWS_PER_GROUP, column_types, parquet_writer, read_parquet
from stages.data.schema import ColumnTypes
from stages.data.tokenize import TokenizedPrompt
from stages.data.tools import stored
from stages.data.types import Row
from stages.rollouts.multi_turn.episode import RECORD_TYPES
from stages.rollouts.recorded import FREE
from stages.rollouts.requests import Completion
from stages.training import lesson
from stages.training.lesson import Lesson
from stages.training.metrics_log import ROLLOUTS
from stages.training.rollout_table import log_completions

if TYPE_CHECKING:
    import pyarrow

VERSIONS = "weight_versions"
"""Column of records that is there where completions say by which weights each of their tokens was made."""
LOSS_MASK = "loss_mask"
"""Column of records that is there where completions have several turns."""
SAMPLES_KEPT_PER_STEP = 1
"""Groups of a generation whose texts go into samples.jsonl."""


@dataclass(frozen=True)
class Sampled:
    """A prompt's completions, scored: the unit that is sampled, stored and trained as one."""

    prompt: TokenizedPrompt
    completions: list[Completion]
    texts: list[str]
    rewards: dict[str, list[float | None]]
    """By reward function."""
    totals: list[float | None]
    """Weighted sums; None where nothing scored the completion."""
    weight_version: int | None = None
    """Optimizer steps behind the weights that sampled it, of several the oldest; None: those behind the present
    ones."""
    failed: dict[str, int] = field(default_factory=dict)
    """By reward function that may fail (`on_error: none`): completions for which it did."""
    lessons: list[Lesson] = field(default_factory=list)
    """What each completion is taught by; empty: nothing is."""


class Recorder:
    """Saves the rollouts of every generation as a shard, and keeps some of them to be looked at."""

    def __init__(self, context: Context, num_generations: int, total_steps: int) -> None:
        self.context, self.num_generations = context, num_generations
        self.samples: list[dict[str, Any]] = []
        self._steps_between_tables = context.config.log_completions_steps or -(-total_steps // 10)
        self._next_table = 0

    def save(
        self, generation: int, step: int, sampled: Sequence[Sampled], advantages: Sequence[Sequence[float]]
    ) -> None:
        """The rollouts that were sampled for the step with this index, and those after it."""
        if not self.context.is_main:
            return
        records = rollout_records(sampled, advantages, step + 1)
        self.samples += [_looked_at(record) for record in records[: SAMPLES_KEPT_PER_STEP * self.num_generations]]
        self.context.held.require_unchanged()
        self.context.shards.save(_shard(generation), to_parquet(records, list(sampled[0].rewards)))
        if step >= self._next_table:
            self._next_table = step + self._steps_between_tables
            log_completions(self.context, records)

    def state(self) -> list[dict[str, Any]]:
        """The samples kept so far."""
        return list(self.samples)  # it grows while a checkpoint is written

    def load(self, samples: list[dict[str, Any]]) -> None:
        """Take up what `state` gave."""
        self.samples = samples

    def records(self, generations: int) -> list[dict[str, Any]]:
        """The rollouts of so many generations, in order, from the shards that were saved as the run went."""
        return [row for table in saved_tables(self.context.shards, generations) for row in table.to_pylist()]


def rollout_records(
    sampled: Sequence[Sampled], advantages: Sequence[Sequence[float]], step: int
) -> list[dict[str, Any]]:
    """One row a completion of a generation, whose first step is `step`, counted from 1.

    `weight_version`: the number of optimizer steps behind the weights that sampled its group, of several the oldest,
    and where an engine with weights of its own did, `weight_versions` of each of its tokens; where completions were
    held to a form, `free_logprobs`. `group`: which of the
    generation's groups it belongs to. A prompt that is sampled more than once goes on counting its completions, so
    row ids `<prompt>/<step>/<number>` differ.
    """
    numbers: Counter[str] = Counter()
    records = []
    for group, (entry, values) in enumerate(zip(sampled, advantages, strict=True)):
        prompt = entry.prompt
        first = numbers[prompt.row_id]
        row_ids = [f"{prompt.row_id}/{step}/{first + index}" for index in range(len(entry.completions))]
        numbers[prompt.row_id] += len(row_ids)
        for index, completion in enumerate(entry.completions):
            records.append(
                {
                    "row_id": row_ids[index],
                    "prompt_row_id": prompt.row_id,
                    "prompt": prompt.row["prompt"],
                    "completion": _spoken(entry, index),
                    "prompt_ids": list(prompt.prompt_ids),
                    "token_ids": completion.token_ids,
                    "logprobs": completion.logprobs,
                    "finished": completion.finished,
                    "reward": entry.totals[index],
                    **{f"reward_{name}": scores[index] for name, scores in entry.rewards.items()},
                    "advantage": values[index],
                    "step": step,
                    "weight_version": step - 1 if entry.weight_version is None else entry.weight_version,
                    "group": group,
                    **({FREE: completion.free_logprobs} if completion.free_logprobs else {}),
                    **({VERSIONS: completion.weight_versions} if completion.weight_versions else {}),
                    **_of_episode(completion),
                    **(entry.lessons[index].record(row_ids) if entry.lessons else {}),
                }
            )
    return records


def _looked_at(record: dict[str, Any]) -> dict[str, Any]:
    """Without what nobody looks at, and what by vLLM is NaN, which is no JSON."""
    return {name: value for name, value in record.items() if name not in (FREE, lesson.PROMPT)}


def _of_episode(completion: Completion) -> dict[str, Any]:
    """The columns of a completion of several turns: which tokens the model wrote, and what came of it."""
    if completion.episode is None:
        return {}
    return {LOSS_MASK: completion.loss_mask, **completion.episode.record()}


def _spoken(entry: Sampled, index: int) -> Any:
    """As the dataset writes completions: text, or an assistant's turn; of several turns, all."""
    text, episode = entry.texts[index], entry.completions[index].episode
    if episode is not None:
        return episode.messages
    return text if isinstance(entry.prompt.row["prompt"], str) else [{"role": "assistant", "content": text}]


def to_parquet(records: Sequence[Row], rewards: Sequence[str]) -> bytes:
    """The records of one generation. `rewards`: names of the functions, also where none of them gave a number."""
    import pyarrow

    conversational = not isinstance(records[0]["prompt"], str)
    types = record_types(conversational, rewards, set().union(*records))
    rows = [stored(record, ("prompt", "completion")) for record in records] if conversational else records
    if conversational:  # messages may have fields beside role and content
        for row in rows:
            types.observe(f"row {row['row_id']}", {name: row[name] for name in ("prompt", "completion")})
    # a completion of no tokens has no versions
    table = pyarrow.table({name: [row.get(name, []) for row in rows] for name in types.columns}, schema=types.schema())
    buffer = BytesIO()
    with parquet_writer(buffer, table.schema) as writer:
        writer.write_table(table, row_group_size=ROWS_PER_GROUP)
    return buffer.getvalue()


def record_types(conversational: bool, rewards: Sequence[str], names: Set[str]) -> ColumnTypes:
    """The columns of a record, with the rewards of these functions, and those among `names` that not all runs have:
    versions of weights token by token, what is known of completions of several turns, and what taught them."""
    further: dict[str, Any] = {
        FREE: ("list", "float"),
        VERSIONS: ("list", "int"),
        LOSS_MASK: ("list", "bool"),
        **RECORD_TYPES,
        **lesson.RECORD_TYPES,
    }
    known = column_types("prompt_completion", conversational).known()
    return ColumnTypes(
        {
            "row_id": "string",
            "prompt_row_id": "string",
            "prompt": known["prompt"],
            "completion": known["completion"],
            "prompt_ids": ("list", "int"),
            "token_ids": ("list", "int"),
            "logprobs": ("list", "float"),
            "finished": "bool",
            "reward": "float",
            **{f"reward_{name}": "float" for name in rewards},
            "advantage": "float",
            "step": "int",
            "weight_version": "int",
            "group": "int",
            **{name: kind for name, kind in further.items() if name in names},
        }
    )


def saved_tables(shards: Shards, generations: int) -> Iterator[pyarrow.Table]:
    """The rollouts of so many generations, one table each."""
    for generation in range(generations):
        yield read_parquet(BytesIO(shards.load(_shard(generation))))


def _shard(generation: int) -> str:
    return f"{ROLLOUTS}{generation:08d}.parquet"
