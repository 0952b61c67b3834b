"""The embedded sampler: completions of prompts by the model in memory, many at a time.

A prompt is computed once for all its completions. Rows that are done leave, and waiting ones enter. B rows in the
making, S slots for them, T tokens of a completion, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from artifacts.errors import StageError
from stages.rollouts.drafts import Drafts, Ending
from stages.rollouts.form_masks import FormMasks
from stages.rollouts.model_attention import sampling_attention
from stages.rollouts.padded_rows import PaddedRows
from stages.rollouts.requests import Completion, Progress, SampleRequest, SamplingConfig
from stages.rollouts.room import BATCH_TOKENS, PACKED_BYTES, PACKED_STEPS, room_for
from stages.rollouts.rows import Row, Rows
from stages.rollouts.sampling_probe import why_not_shared
from stages.rollouts.shared_rows import USUAL_ROWS, SharedRows
from stages.rollouts.stopping import Decode
from stages.training.linear import packed_weights
from stages.training.trunk import context_of


class EmbeddedSampler:
    """Samples with the given model as it is at that moment: nothing to synchronize after an optimizer step.

    `max_batch_tokens` bounds the tokens whose keys and values are held at once: rows x longest completion and prompts
    x longest prompt. A single completion beyond it still runs, alone. `decode` turns token ids into text, for stop
    strings; `tokenizer` is for `structured`.

    A completion follows from its prompt, its seed, the settings and the weights, whatever else is asked for in the
    same call and in whatever order. On a CPU in float32 that holds bit for bit, log-probabilities included, on one
    machine with one number of threads, for models of plain linear layers, without experts or soft-capped attention;
    elsewhere but for rounding.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Collection[int],
        pad_token_id: int,
        max_batch_tokens: int = BATCH_TOKENS,
        decode: Decode | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._model = model
        self._end_ids = frozenset(eos_token_ids)
        self._pad_id = pad_token_id
        self._max_batch_tokens = max_batch_tokens
        self._decode, self._tokenizer = decode, tokenizer
        self.unshared: str | None = None
        """Why every completion gets a copy of its prompt's keys; known after the first call."""

    @torch.no_grad()
    def sample(
        self, requests: Sequence[SampleRequest], settings: SamplingConfig, on_progress: Progress | None = None
    ) -> list[list[Completion]]:
        """For every request its completions, in the order of its seeds.

        Raises StageError for a prompt that is empty or too long for the model, for limits that do not fit the seeds,
        and where the model's logits are not numbers.
        """
        self._check(requests, settings)
        results: list[list[Completion]] = [[Completion([], [], False)] * len(request.seeds) for request in requests]
        waiting = _rows(requests, settings.max_completion_length)
        was_training = self._model.training
        self._model.eval()
        try:
            if waiting:
                with self._engine(waiting) as engine:
                    self._run(waiting, engine, settings, results, on_progress)
        finally:
            self._model.train(was_training)
        return results

    @contextmanager
    def _engine(self, waiting: Collection[Row]) -> Iterator[Rows]:
        """What rows are run on, with the attention that it needs."""
        self.unshared = why_not_shared(self._model)
        if self.unshared is not None:
            yield self._rows(waiting)
            return
        is_long = max(row.limit for row in waiting) >= PACKED_STEPS
        most_bytes = PACKED_BYTES if is_long else 0
        with sampling_attention(self._model), packed_weights(self._model, rows=USUAL_ROWS, most_bytes=most_bytes):
            yield self._rows(waiting)

    def _rows(self, waiting: Collection[Row]) -> Rows:
        prompt, completion = (max(len(row.prompt_ids) for row in waiting), max(row.limit for row in waiting))
        if self.unshared is not None:
            return PaddedRows(
                self._model,
                most_tokens=self._max_batch_tokens,
                completion_tokens=completion,
                pad_token_id=self._pad_id,
            )
        members: dict[int, int] = {}
        for row in waiting:
            members[row.request] = members.get(row.request, 0) + 1
        room = room_for(
            completions=len(waiting),
            per_prompt=min(members.values()),
            prompt=prompt,
            completion=completion,
            most_tokens=self._max_batch_tokens,
        )
        return SharedRows(self._model, room, self._pad_id)

    def _run(
        self,
        waiting: list[Row],
        engine: Rows,
        settings: SamplingConfig,
        results: list[list[Completion]],
        on_progress: Progress | None,
    ) -> None:
        """Until no row is left."""
        total, done = len(waiting), 0
        ending = Ending(
            torch.tensor(sorted(self._end_ids | {*settings.stop_token_ids}), device=self._model.device),
            settings.stop_strings,
            self._decode,
        )
        drafts = Drafts(settings, ending, max(row.limit for row in waiting), self._model, self._form(settings))
        while waiting or drafts.rows:
            if waiting and (room := engine.room_for(waiting)):
                engine.enter(waiting[:room])
                drafts.enter(waiting[:room])
                del waiting[:room]
            gone = drafts.extend(engine.step(drafts.fed_B()))
            if gone:
                for row, completion in drafts.finish(gone):
                    results[row.request][row.place] = completion
                engine.leave(drafts.leave(gone), waiting[0].request if waiting else None)
                done += len(gone)
                if on_progress is not None:
                    on_progress(done, total)

    def _form(self, settings: SamplingConfig) -> FormMasks | None:
        if settings.structured is None:
            return None
        vocabulary = int(self._model.get_input_embeddings().weight.shape[0])
        return FormMasks(settings.structured, self._tokenizer, self._end_ids, vocabulary)

    def _check(self, requests: Sequence[SampleRequest], settings: SamplingConfig) -> None:
        limit = context_of(self._model.config)
        if settings.stop_strings and self._decode is None:
            raise StageError("stop_strings need the tokenizer: give the sampler its `decode`")
        if settings.structured is not None and self._tokenizer is None:
            raise StageError("structured needs the tokenizer: give the sampler its `tokenizer`")
        for number, request in enumerate(requests):
            name, length = _name(number, request.row_id), len(request.prompt_ids)
            if length == 0:
                raise StageError(f"{name} has no tokens; there is nothing to continue")
            most = max(request.limits or (settings.max_completion_length,))
            if length + most > limit:
                longest = limit - settings.max_completion_length
                remedy = f", or drop prompts of more than {longest} tokens" if longest > 0 else ""
                raise StageError(
                    f"{name} has {length} tokens; with a completion of {most} (max_completion_length) that is "
                    f"more than the {limit} the model takes; lower max_completion_length{remedy}"
                )
            if request.limits is not None:
                _check_limits(name, request.limits, len(request.seeds), settings.max_completion_length)


def _rows(requests: Sequence[SampleRequest], most: int) -> list[Row]:
    """Longest prompts first, so that a budget too large for the memory shows at once, and like lengths are together.

    Completions of no tokens are left out.
    """
    order = sorted(range(len(requests)), key=lambda number: -len(requests[number].prompt_ids))
    return [
        Row(number, place, requests[number].prompt_ids, seed, limit)
        for number in order
        for place, (seed, limit) in enumerate(
            zip(requests[number].seeds, requests[number].limits or [most] * len(requests[number].seeds), strict=True)
        )
        if limit > 0
    ]


def _check_limits(name: str, limits: Sequence[int], seeds: int, most: int) -> None:
    if len(limits) != seeds:
        raise StageError(f"{name} has {len(limits)} limits for {seeds} seeds; give one a seed")
    if not all(0 <= limit <= most for limit in limits):
        raise StageError(f"{name} has limits {list(limits)}; they are from 0 to max_completion_length, {most}")


def _name(number: int, row_id: str | None) -> str:
    return f"prompt {number}" if row_id is None else f"prompt {number} (row {row_id})"
