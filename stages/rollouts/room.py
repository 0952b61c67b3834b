"""How many completions the embedded sampler holds at once. Imports nothing heavy: memory predictions ask too."""

from __future__ import annotations

from dataclasses import dataclass

BATCH_TOKENS = 65_536
"""Tokens whose keys and values are held at once, unless a sampler is told otherwise."""
PROMPT_TOKENS_AT_ONCE = 8192
"""Of one pass over prompts, unless one alone is longer."""
PACKED_STEPS = 16
"""Tokens of the longest completion from which packed copies of the weights are worth their making."""
PACKED_BYTES = 2**30
"""Most weights of a model of which there are such copies."""
LANES = 16
"""Tokens of a row are padded to a multiple: what the CPU's vectors divide."""
TILE = 4
"""Rows of a pass are padded to a multiple. From 4 rows on, in multiples of 4, the libraries that multiply matrices on
a CPU compute a row in the same way whatever rows stand beside it."""


@dataclass(frozen=True)
class Room:
    """What is reserved once for a call of the sampler."""

    rows: int
    """Completions in the making."""
    row_tokens: int
    """Of one completion, with the last token of its prompt, from which the first one follows."""
    prompts: int
    """Prompts that these completions continue."""
    prompt_tokens: int
    """Of one prompt without its last token."""

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return padded_rows(self.rows) * self.row_tokens + self.prompts * self.prompt_tokens


def room_for(
    *, completions: int, per_prompt: int, prompt: int, completion: int, most_tokens: int = BATCH_TOKENS
) -> Room:
    """The largest room within `most_tokens` for so many completions, `per_prompt` of a prompt or more; at least one.

    `prompt` and `completion`: most tokens of each.
    """
    low, high = 1, max(1, completions)
    while low < high:
        middle = (low + high + 1) // 2
        if _room(middle, completions, per_prompt, prompt, completion).tokens <= most_tokens:
            low = middle
        else:
            high = middle - 1
    return _room(low, completions, per_prompt, prompt, completion)


def _room(rows: int, completions: int, per_prompt: int, prompt: int, completion: int) -> Room:
    # rows that follow each other in the queue may begin within one prompt and end within another
    prompts = rows if per_prompt == 1 else min(rows, (rows - 2) // per_prompt + 2)
    prompts = min(prompts, -(-completions // per_prompt))
    return Room(rows, padded_tokens(completion), prompts, padded_tokens(prompt - 1))


def padded_tokens(tokens: int) -> int:
    """To a multiple of LANES."""
    return -(-tokens // LANES) * LANES


def padded_rows(rows: int) -> int:
    """To a multiple of TILE."""
    return -(-rows // TILE) * TILE
