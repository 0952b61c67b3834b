"""Rollouts of several turns over any sampler: it is given token ids and gives token ids with log-probabilities.

All completions of a generation take their turns together: the model writes, calls of tools and steps of environments
run at once, their answers are appended as tokens, and those that go on are sampled again. Tokens that the model wrote
are never tokenized again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from artifacts.errors import DataError, StageError
from stages.data.continuation import Continuation
from stages.data.tokenize import TokenizedPrompt
from stages.data.types import Message
from stages.rollouts.multi_turn.call_format import Said
from stages.rollouts.multi_turn.environment_answers import EnvironmentAnswers
from stages.rollouts.multi_turn.rollout import Rollout, by_context
from stages.rollouts.multi_turn.together import Together
from stages.rollouts.multi_turn.tool_answers import ToolAnswers
from stages.rollouts.requests import Completion, Sampler, SampleRequest, SamplingConfig
from stages.rollouts.stopping import text_before


class MultiTurn:
    """Completions whose turns without end are answered by tools and an environment (a `MultiTurnConfig`)."""

    def __init__(
        self,
        tokenizer: Any,
        config: Any,
        end_token_ids: Collection[int],
        *,
        anyone: Callable[[bool], bool] = lambda held: held,
    ) -> None:
        """`anyone`: whether something holds in any process: all sample equally often, as engines may need. Raises
        StageError or DataError where the tools, the environment or the chat template cannot be used."""
        self._anyone = anyone
        self._tokenizer, self._end_ids = tokenizer, frozenset(end_token_ids)
        self._continuation = Continuation(tokenizer)
        self.tools = ToolAnswers.of(tokenizer, config) if config.tools else None
        self.environment = None if config.environment is None else EnvironmentAnswers.of(tokenizer, config.environment)

    def __call__(
        self,
        engine: Sampler,
        prompts: Sequence[TokenizedPrompt],
        seeds: Sequence[tuple[int, ...]],
        settings: SamplingConfig,
    ) -> list[list[Completion]]:
        """For every prompt one completion a seed, with its `episode`.

        Raises StageError naming the row for prompts that are no conversations, answers that the chat template refuses,
        and, unless they are left out, environments that break.
        """
        _require_conversations(prompts)
        groups = [
            [Rollout(prompt, number, seed, settings.max_completion_length) for number, seed in enumerate(own)]
            for prompt, own in zip(prompts, seeds, strict=True)
        ]
        rollouts = [rollout for group in groups for rollout in group]
        with Together(self._at_once()) as together:
            try:
                if self.environment is not None:
                    self.environment.open(groups, together)
                while self._anyone(bool(going := [rollout for rollout in rollouts if rollout.ending is None])):
                    self._answer(self._speak(engine, going, settings), together)
            finally:
                if self.environment is not None:
                    self.environment.close(rollouts, together)
        return [[rollout.completion() for rollout in group] for group in groups]

    def _at_once(self) -> int:
        return 64 if self.environment is None else self.environment.spec.max_concurrent

    def _speak(
        self, engine: Sampler, going: Sequence[Rollout], settings: SamplingConfig
    ) -> list[tuple[Rollout, Said, bool]]:
        """A turn of the model for each. Of those that may be answered: (rollout, what was said, whether the turn has
        its end token)."""
        asked = by_context(going)
        requests = [
            SampleRequest(
                ids,
                tuple(rollout.seed for rollout in same),
                same[0].prompt.row_id,
                tuple(rollout.room for rollout in same),
            )
            for ids, same in asked.items()
        ]
        spoken = []
        for same, turns in zip(asked.values(), engine.sample(requests, settings), strict=True):
            for rollout, turn in zip(same, turns, strict=True):
                said = self._said(rollout.context_ids, turn, settings)
                rollout.speak(turn)
                rollout.messages.append(_message(said))
                if turn.finished:
                    spoken.append((rollout, said, turn.token_ids[-1] in self._end_ids))
                else:
                    rollout.ending = "length"
        return spoken

    def _said(self, before: Sequence[int], turn: Completion, settings: SamplingConfig) -> Said:
        """The calls in a turn and its words; of a turn that was cut off, all is words."""
        ended = bool(turn.token_ids) and turn.token_ids[-1] in self._end_ids
        token_ids = turn.token_ids[:-1] if ended else turn.token_ids
        if self.tools is not None and turn.finished:
            said = self.tools.read(text_before(self._decode(token_ids, False), settings.stop_strings), before)
            if said.calls:
                return said
        return Said(text_before(self._decode(token_ids, True), settings.stop_strings))

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def _answer(self, spoken: Sequence[tuple[Rollout, Said, bool]], together: Together) -> None:
        """Calls are made, other turns go to the environment; who gets no answer has ended."""
        answers: list[list[Message] | None] = [None] * len(spoken)
        calling = [index for index, (_, said, _) in enumerate(spoken) if said.calls]
        others = [index for index, (_, said, _) in enumerate(spoken) if not said.calls]
        if self.tools is not None:
            made = self.tools.answer([spoken[index][:2] for index in calling], together)
            for index, messages in zip(calling, made, strict=True):
                answers[index] = messages
        if self.environment is not None:
            stepped = self.environment.answer(
                [(spoken[index][0], spoken[index][1].content) for index in others], together
            )
            for index, messages in zip(others, stepped, strict=True):
                answers[index] = messages
        for (rollout, said, ended), messages in zip(spoken, answers, strict=True):
            if messages is None:
                rollout.ending = rollout.ending or "answered"
            elif self.environment is not None and rollout.turns >= self.environment.spec.max_turns:
                rollout.ending = "turn limit"
            else:
                self._hear(rollout, messages, said.calls[0].name if said.calls else None, ended)

    def _hear(self, rollout: Rollout, messages: Sequence[Message], called: str | None, ended: bool) -> None:
        try:
            token_ids = self._continuation.after_turn(messages, called, ended=ended)
        except DataError as error:
            raise StageError(f"{rollout}: {error}") from error
        if len(token_ids) >= rollout.room:  # the model could not say a word to it
            rollout.ending, rollout.finished = "length", False
            return
        rollout.hear(token_ids)
        rollout.messages += messages


def _message(said: Said) -> Message:
    """A turn as datasets write it. Calls that cannot be read stay in the content."""
    message: Message = {"role": "assistant", "content": said.content}
    calls = [
        {
            **({} if call.id is None else {"id": call.id}),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in said.calls
        if call.problem is None
    ]
    return {**message, "tool_calls": calls} if calls else message


def _require_conversations(prompts: Sequence[TokenizedPrompt]) -> None:
    for prompt in prompts:
        if isinstance(prompt.row["prompt"], str):
            raise StageError(
                f"row {prompt.row_id}: its prompt is plain text; tools and environments need conversations, whose "
                "turns the chat template tells apart: normalize to messages"
            )
