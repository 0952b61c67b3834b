"""What stages that train on completions do with rows that are too long, and how they pass a reference over the rest.
Imports no torch."""

from __future__ import annotations

from pydantic import Field

from stages.data.truncation import TruncationMode
from stages.stage import Config, operational


class CompletionLengthConfig(Config):
    """Of stages that train on whole completions of prompts."""

    max_length: int = Field(1024, gt=1)
    """Longest prompt with completion in tokens; what is done with longer ones says truncation_mode, the ledger counts
    them."""
    truncation_mode: TruncationMode = "keep_start"
    """Of longer rows, cut the end of the completions, or the start of the prompt (keep_end); or drop them; or stop
    (error)."""


class ReferencedConfig(CompletionLengthConfig):
    """Of such stages that compare with a reference."""

    shard_rows: int = operational(256, gt=0)
    """Rows of the reference pass that are saved at a time, where the reference is not precomputed."""


def one_reference(wired: frozenset[str]) -> list[str]:
    """What is wrong where both a reference and what it said are wired in."""
    if {"reference_logprobs", "reference"} <= wired:
        return ["inputs reference_logprobs and reference exclude each other; wire one of them"]
    return []
