"""Rewards: what completions are worth, by built-in verdicts, functions of the user, or a reward model.

A reward function is TRL's: `f(prompts, completions, **columns) -> list[float | None]`, sync or async, called once for
all completions; every argument has one entry a completion. Conversational prompts are lists of messages, and
completions `[{"role": "assistant", "content": text}]`; others are strings. None: not scored by this function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from artifacts.errors import PosttrainError, RequestError, StageError
from stages.external import load_named
from stages.rollouts.reward_arguments import Call
from stages.rollouts.reward_call import Failure, RewardFunction, Values, call_all, checked, finite
from stages.rollouts.reward_spec import REWARDS, Reward, RewardSpec, spec_of, unknown_rewards

if TYPE_CHECKING:
    from stages.data.tokenize import TokenizedPrompt
    from stages.rollouts.requests import Completion
    from stages.rollouts.reward_cache import OpenShards, RewardCache

__all__ = [
    "REWARDS",
    "REWARD_MODEL",
    "Found",
    "Reward",
    "RewardModel",
    "RewardSet",
    "Scores",
    "failed_metric",
    "unknown_rewards",
]

T = TypeVar("T")

REWARD_MODEL = "reward_model"
"""Name under which a reward model's scores are reported."""

_SAVED_AT_ONCE = 64
"""Completions that a cached reward is asked for at once: what a killed run pays twice at most."""


@dataclass(frozen=True)
class Found:
    """What reward functions gave, by their names, one entry a completion each."""

    values: dict[str, Values]
    failures: dict[str, list[Failure | None]]
    """Of the functions that may fail; None: did not."""


class RewardModel(Protocol):
    """Scores of completions: [prompts][completions]."""

    def __call__(
        self,
        prompts: Sequence[TokenizedPrompt],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
        /,
    ) -> list[list[float]]: ...


@dataclass(frozen=True)
class Scores:
    """Rewards by prompt and completion."""

    by_function: dict[str, list[Values]]
    totals: list[Values]
    """Weighted sum over the functions that scored the completion; None: none did."""
    failed: dict[str, list[list[bool]]]
    """Of every function that may fail, by prompt and completion: whether it did."""


class RewardSet:
    """Reward functions with their weights, a reward model last."""

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float] | None = None,
        *,
        reward_model: RewardModel | None = None,
        open_shards: OpenShards | None = None,
        share: Callable[[Callable[[], Found]], Found] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """`open_shards`: where rewards are cached (`Store.shards`); None: nowhere. `share`: has functions called by one
        process for all that ask for the same rewards; None: each calls them. `say`: is told of functions that failed
        and may (`Context.log`). Raises RequestError for a reward that cannot be used."""
        specs = [spec_of(reward) for reward in rewards]
        names = [*(spec.called for spec in specs), *([REWARD_MODEL] if reward_model is not None else [])]
        if len(set(names)) < len(names):
            raise RequestError(f"two rewards have one name: {', '.join(names)}; give one of them a label")
        if weights is not None and len(weights) != len(names):
            raise RequestError(f"{len(weights)} reward_weights for {len(names)} rewards: {', '.join(names)}")
        self._functions = [_function(spec) for spec in specs]
        self._caches = {spec.called: _cache(spec, open_shards) for spec in specs}
        self._reward_model = reward_model
        self._share = share if share is not None else lambda compute: compute()
        self._say = say if say is not None else lambda text: None
        self._weights = dict(zip(names, weights if weights is not None else [1.0] * len(names), strict=True))

    @property
    def may_fail(self) -> list[str]:
        """Names of the functions whose failures are counted."""
        return [function.name for function in self._functions if function.on_error == "none"]

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
        found = self._share(lambda: self._by_function(call))
        flat = dict(found.values)
        told = [_told(name, failures) for name, failures in found.failures.items() if any(failures)]
        for text in told:
            self._say(text)
        if self._reward_model is not None:
            scores = self._reward_model(prompts, completions, texts)
            model = RewardFunction(REWARD_MODEL, self._reward_model)
            flat[REWARD_MODEL] = checked(model, [value for group in scores for value in group], call)
        totals = [self._total({name: values[i] for name, values in flat.items()}) for i in range(len(call.places))]
        if some_scored and totals and all(total is None for total in totals):
            raise StageError(
                f"no reward function scored any of {len(totals)} completions (all gave None), the first of row "
                f"{call.places[0].row_id}; "
                + ("; ".join(told) or f"check that {', '.join(flat)} find the columns they compare with")
            )
        sizes = [len(group) for group in texts]
        failed = {
            name: _grouped([one is not None for one in failures], sizes) for name, failures in found.failures.items()
        }
        by_function = {name: _grouped(values, sizes) for name, values in flat.items()}
        return Scores(by_function, _grouped(totals, sizes), failed)

    def _by_function(self, call: Call) -> Found:
        """Known rewards from the caches, the others from the functions, which run together."""
        pending = [_Pending(function, call, self._caches[function.name]) for function in self._functions]
        while calls := [(one, indices) for one in pending if (indices := one.next_indices())]:
            found = call_all([(one.function, call.only(indices)) for one, indices in calls])
            for (one, indices), values in zip(calls, found, strict=True):
                if not isinstance(values, PosttrainError):
                    one.take(indices, values)
            # what the others were paid for is kept
            for values in found:
                if isinstance(values, PosttrainError):
                    raise values
        return Found(
            {one.function.name: checked(one.function, one.values, call) for one in pending},
            {
                one.function.name: [value if isinstance(value, Failure) else None for value in one.values]
                for one in pending
                if one.function.on_error == "none"
            },
        )

    def _total(self, values: Mapping[str, float | None]) -> float | None:
        scored = [self._weights[name] * value for name, value in values.items() if value is not None]
        return sum(scored) if scored else None


