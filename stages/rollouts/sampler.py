"""The embedded sampler: transformers' forward pass, a prompt computed once for all its completions.

P prompts of a batch, B rows (completions) still in it, R rows it began with, T tokens of a completion.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from artifacts.errors import StageError
from stages.rollouts.cache import keep_rows, reserved_cache
from stages.rollouts.draw import draw, uniforms
from stages.rollouts.requests import Completion, Progress, SampleRequest, SamplingConfig

FINISHED_SHARE = 8
"""Finished rows leave once they are one in so many: leaving copies the cache of those that stay."""


@dataclass(frozen=True)
class _Part:
    """Some completions of one request: which request, its prompt, and (place among its seeds, seed) of each."""

    request: int
    prompt_ids: Sequence[int]
    seeds: tuple[tuple[int, int], ...]


class EmbeddedSampler:
    """Samples with the given model as it is at that moment: nothing to synchronize after an optimizer step.

    `max_batch_tokens` bounds the tokens whose keys and values are held at once: rows x (longest prompt +
    longest completion). A single completion beyond it still runs, alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Collection[int],
        pad_token_id: int,
        max_batch_tokens: int = 65_536,
    ) -> None:
        self._model = model
        self._end_ids = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=model.device)
        self._pad_id = pad_token_id
        self._max_batch_tokens = max_batch_tokens

    @torch.no_grad()
    def sample(
        self, requests: Sequence[SampleRequest], settings: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """For every request its completions, in the order of its seeds.

        A completion follows from its prompt, its seed and the weights; what else is in the batch changes its
        log-probabilities by rounding only. Raises StageError for a prompt that is empty or too long for the
        model.
        """
        self._check(requests, settings)
        results: list[dict[int, Completion]] = [{} for _ in requests]
        total, done = sum(len(request.seeds) for request in requests), 0
        was_training = self._model.training
        self._model.eval()
        try:
            for batch in self._batches(requests, settings.max_completion_length):
                for request, place, completion in self._run(batch, settings):
                    results[request][place] = completion
                done += sum(len(part.seeds) for part in batch)
                if on_progress is not None:
                    on_progress(done, total)
        finally:
            self._model.train(was_training)
        return [[found[place] for place in range(len(found))] for found in results]

    def _check(self, requests: Sequence[SampleRequest], settings: SamplingConfig) -> None:
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        for number, request in enumerate(requests):
            name, length = _name(number, request.row_id), len(request.prompt_ids)
            if length == 0:
                raise StageError(f"{name} has no tokens; there is nothing to continue")
            if limit is not None and length + settings.max_completion_length > limit:
                longest = limit - settings.max_completion_length
                remedy = f", or drop prompts of more than {longest} tokens" if longest > 0 else ""
                raise StageError(
                    f"{name} has {length} tokens; with max_completion_length {settings.max_completion_length} that "
                    f"is more than the {limit} the model takes; lower max_completion_length{remedy}"
                )

    def _batches(self, requests: Sequence[SampleRequest], completion_length: int) -> Iterator[list[_Part]]:
        """Longest prompts first, so that a budget too large for the memory shows at once."""
        batch: list[_Part] = []
        room = 0
        for number in sorted(range(len(requests)), key=lambda number: -len(requests[number].prompt_ids)):
            request = requests[number]
            most = max(1, self._max_batch_tokens // (len(request.prompt_ids) + completion_length))
            numbered = tuple(enumerate(request.seeds))
            for start in range(0, len(numbered), most):
                seeds = numbered[start : start + most]
                if len(seeds) > room:
                    if batch:
                        yield batch
                    batch, room = [], most
                batch.append(_Part(number, request.prompt_ids, seeds))
                room -= len(seeds)
        if batch:
            yield batch

    def _run(self, batch: list[_Part], settings: SamplingConfig) -> Iterator[tuple[int, int, Completion]]:
        """(request, place among its seeds, completion) of every row."""
        tokens_RT, logprobs_RT = self._generate(batch, settings)
        if bool(torch.isnan(logprobs_RT).any()):
            row = int(torch.isnan(logprobs_RT).any(1).nonzero()[0])
            owner = [part.request for part in batch for _ in part.seeds][row]
            raise StageError(
                f"the model's logits for prompt {owner} are not numbers (NaN): its weights are damaged, or "
                "training diverged; look at the loss and gradient norm of the steps before"
            )
        ends_RT = torch.isin(tokens_RT, self._end_ids)
        finished_R = ends_RT.any(1).tolist()
        lengths_R = torch.where(ends_RT.any(1), ends_RT.long().argmax(1) + 1, tokens_RT.shape[1]).tolist()
        rows = zip(tokens_RT.tolist(), logprobs_RT.tolist(), lengths_R, finished_R, strict=True)
        for part in batch:
            for place, _ in part.seeds:
                tokens, logprobs, length, finished = next(rows)
                yield part.request, place, Completion(tokens[:length], logprobs[:length], finished)

    def _generate(self, batch: list[_Part], settings: SamplingConfig) -> tuple[Tensor, Tensor]:
        """(tokens [R, T], log-probabilities [R, T]); what follows a row's end token means nothing."""
        state = self._prefill(batch, settings)
        seeds = [seed for part in batch for _, seed in part.seeds]
        uniforms_RT = uniforms(seeds, settings.max_completion_length).to(self._model.device)
        tokens_RT = torch.zeros(uniforms_RT.shape, dtype=torch.long, device=self._model.device)
        logprobs_RT = torch.zeros_like(uniforms_RT)
        for t in range(settings.max_completion_length):
            draws_B = uniforms_RT[:, t].index_select(0, state.rows_B)
            tokens_B, logprobs_B = draw(state.logits_BV, draws_B, settings)
            tokens_RT[:, t].index_copy_(0, state.rows_B, tokens_B)
            logprobs_RT[:, t].index_copy_(0, state.rows_B, logprobs_B.to(logprobs_RT.dtype))
            state.finished_B |= torch.isin(tokens_B, self._end_ids)
            if (finished := int(state.finished_B.sum())) == len(tokens_B):
                return tokens_RT[:, : t + 1], logprobs_RT[:, : t + 1]
            if t + 1 < settings.max_completion_length:
                if finished * FINISHED_SHARE >= len(tokens_B):
                    tokens_B = state.drop_finished(tokens_B)
                self._step(state, tokens_B)
        return tokens_RT, logprobs_RT

    def _prefill(self, batch: list[_Part], settings: SamplingConfig) -> _State:
        """Compute every prompt once, padded on the left; repeat its keys and values for its completions."""
        device = self._model.device
        width = max(len(part.prompt_ids) for part in batch)
        pads = [width - len(part.prompt_ids) for part in batch]
        capacity = width + settings.max_completion_length
        ids_PT = torch.tensor(
            [[self._pad_id] * pad + list(part.prompt_ids) for pad, part in zip(pads, batch, strict=True)],
            device=device,
        )
        pads_P = torch.tensor(pads, device=device)
        # without padding no mask is given, and attention takes its faster way
        visible_PT = (torch.arange(capacity, device=device) >= pads_P[:, None]).long() if any(pads) else None
        cache = reserved_cache(self._model.config, capacity)
        logits_PV = self._model(
            input_ids=ids_PT,
            attention_mask=None if visible_PT is None else visible_PT[:, :width],
            position_ids=(torch.arange(width, device=device) - pads_P[:, None]).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        prompt_R = torch.repeat_interleave(torch.tensor([len(part.seeds) for part in batch], device=device))
        keep_rows(cache, prompt_R)
        return _State(
            cache=cache,
            logits_BV=logits_PV.index_select(0, prompt_R),
            visible_BT=None if visible_PT is None else visible_PT.index_select(0, prompt_R),
            lengths_B=(width - pads_P).index_select(0, prompt_R),
            rows_B=torch.arange(len(prompt_R), device=device),
            finished_B=torch.zeros(len(prompt_R), dtype=torch.bool, device=device),
        )

    def _step(self, state: _State, tokens_B: Tensor) -> None:
        """Feed the chosen tokens; leaves the logits that follow them."""
        seen = state.cache.get_seq_length() + 1
        state.logits_BV = self._model(
            input_ids=tokens_B[:, None],
            attention_mask=None if state.visible_BT is None else state.visible_BT[:, :seen],
            position_ids=state.lengths_B[:, None],
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        state.lengths_B += 1


@dataclass
class _State:
    """The rows still in the batch."""

    cache: DynamicCache
    logits_BV: Tensor
    """What the next token is drawn from."""
    visible_BT: Tensor | None
    """0 at a prompt's padding (on its left), else 1, up to the last token to come; None: nothing is padded."""
    lengths_B: Tensor
    """Tokens so far, without padding: the position of the next one."""
    rows_B: Tensor
    """Which of the R rows each one is."""
    finished_B: Tensor

    def drop_finished(self, tokens_B: Tensor) -> Tensor:
        """Let finished rows leave; gives the tokens of those that stay."""
        kept_B = (~self.finished_B).nonzero()[:, 0]
        keep_rows(self.cache, kept_B)
        if self.visible_BT is not None:
            self.visible_BT = self.visible_BT.index_select(0, kept_B)
        self.lengths_B = self.lengths_B.index_select(0, kept_B)
        self.rows_B = self.rows_B.index_select(0, kept_B)
        self.finished_B = self.finished_B.index_select(0, kept_B)
        return tokens_B.index_select(0, kept_B)


def _name(number: int, row_id: str | None) -> str:
    return f"prompt {number}" if row_id is None else f"prompt {number} (row {row_id})"
