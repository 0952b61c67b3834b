"""Rollouts of later generations, made while the trainer is busy with earlier ones.

Generation g is sampled with the weights from before generation g - k was trained on, k being `max_staleness`, and the
first ones with those of the beginning. So the weights, like all else, follow from the number of the generation, and
neither the speed of the engine nor that of the trainer can change what is sampled.

With `in_flight_updates` those are the oldest that it has: before every step of the trainer the engine gets the weights
of the moment, and all that it is sampling then goes on with them. How far it has come by then depends on who is fast.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol, Self, TypeVar

from stages.context import Context
from stages.data.ledger import RowLedger
from stages.data.tokenize import TokenizedPrompt
from stages.rollouts.multi_turn.episode import Episode, Opening
from stages.rollouts.requests import Completion, SamplingConfig
from stages.training.generation import Completing, Sampling
from stages.training.job_queue import JobQueue
from stages.training.lagging_engine import Held, LaggingEngine
from stages.training.rollout_drawing import Draws
from stages.training.rollout_metrics import mixture_metrics, staleness_metrics
from stages.training.rollout_records import Sampled

T = TypeVar("T")

Measure = Callable[[Sequence[Sampled], int], dict[str, float]]
"""(a generation, the optimizer steps before its first one) -> how old the weights behind it are then."""


class Pace(Protocol):
    """How generations become optimizer steps."""

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps between two generations."""
        ...

    def total_steps(self, num_prompts: int) -> int:
        """Of all generations together."""
        ...


@dataclass(frozen=True)
class Drawn:
    """A generation's groups, those that they replaced, and what there is to say of their choice."""

    kept: list[Sampled]
    replaced: list[Sampled]
    metrics: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """JSON values; of a prompt's columns the prompt alone, all that is asked for after the rewards."""
        groups = {"kept": self.kept, "replaced": self.replaced}
        return {name: [_saved(one) for one in some] for name, some in groups.items()} | {"metrics": dict(self.metrics)}

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls(
            [_sampled(one) for one in saved["kept"]], [_sampled(one) for one in saved["replaced"]], saved["metrics"]
        )


