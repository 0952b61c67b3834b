"""Completions of the model in training: sampled over all processes, decoded, scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from artifacts.errors import PosttrainError, StageError
from stages.context import Context
from stages.data.tokenize import TokenizedPrompt
from stages.rollouts.form_masks import check_form
from stages.rollouts.multi_turn.loop import MultiTurn
from stages.rollouts.requests import Completion, Sampler, SampleRequest, SamplingConfig
from stages.rollouts.rewards import RewardSet
from stages.rollouts.sampler import EmbeddedSampler
from stages.rollouts.stopping import text_before
from stages.training.engine_sync import SyncedEngine, engine_of
from stages.training.loop import Trainer
from stages.training.model import Scorer
from stages.training.multi_turn import opened, unless_broken
from stages.training.rollout_records import Sampled

T = TypeVar("T")


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: the generation config's, and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})


def sampling_settings(config: Any) -> SamplingConfig:
    """The sampling fields of a stage's configuration."""
    fields = {name: getattr(config, name) for name in SamplingConfig.model_fields if hasattr(config, name)}
    return SamplingConfig(**fields)


@dataclass(frozen=True)
class Sampling:
    """Samples prompts with the embedded engine, each process its share; every process gets all completions."""

    scorer: Scorer
    tokenizer: Any
    settings: SamplingConfig
    accelerator: Accelerator | None
    """None: every process is given prompts of its own, and samples all of them."""
    engine: Sampler | None = field(default=None, kw_only=True)
    """What samples in the place of the model itself."""
    multi_turn: MultiTurn | None = field(default=None, kw_only=True)
    """What answers the model, so that completions have several turns."""

    @classmethod
    def of(cls, trainer: Trainer, tokenizer: Any, config: Any) -> Sampling:
        """With the sampling fields of a stage's configuration."""
        return cls(trainer.policy(), tokenizer, sampling_settings(config), trainer.accelerator)

    @classmethod
    def with_engine(cls, trainer: Trainer, tokenizer: Any, config: Any) -> Sampling:
        """As `of`, by the engine that the configuration names; opened here."""
        ends = end_token_ids(trainer.scorer.transformers_model, tokenizer)
        check_form(getattr(config, "structured", None), tokenizer, ends, trainer.context.log)
        return replace(cls.of(trainer, tokenizer, config), engine=engine_of(trainer, ends, config))

    def __call__(self, prompts: Sequence[TokenizedPrompt], seeds: Sequence[tuple[int, ...]]) -> list[list[Completion]]:
        """For every prompt one completion a seed."""
        together = self.accelerator
        rank, world = (0, 1) if together is None else (together.process_index, together.num_processes)
        mine = range(rank, len(prompts), world)
        made = self._completions([prompts[i] for i in mine], [seeds[i] for i in mine])
        found = list(zip(mine, made, strict=True))
        if world > 1:
            found = sorted(gather_object(found), key=lambda entry: entry[0])
        return [completions for _, completions in found]

    def _completions(
        self, prompts: Sequence[TokenizedPrompt], seeds: Sequence[tuple[int, ...]]
    ) -> list[list[Completion]]:
        sampler = self.sampler() if self.engine is None else self.engine
        if self.multi_turn is not None:
            return self.multi_turn(sampler, prompts, seeds, self.settings)
        requests = [
            SampleRequest(prompt.prompt_ids, own, prompt.row_id) for prompt, own in zip(prompts, seeds, strict=True)
        ]
        return sampler.sample(requests, self.settings)

    @property
    def policy(self) -> Sampling:
        """What the trained model samples: all."""
        return self

    def by(self, scorer: Scorer) -> Sampling:
        """The same by another model, which is not trained."""
        engine = self.engine
        assert engine is None or isinstance(engine, SyncedEngine), "engines that lag behind have one model's weights"
        return replace(self, scorer=scorer, engine=None if engine is None else engine.holding(scorer))

    def sampler(self) -> EmbeddedSampler:
        """Of the present weights."""
        return EmbeddedSampler(self.scorer.transformers_model, **self.endings())

    def endings(self) -> dict[str, Any]:
        """How a sampler knows the end of a completion."""
        pad = self.tokenizer.pad_token_id
        return {
            "eos_token_ids": end_token_ids(self.scorer.transformers_model, self.tokenizer),
            "pad_token_id": pad if pad is not None else self.tokenizer.eos_token_id,
            "decode": self._decode,
            "tokenizer": self.tokenizer,
        }

    def text(self, completion: Completion) -> str:
        """What the completion says, without special tokens, up to a stop string; of several turns, the last."""
        if completion.episode is not None:
            return completion.episode.last_words
        return text_before(self._decode(completion.token_ids), self.settings.stop_strings)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


