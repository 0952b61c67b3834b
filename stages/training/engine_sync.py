"""Engines apart from the trainer: opened for a stage, given its weights before they sample, held to the proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from artifacts.errors import StageError
from stages.adapters import model_source
from stages.context import Context
from stages.rollouts.engine import Engine, ServedModel
from stages.rollouts.engine_settings import EngineChoice, EngineConfig, OverlappedEngineConfig
from stages.rollouts.requests import Completion, Progress, Sampler, SampleRequest, SamplingConfig
from stages.rollouts.vllm_requests import require_bytes
from stages.training.adapter_weights import adapter_weights, served_adapter
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.occupancy import Clocked
from stages.training.out_of_memory import TokenBudget
from stages.training.processes import Processes
from stages.training.sync_proof import SyncProof
from stages.training.whole_weights import whole_weights

if TYPE_CHECKING:
    from torch import Tensor

ROLLOUTS, TEACHER = "rollouts", "teacher"
"""What an engine is for."""

_OTHERS = -1
"""In the place of a version: weights of a model that is not trained."""


class SyncedEngine:
    """A Sampler: before it samples, its engine gets the weights of the moment, if it has others.

    With several processes each asks for completions of its own.
    """

    def __init__(
        self,
        engine: Engine,
        proof: SyncProof,
        send: Callable[[Engine, Scorer], None],
        *,
        policy: Callable[[], Scorer],
        version: Callable[[], int],
        interval: int,
    ) -> None:
        """`send`: gives the engine the scorer's weights. `version`: optimizer steps behind the weights of `policy`. The
        proof is asked for at every `interval`-th sync, the first one included."""
        self._engine, self._proof, self._send = engine, proof, send
        self._policy, self._version, self._interval = policy, version, interval
        self._loaded: int | None = None
        self._syncs = {False: 0, True: 0}
        """How often weights were sent: the policy's, and others'."""

    def sample(
        self, requests: Sequence[SampleRequest], settings: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """Of the present weights; their version is with every token. Raises StageError where the proof fails."""
        version = self._version()
        sampled = self._sample(self._policy(), version, requests, settings, on_progress)
        return [[stamped(completion, version) for completion in group] for group in sampled]

    def holding(self, scorer: Scorer) -> Sampler:
        """The same engine with the weights of another model, which has taken no steps: those of the reference.

        Raises StageError for a model of another form.
        """
        if not self._syncs[True]:
            _require_same_form(self._policy(), scorer)
        return _Holding(self, scorer)

    def sample_of(
        self,
        scorer: Scorer,
        requests: Sequence[SampleRequest],
        settings: SamplingConfig,
        on_progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """As `sample`, of the weights of another model."""
        sampled = self._sample(scorer, _OTHERS, requests, settings, on_progress)
        return [[stamped(completion, 0) for completion in group] for group in sampled]

    def _sample(
        self,
        scorer: Scorer,
        version: int,
        requests: Sequence[SampleRequest],
        settings: SamplingConfig,
        on_progress: Progress | None,
    ) -> list[list[Completion]]:
        is_due, others = False, version == _OTHERS
        if version != self._loaded:
            self._send(self._engine, scorer)
            self._loaded, is_due = version, self._syncs[others] % self._interval == 0
            self._syncs[others] += 1
        sampled = self._engine.sample(requests, settings, on_progress)
        if is_due:
            self._proof(scorer, requests, sampled, settings)
        if self._engine.rest():
            self._loaded = None
        return sampled


@dataclass(frozen=True)
class _Holding:
    """A Sampler of one model, by an engine that has others' weights at other times."""

    engine: SyncedEngine
    scorer: Scorer

    def sample(
        self, requests: Sequence[SampleRequest], settings: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        return self.engine.sample_of(self.scorer, requests, settings, on_progress)


def _require_same_form(policy: Scorer, other: Scorer) -> None:
    ours, theirs = (
        {name: tuple(tensor.shape) for name, tensor in whole_weights(one.transformers_model)} for one in (policy, other)
    )
    if different := sorted(set(ours.items()) ^ set(theirs.items())):
        name = different[0][0]
        raise StageError(
            f"the reference has other weights than the policy ({name}: {theirs.get(name)} and {ours.get(name)}), and "
            "rollouts.engine, which samples both, was opened for the policy's; give a reference of the policy's "
            "architecture, or leave rollouts out: the embedded engine samples any"
        )


def send_weights(
    engine: Engine, processes: Processes, scorer: Scorer, settings: EngineConfig, *, adapter: bool = False
) -> None:
    """From the first process, or from each to the engine inside it; all wait until the weights are there, and all stop
    where they do not come. `adapter`: its own alone."""
    problem: str | None = None
    inside = settings.engine == "vllm"
    if inside or processes.rank == 0:
        try:
            engine.load(sent(scorer, adapter=adapter))
        except StageError as error:
            problem = str(error)
    if (problem := problem if inside else processes.share(problem)) is not None:
        raise StageError(problem)


def sent(scorer: Scorer, *, adapter: bool) -> Iterator[tuple[str, Tensor]]:
    """What an engine is given: the adapter alone, or all weights with adapters merged."""
    return adapter_weights(scorer.model) if adapter else whole_weights(scorer.transformers_model)


def stamped(completion: Completion, version: int) -> Completion:
    """With the version of the weights behind every token."""
    return replace(completion, weight_versions=[version] * len(completion.token_ids))


def engine_of(trainer: Trainer, end_token_ids: Sequence[int], config: Any) -> Sampler | None:
    """Of a stage's configuration; None where the model in training samples itself."""
    if not isinstance(config, EngineChoice) or not config.rollouts.is_apart:
        return None
    settings, training = config.rollouts, trainer.config
    is_ahead = isinstance(settings, OverlappedEngineConfig) and settings.max_staleness > 0
    if is_ahead and trainer.processes.size > 1:
        raise StageError(
            f"rollouts.max_staleness is for one training process, here are {trainer.processes.size}; leave it out"
        )
    model = _served_model(trainer, end_token_ids, config)
    adapter = model.adapter is not None
    engine: Engine = Clocked(open_engine(trainer.context, trainer.processes, settings, model), trainer.context.timings)
    proof = SyncProof(
        engine,
        TokenBudget(trainer.context, training.micro_batch_tokens),
        tolerance=settings.tolerance(training.bf16),
        dtypes=(model.dtype, "bfloat16" if training.bf16 else "float32"),
    )
    if is_ahead:
        from stages.training.in_flight_engine import InFlightEngine
        from stages.training.lagging_engine import LaggingEngine

        kind = InFlightEngine if settings.changes_in_flight else LaggingEngine
        return kind(
            engine,
            proof,
            partial(sent, adapter=adapter),
            policy=trainer.policy,
            version=lambda: trainer.weights_version,
            interval=settings.proof_interval,
        )
    return SyncedEngine(
        engine,
        proof,
        lambda engine, scorer: send_weights(engine, trainer.processes, scorer, settings, adapter=adapter),
        policy=trainer.policy,
        version=lambda: trainer.weights_version,
        interval=settings.proof_interval,
    )


def _served_model(trainer: Trainer, end_token_ids: Sequence[int], config: EngineChoice) -> ServedModel:
    """Input `model` in training, as the engine of its rollouts has it."""
    settings, source = config.rollouts, model_source(trainer.context, "model")
    return ServedModel(
        source.folder,
        source.tokenizer,
        settings.computes_in(trainer.config.bf16),
        trainer.scorer.vocabulary,
        tuple(end_token_ids),
        trainer.config.seed,
        served_adapter(trainer.scorer.model) if settings.lora_sync == "adapter" else None,
        structured=config.structured is not None,
    )


def open_engine(
    context: Context, processes: Processes, settings: EngineConfig, model: ServedModel, role: str = ROLLOUTS
) -> Engine:
    """Of the kind that the settings name; closed when the stage ends."""
    if model.structured:
        require_bytes(model.tokenizer)
    engine = _ENGINES[settings.engine](context, processes, settings, model, role)
    context.resources.callback(engine.close)
    return engine


def _in_process(
    context: Context, processes: Processes, settings: EngineConfig, model: ServedModel, role: str
) -> Engine:
    from stages.rollouts.vllm_engine import VllmEngine

    context.phase("starting vLLM")
    return VllmEngine(model, settings, processes.size)


def _served(context: Context, processes: Processes, settings: EngineConfig, model: ServedModel, role: str) -> Engine:
    from stages.training.engine_servers import open_servers

    log_name = "vllm" if role == ROLLOUTS else f"vllm-{role}"
    return open_servers(context, processes, settings, model, role=role, log_name=log_name)


_ENGINES: dict[str, Callable[[Context, Processes, EngineConfig, ServedModel, str], Engine]] = {
    "vllm": _in_process,
    "vllm_server": _served,
}