class Ahead:
    """`Draws` that has the next `staleness` generations drawn in the background, one after the other."""

    on_policy = True
    """In the loss's sense: its ratios are to the weights before the first step on a generation. The correction is to
    those that sampled it."""

    def __init__(
        self,
        drawing: Draws,
        plan: Pace,
        engine: LaggingEngine,
        line: JobQueue,
        *,
        staleness: int,
        settings: SamplingConfig,
        measure: Measure = staleness_metrics,
    ) -> None:
        self.drawing, self.plan, self.engine = drawing, plan, engine
        self._line, self._staleness, self._settings, self._measure = line, staleness, settings, measure
        self._ahead: deque[Future[Drawn]] = deque()
        self._last: Drawn | None = None
        self._generations = -(-plan.total_steps(len(drawing)) // plan.steps_per_batch)

    def __len__(self) -> int:
        return len(self.drawing)

    def draw(self, generation: int) -> tuple[list[Sampled], list[Sampled]]:
        """(The groups of a generation, those that they replaced), as soon as they are there; from now on a later one is
        made with the present weights."""
        if generation == 0:
            held, is_due = self.engine.hold()
            for number in range(min(self._staleness + 1, self._generations)):
                # the trainer waits for the first one, and has its weights until then
                self._begin(number, held, prove=is_due and number == 0)
            drawn = self._ahead.popleft().result()
        else:
            self.moved_on()
            drawn = self._ahead.popleft().result()
            if generation + self._staleness < self._generations:
                self._begin(generation + self._staleness, self._proved(drawn))
        self._last = drawn
        return drawn.kept, drawn.replaced

    def moved_on(self) -> None:
        """What is in flight goes on with the present weights, where it may."""
        if not all(one.done() for one in self._ahead):
            self.engine.renew()

    def between(self, job: Callable[[], T]) -> T:
        """What a job that samples gives, with the present weights: when all that is in flight has arrived, and before
        anything else begins."""
        self._settle()
        held, is_due = self.engine.hold()

        def done() -> T:
            self.engine.take(held, prove=is_due)
            return job()

        return self._line.submit(done).result()

    def _proved(self, drawn: Drawn) -> Held:
        """The present weights. Where a proof of them is due, it is made before the trainer changes them, with tokens of
        the generation that it is about to train on; nothing else may be in flight then."""
        held, is_due = self.engine.hold()
        if is_due:
            self._settle()
            self.engine.take(held)
            self.engine.prove(drawn.kept, self._settings)
        return held

    def _begin(self, generation: int, held: Held, *, prove: bool = False) -> None:
        self._ahead.append(self._line.submit(partial(self._draw, generation, held, prove)))

    def _draw(self, generation: int, held: Held, prove: bool) -> Drawn:
        self.engine.take(held, prove=prove)
        kept, replaced = self.drawing.draw(generation)
        ages = self._measure([*kept, *replaced], generation * self.plan.steps_per_batch)
        return Drawn(
            [_dated(one, held.version) for one in kept],
            [_dated(one, held.version) for one in replaced],
            self.drawing.metrics(kept, replaced) | ages,
        )

    def _settle(self) -> list[Drawn]:
        """All that is in flight, when it has arrived."""
        return [one.result() for one in self._ahead]

    def metrics(self, kept: Sequence[Sampled], replaced: Sequence[Sampled]) -> dict[str, float]:
        """As they were when the generation was drawn, and how old the weights behind it are at its first step."""
        assert self._last is not None
        return dict(self._last.metrics)

    def note_unused(self, ledger: RowLedger) -> None:
        """Take back from the ledger the prompts of which nothing was trained."""
        self.drawing.note_unused(ledger)

    def state(self) -> dict[str, Any]:
        """JSON values from which drawing goes on. Waits for what is in flight: its weights will be gone."""
        drawn = [one.to_json() for one in self._settle()]
        return {"drawing": self.drawing.state(), "ahead": drawn}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.drawing.load(state["drawing"])
        self._ahead = deque(_arrived(Drawn.of(one)) for one in state["ahead"])


def ahead_of(
    context: Context,
    drawing: Draws,
    plan: Pace,
    sampling: Completing,
    step_of: Callable[[int], int] = lambda step: step,
) -> Draws:
    """The drawing, made ahead where the engine's weights may be older than the trainer's. `step_of`: a step of the plan
    -> the optimizer step that it is, where the run has others between them."""
    if not isinstance(sampling, Sampling) or not isinstance(sampling.engine, LaggingEngine):
        return drawing
    line = JobQueue()
    context.resources.callback(line.close)  # before the engine's: nobody asks a server that is being stopped
    rollouts = context.config.rollouts
    measure = mixture_metrics if rollouts.changes_in_flight else staleness_metrics
    return Ahead(
        drawing,
        plan,
        sampling.engine,
        line,
        staleness=rollouts.max_staleness,
        settings=sampling.settings,
        measure=lambda sampled, step: measure(sampled, step_of(step)),
    )


def _arrived(drawn: Drawn) -> Future[Drawn]:
    future: Future[Drawn] = Future()
    future.set_result(drawn)
    return future


def _dated(one: Sampled, version: int) -> Sampled:
    """With the oldest version behind it; one without tokens has that which it would have begun with."""
    versions = [version for completion in one.completions for version in completion.weight_versions]
    return replace(one, weight_version=min(versions, default=version))


def _saved(one: Sampled) -> dict[str, Any]:
    prompt = replace(one.prompt, row={"prompt": one.prompt.row["prompt"]})
    return asdict(replace(one, prompt=prompt))


def _sampled(saved: dict[str, Any]) -> Sampled:
    completions = [Completion(**{**one, "episode": _episode(one["episode"])}) for one in saved["completions"]]
    return Sampled(**{**saved, "prompt": TokenizedPrompt(**saved["prompt"]), "completions": completions})


def _episode(saved: dict[str, Any] | None) -> Episode | None:
    if saved is None:
        return None
    opening = None if saved["opening"] is None else Opening(**saved["opening"])
    rewards = tuple(saved["environment_rewards"])
    return Episode(**{**saved, "opening": opening, "environment_rewards": rewards})
