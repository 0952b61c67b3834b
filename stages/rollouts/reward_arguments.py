"""What reward functions are given: one entry a completion, and which completion that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.data.tokenize import TokenizedPrompt
    from stages.data.types import Row
    from stages.rollouts.requests import Completion


@dataclass(frozen=True)
class Place:
    """A completion: its prompt's row, and its number among the completions of that prompt."""

    row_id: str
    number: int

    def __str__(self) -> str:
        return f"row {self.row_id}, completion {self.number}"


@dataclass(frozen=True)
class Call:
    """The arguments of a reward function, one entry a completion each."""

    places: list[Place]
    arguments: dict[str, list[Any]]

    @classmethod
    def of(
        cls,
        prompts: Sequence[TokenizedPrompt],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
    ) -> Call:
        """Every column of the rows, and TRL's prompts, completions and completion_ids; of completions of several turns
        also environment_reward."""
        rows = [prompt.row for prompt, group in zip(prompts, texts, strict=True) for _ in group]
        columns = sorted({column for prompt in prompts for column in prompt.row} - {"prompt"})
        flat_texts = [text for group in texts for text in group]
        arguments = {column: [row.get(column) for row in rows] for column in columns}
        arguments["prompts"] = [row["prompt"] for row in rows]
        flat = [completion for group in completions for completion in group]
        arguments["completions"] = [_spoken(*each) for each in zip(rows, flat, flat_texts, strict=True)]
        arguments["completion_ids"] = [completion.token_ids for completion in flat]
        if any(completion.episode is not None for completion in flat):
            arguments["environment_reward"] = [
                None if completion.episode is None else completion.episode.environment_reward for completion in flat
            ]
        places = [
            Place(prompt.row_id, number)
            for prompt, group in zip(prompts, texts, strict=True)
            for number in range(len(group))
        ]
        return cls(places, arguments)

    def only(self, indices: Sequence[int]) -> Call:
        """The call for some of the completions."""
        arguments = {name: [values[index] for index in indices] for name, values in self.arguments.items()}
        return Call([self.places[index] for index in indices], arguments)


def _spoken(row: Row, completion: Completion, text: str) -> Any:
    """As the row writes its prompt: text, or messages."""
    if completion.episode is not None:
        return completion.episode.messages
    return text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