class _Pending:
    """A function's rewards of a call, as far as they are known."""

    def __init__(self, function: RewardFunction, call: Call, cache: RewardCache | None) -> None:
        self.function, self.cache = function, cache
        self.values: list[Any] = [None] * len(call.places)
        self._waiting = list(range(len(call.places)))
        if cache is not None and call.places:
            self._keys = cache.keys(function.keywords(call), len(call.places))
            known = cache.known(self._keys)
            self.values = [known.get(key) for key in self._keys]
            first = {key: index for index, key in reversed(list(enumerate(self._keys)))}
            self._waiting = sorted(index for key, index in first.items() if key not in known)

    def next_indices(self) -> list[int]:
        """The completions to ask for next, of equal ones the first; empty: all are known."""
        return self._waiting[:_SAVED_AT_ONCE] if self.cache is not None else self._waiting

    def take(self, indices: Sequence[int], values: Sequence[Any]) -> None:
        """Keep what the function said of them, even where it failed for another one of them."""
        self._waiting = self._waiting[len(indices) :]
        if self.cache is None:
            self.values = list(values)
            return
        found = {self._keys[index]: value for index, value in zip(indices, values, strict=True)}
        self.values = [found.get(key, value) for key, value in zip(self._keys, self.values, strict=True)]
        numbers = {key: finite(value) for key, value in found.items()}
        self.cache.save({key: number for key, number in numbers.items() if number is not None})


def _function(spec: RewardSpec) -> RewardFunction:
    built_in = spec.built_in()
    if built_in is None:
        limits = spec.timeout_seconds, spec.on_timeout, spec.on_error, spec.max_tries
        return RewardFunction(spec.called, load_named("reward", spec.name), spec.parameters, None, *limits)
    built_in.prepare()
    seconds = spec.timeout_seconds if spec.timeout_seconds is not None else built_in.timeout_seconds
    return RewardFunction(spec.called, built_in.score, {}, built_in.columns_used(), seconds, spec.on_timeout)


def _cache(spec: RewardSpec, open_shards: OpenShards | None) -> RewardCache | None:
    from stages.rollouts.reward_cache import RewardCache

    built_in = spec.built_in()
    wanted = spec.cache if spec.cache is not None else built_in is not None and built_in.cached
    return RewardCache.of(spec, open_shards) if wanted and open_shards is not None else None


def failed_metric(name: str) -> str:
    """The metric that says for how many completions a function failed."""
    return f"rewards/{name}/failed"


def _told(name: str, failures: Sequence[Failure | None]) -> str:
    """How often a function failed, and the first error."""
    failed = [failure for failure in failures if failure is not None]
    return (
        f"reward function {name!r} failed for {len(failed)} of {len(failures)} completions, which it leaves unscored "
        f"(on_error: none); the first, {failed[0]}"
    )


def _grouped(values: Sequence[T], sizes: Sequence[int]) -> list[list[T]]:
    rest = iter(values)
    return [[next(rest) for _ in range(size)] for size in sizes]