class Completing(Protocol):
    """What completes prompts: `Sampling`, or one of several authors."""

    @property
    def policy(self) -> Sampling:
        """The author that is trained, alone."""
        ...

    def __call__(self, prompts: Sequence[TokenizedPrompt], seeds: Sequence[tuple[int, ...]]) -> list[list[Completion]]:
        """For every prompt one completion a seed."""
        ...

    def text(self, completion: Completion) -> str:
        """What a completion says."""
        ...


@dataclass(frozen=True)
class Generation:
    """Sampling and rewards together: the `Generate` of rollout windows."""

    sampling: Completing
    rewards: RewardSet
    context: Context

    @classmethod
    def of(
        cls, context: Context, trainer: Trainer, tokenizer: Any, config: Any, multi_turn: MultiTurn | None = None
    ) -> Generation:
        """With the rewards of a stage's configuration and, where wired in, the reward model."""
        scorer = None
        if context.has("reward_model"):
            from stages.training.reward_scoring import RewardModelScorer

            device, bf16 = trainer.accelerator.device, trainer.config.bf16
            scorer = RewardModelScorer(context, tokenizer, device, config.micro_batch_tokens, bf16=bf16)
        rewards = RewardSet(
            config.rewards,
            config.reward_weights,
            reward_model=scorer,
            open_shards=context.store.shards,
            share=partial(by_the_first, trainer.accelerator),
            say=context.log,
        )
        sampling = Sampling.with_engine(trainer, tokenizer, config)
        return cls(replace(sampling, multi_turn=multi_turn), rewards, context)

    def __call__(
        self, prompts: Sequence[TokenizedPrompt], seeds: Sequence[tuple[int, ...]], *, some_scored: bool = True
    ) -> list[Sampled]:
        """Sample, decode, score. Every process gets the same rewards: functions are called by the first for all."""
        sampled = self.sampling(prompts, seeds)
        texts = [[self.sampling.text(completion) for completion in group] for group in sampled]
        prompts = [opened(prompt, group) for prompt, group in zip(prompts, sampled, strict=True)]
        scored = self.rewards.score(prompts, sampled, texts, some_scored=some_scored)
        return [
            Sampled(
                prompt,
                completions,
                group_texts,
                {name: values[index] for name, values in scored.by_function.items()},
                unless_broken(scored.totals[index], completions),
                failed={name: sum(failed[index]) for name, failed in scored.failed.items()},
            )
            for index, (prompt, completions, group_texts) in enumerate(zip(prompts, sampled, texts, strict=True))
        ]


def by_the_first(accelerator: Accelerator, compute: Callable[[], T]) -> T:
    """What the first process computes, or its error, on all of them: a judge is asked once, and no two disagree."""
    if accelerator.num_processes == 1:
        return compute()
    told: list[Any] = [None, None]
    cause = None
    if accelerator.is_main_process:
        try:
            told[0] = compute()
        except PosttrainError as error:
            told[1], cause = str(error), error
    found, problem = broadcast_object_list(told)
    if problem is not None:
        raise StageError(problem) from cause
    return found  # type: ignore[no-any-return]
