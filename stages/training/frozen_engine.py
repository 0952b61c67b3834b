"""Engines apart for models that are not trained: they have their weights once, and are held to the proof at the first
completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.adapters import model_source
from stages.context import Context
from stages.rollouts.engine import Engine, ServedModel
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.requests import Completion, Progress, SampleRequest, SamplingConfig
from stages.training.engine_sync import open_engine, send_weights
from stages.training.model import Scorer
from stages.training.out_of_memory import TokenBudget
from stages.training.processes import Processes
from stages.training.sync_proof import SyncProof


class FrozenEngine:
    """A Sampler of weights that stay as they are."""

    def __init__(self, engine: Engine, proof: SyncProof, scorer: Scorer) -> None:
        self._engine, self._proof, self._scorer = engine, proof, scorer
        self._is_proved = False

    def sample(
        self, requests: Sequence[SampleRequest], settings: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """For every request its completions. Raises StageError where the first ones are not of the scorer's weights."""
        sampled = self._engine.sample(requests, settings, on_progress)
        if not self._is_proved:
            self._proof(self._scorer, requests, sampled, settings)
            self._is_proved = True
        return sampled


def frozen_engine_of(
    context: Context, processes: Processes, scorer: Scorer, end_token_ids: Sequence[int]
) -> FrozenEngine | None:
    """Of a stage that samples input `model`, which is `scorer`'s; None where it samples itself. All processes open it
    together."""
    config: Any = context.config
    settings: EngineConfig = config.rollouts
    if not settings.is_apart:
        return None
    source, dtype = model_source(context, "model"), settings.computes_in(config.bf16)
    model = ServedModel(
        source.folder,
        source.tokenizer,
        dtype,
        scorer.vocabulary,
        tuple(end_token_ids),
        config.seed,
        structured=config.structured is not None,
    )
    engine = open_engine(context, processes, settings, model)
    if source.adapter is not None or not reads_the_folder(settings):
        send_weights(engine, processes, scorer, settings)
    proof = SyncProof(
        engine,
        TokenBudget(context, config.micro_batch_tokens),
        tolerance=settings.tolerance(config.bf16),
        dtypes=(dtype, "bfloat16" if config.bf16 else "float32"),
    )
    return FrozenEngine(engine, proof, scorer)


def reads_the_folder(settings: EngineConfig) -> bool:
    """Whether the engine starts with the weights of the folder that it is opened for."""
    return settings.engine == "vllm_server" and not settings.urls
