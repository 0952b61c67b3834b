"""The smallest change of a stage's settings that fits: first what costs little, last what changes the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flows.machine import Machine
from flows.memory_engine_advice import differences, engine_changes
from flows.within_memory import LEAST_MICRO_BATCH_TOKENS
from stages.sharding import Whole, Zero
from stages.training.memory_phase import Phase, worst
from stages.training.memory_request import Request
from stages.training.memory_training import Setup

Memory = Callable[[Request], Sequence[Phase]]

_PROCESSES = (2, 4, 8, 16)
_RANK = 16
_SHORTEST = 128


@dataclass(frozen=True)
class Change:
    """Settings to write in place of others, and what a process then needs."""

    fields: Mapping[str, tuple[Any, Any]]
    """Field of `with` or `launch` -> (now, then)."""
    peak_bytes: int
    same_result: bool
    """Nothing but operational settings changes."""

    def words(self) -> str:
        """`micro_batch_tokens 8192 -> 2048, gradient_checkpointing`"""
        changes = [
            name if then is True else f"{name} {_word(now)} -> {_word(then)}"
            for name, (now, then) in self.fields.items()
        ]
        return ", ".join(changes) + ("" if self.same_result else " (changes the result)")

    def to_json(self) -> dict[str, Any]:
        """For `posttrain plan --memory --json`."""
        return {
            "words": self.words(),
            "fields": {name: {"from": now, "to": then} for name, (now, then) in self.fields.items()},
            "peak_bytes": self.peak_bytes,
            "same_result": self.same_result,
        }


@dataclass(frozen=True)
class _Way:
    """A set of settings to try together."""

    config: Mapping[str, Any]
    setup: Setup | None = None


def smallest_change(memory: Memory, request: Request, machine: Machine) -> Change | None:
    """The first way that fits, with the largest micro-batches that fit under it; None: none does."""
    for way in _ways(request):
        setup = way.setup or request.setup
        for tokens in _budgets(request.config):
            values = {**way.config, **tokens}
            tried = replace(request, config=request.config.model_copy(update=values), setup=setup)
            limit = machine.for_each(setup)
            need = worst(memory(tried), limit)
            if need.filling(limit) <= 1:
                return _change(request, values, way.setup, round(need.total))
    return None


def _budgets(config: Any) -> Iterator[dict[str, int]]:
    """micro_batch_tokens as it is, and halved again and again."""
    if "micro_batch_tokens" not in type(config).model_fields:
        yield {}
        return
    tokens = config.micro_batch_tokens
    yield {"micro_batch_tokens": tokens}
    while (tokens := tokens // 2) >= LEAST_MICRO_BATCH_TOKENS:
        yield {"micro_batch_tokens": tokens}


def _ways(request: Request) -> Iterator[_Way]:
    """From no change but of micro-batches to every change at once. Fields that a stage does not have are left out."""
    config = request.config
    fields = type(config).model_fields
    free: dict[str, Any] = {"gradient_checkpointing": True}
    free = free if getattr(config, "gradient_checkpointing", None) is False else {}
    aside = _averages_aside(request)
    narrow = {"bf16": True} if "bf16" in fields and not config.bf16 else {}
    fresh = "lora_r" in fields and config.lora_r is None and request.model.adapters is None
    adapters = {"lora_r": _RANK} if fresh else {}
    sets: list[dict[str, Any]] = [{}, aside, free, {**aside, **free}]
    more = list(_more_processes(request))
    engines: list[dict[str, Any]] = [{}, *engine_changes(request)]
    lossless = [{**values, **engine} for values in _different(sets) for engine in engines]
    yield from (_Way(values) for values in lossless)
    yield from (_Way(values, setup) for setup in more for values in lossless)
    free |= aside
    results = _different([narrow, {**free, **narrow}, adapters, {**free, **adapters}, {**free, **narrow, **adapters}])
    yield from (_Way({**values, **engine}) for values in results for engine in engines)
    everything = {**free, **narrow}
    yield from (_Way({**everything, **engine}, setup) for setup in more for engine in engines)
    most = {**everything, **adapters}
    yield from (_Way({**most, **shorter, **engine}) for shorter in _shorter(config) for engine in engines)


def _averages_aside(request: Request) -> dict[str, Any]:
    """Averaged weights in the memory of the host, where a GPU has them."""
    settings = getattr(request.config, "weight_averaging", None)
    if settings is None or settings.device == "cpu" or request.setup.device == "cpu":
        return {}
    return {"weight_averaging": settings.model_copy(update={"device": "cpu"})}


def _different(sets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [values for index, values in enumerate(sets) if values not in sets[:index]]


def _more_processes(request: Request) -> Iterator[Setup]:
    """Everything shared out among more GPUs. On a CPU more processes share the same memory."""
    setup = request.setup
    if setup.device == "cpu":
        return
    for processes in _PROCESSES:
        if processes > setup.processes or (processes == setup.processes and isinstance(setup.sharding, Whole)):
            yield replace(setup, processes=processes, sharding=Zero(3))


def _shorter(config: Any) -> Iterator[dict[str, int]]:
    """Shorter rows and completions."""
    names = [name for name in ("max_length", "max_completion_length") if name in type(config).model_fields]
    values = {name: getattr(config, name) for name in names}
    while values and any(value >= 2 * _SHORTEST for value in values.values()):
        values = {name: value // 2 if value >= 2 * _SHORTEST else value for name, value in values.items()}
        yield {name: value for name, value in values.items() if value != getattr(config, name)}


def _change(request: Request, values: Mapping[str, Any], setup: Setup | None, need: int) -> Change:
    config = request.config
    differing = [change for name, then in values.items() for change in differences(config, name, then)]
    changed = {name: (now, then) for name, now, then, _ in differing}
    same_result = all(operational for _, _, _, operational in differing)
    if setup is not None:
        if setup.processes != request.setup.processes:
            changed["launch.processes"] = (request.setup.processes, setup.processes)
        sharding = request.setup.sharding
        changed["launch.config"] = (None if isinstance(sharding, Whole) else sharding.name, setup.sharding.name)
    return Change(changed, need, same_result)


def _word(value: Any) -> str:
    return "none" if value is None else str(value)
