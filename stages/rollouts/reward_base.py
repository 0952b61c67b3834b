"""What a built-in reward is: its parameters, checked before anything runs, and the function of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from stages.stage import Config

Value = float | Exception | None
"""Reward of a completion. None: not scored; an exception in its place: why it could not be scored."""


class OvertimeError(Exception):
    """A reward took longer than it may."""


class BuiltIn(Config):
    """Parameters of a built-in reward; `score` is the reward function, and pure but where it asks a server."""

    version: ClassVar[int] = 1
    """Raised by hand when the same parameters give other rewards: cached ones no longer count then."""
    cached: ClassVar[bool] = False
    """Whether results are cached where the recipe does not say."""
    timeout_seconds: ClassVar[float | None] = None
    """Limit of a call where the recipe gives none."""
    operational: ClassVar[frozenset[str]] = frozenset()
    """Parameters on which no reward depends that was given."""

    def score(self, *arguments: Any, **columns: Any) -> Any:
        """One value a completion; takes of prompts, completions, completion_ids and the columns what it names."""
        raise NotImplementedError

    def columns_used(self) -> frozenset[str] | None:
        """The arguments that the rewards follow from; None: all that `score` names or takes."""
        return None

    def needed_columns(self) -> Sequence[tuple[str, ...]]:
        """Columns of the rows without which `score` fails; of several in one entry, one is enough."""
        return ()

    def asks(self) -> str | None:
        """The server that the rewards come from, for what they follow from; None: nobody is asked. No credential."""
        return None

    def prepare(self) -> None:
        """Raises RequestError when something is missing that the recipe cannot hold, such as a key."""


def text_of(value: Any) -> str:
    """The text of a completion or reference, without white space around it; of messages, the last one's."""
    return content_of(value).strip()


def content_of(value: Any) -> str:
    """The text of a completion or reference as it stands; of messages, the last one's."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[-1]["content"] if value else ""
    return str(value)
