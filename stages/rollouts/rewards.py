"""Rewards: what completions are worth, by built-in verdicts, functions of the user, or a reward model.

A reward function is TRL's: `f(prompts, completions, **columns) -> list[float | None]`, sync or async, called once for
all completions; every argument has one entry a completion. Conversational prompts are lists of messages, and
completions `[{"role": "assistant", "content": text}]`; others are strings. None: not scored by this function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from artifacts.errors import PosttrainError, RequestError, StageError
from stages.external import load_code
from stages.names import nearest
from stages.rollouts.reward_call import Call, Values, call_all, checked
from stages.rollouts.verdicts import exact_match, numeric_match

if TYPE_CHECKING:
    from stages.data.tokenize import TokenizedPrompt
    from stages.rollouts.requests import Completion

REWARDS: dict[str, Callable[..., Any]] = {"exact_match": exact_match, "numeric_match": numeric_match}
"""Built-in reward functions by name."""

REWARD_MODEL = "reward_model"
"""Name under which a reward model's scores are reported."""


class RewardModel(Protocol):
    """Scores of token ids: [prompts], [prompts][completions] -> [prompts][completions]."""

    def __call__(
        self, prompts_ids: Sequence[Sequence[int]], completions_ids: Sequence[Sequence[Sequence[int]]], /
    ) -> list[list[float]]: ...


@dataclass(frozen=True)
class Scores:
    """Rewards by prompt and completion."""

    by_function: dict[str, list[Values]]
    totals: list[Values]
    """Weighted sum over the functions that scored the completion; None: none did."""


class RewardSet:
    """Reward functions with their weights, a reward model last."""

    def __init__(
        self,
        references: Sequence[str],
        weights: Sequence[float] | None = None,
        *,
        reward_model: RewardModel | None = None,
    ) -> None:
        """`references`: built-in names or `file.py:name`. Raises RequestError for one that cannot be used."""
        self._functions = {_name(reference): _load(reference) for reference in references}
        self._reward_model = reward_model
        names = [*map(_name, references), *([REWARD_MODEL] if reward_model is not None else [])]
        if len(set(names)) < len(names):
            raise RequestError(f"two rewards have one name: {', '.join(names)}; rename a function")
        if weights is not None and len(weights) != len(names):
            raise RequestError(f"{len(weights)} reward_weights for {len(names)} rewards: {', '.join(names)}")
        self._weights = dict(zip(names, weights if weights is not None else [1.0] * len(names), strict=True))

    def score(
        self,
        prompts: Sequence[TokenizedPrompt],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
        *,
        some_scored: bool = True,
    ) -> Scores:
        """Rewards of every prompt's completions. Raises StageError naming function, row and completion.

        some_scored: None for every completion is an error; not where these are a piece of a larger whole.
        """
        call = Call.of(prompts, completions, texts)
        flat = {name: checked(name, values, call.places) for name, values in call_all(self._functions, call).items()}
        if self._reward_model is not None:
            ids = [[completion.token_ids for completion in group] for group in completions]
            scores = self._reward_model([prompt.prompt_ids for prompt in prompts], ids)
            flat[REWARD_MODEL] = checked(REWARD_MODEL, [value for group in scores for value in group], call.places)
        totals = [self._total({name: values[i] for name, values in flat.items()}) for i in range(len(call.places))]
        if some_scored and totals and all(total is None for total in totals):
            raise StageError(
                f"no reward function scored any of {len(totals)} completions (all gave None), the first of row "
                f"{call.places[0].row_id}; check that {', '.join(flat)} find the columns they compare with"
            )
        sizes = [len(group) for group in texts]
        return Scores({name: _grouped(values, sizes) for name, values in flat.items()}, _grouped(totals, sizes))

    def _total(self, values: Mapping[str, float | None]) -> float | None:
        scored = [self._weights[name] * value for name, value in values.items() if value is not None]
        return sum(scored) if scored else None


def unknown_rewards(references: Sequence[str]) -> list[str]:
    """What is wrong with names that should be built in; functions in files are checked where paths are resolved."""
    return [
        f"no built-in reward {reference!r}{nearest(reference, REWARDS)}; there are {', '.join(REWARDS)}, or give "
        "file.py:name"
        for reference in references
        if ":" not in reference and reference not in REWARDS
    ]


def _name(reference: str) -> str:
    return reference.rsplit(":", 1)[-1]


def _load(reference: str) -> Callable[..., Any]:
    if problems := unknown_rewards([reference]):
        raise RequestError(problems[0])
    if ":" not in reference:
        return REWARDS[reference]
    try:
        return load_code(reference)
    except PosttrainError:
        raise
    except Exception as error:
        raise StageError(f"cannot load reward {reference}: {type(error).__name__}: {error}") from error


def _grouped(values: Values, sizes: Sequence[int]) -> list[Values]:
    rest = iter(values)
    return [[next(rest) for _ in range(size)] for size in sizes]
