"""What the completions of a group teach each other: the prompts under which the model reads them once more as its own
teacher (SDPO, arXiv:2601.20802)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from artifacts.errors import DataError, StageError
from stages.context import Context
from stages.data.chat import Encoder
from stages.data.columns import fill
from stages.data.encode import encode_prompts
from stages.data.privileged import with_request
from stages.data.tokenize import TokenizedPrompt
from stages.data.types import Dataset
from stages.external import load_named
from stages.rollouts.reward_arguments import Call
from stages.rollouts.reward_call import RewardFunction, call_all
from stages.training.generation import Generation, by_the_first
from stages.training.lesson import Lesson
from stages.training.rollout_records import Sampled
from stages.training.rollout_windows import asked
from stages.training.self_teaching_settings import SelfTeachingConfig

Feedback = Callable[[Sequence[Sampled]], list[list[str | None]]]
"""Scored completions, by prompt -> what is said of each; None or blank: nothing."""

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)|\A(?:(?!<think>).)*?</think>", re.DOTALL)


def without_thinking(text: str) -> str:
    """What a completion says outside <think> tags, without white space around it. Thoughts that the prompt began end
    with a tag alone, and those of a completion that was cut off have no end; TRL leaves both in."""
    return _THOUGHT.sub("", text).strip()


@dataclass(frozen=True)
class Lessons:
    """Gives every completion its lesson."""

    config: SelfTeachingConfig
    encode: Callable[[list[TokenizedPrompt]], list[list[int]]]
    """Token ids of prompts of whose rows only the prompt counts."""
    longest: int
    """Most tokens of a teacher's prompt; there is room for a completion after them."""
    feedback: Feedback | None = None
    mask_truncated: bool = False
    """Completions that did not end are not trained."""

    def __call__(self, sampled: Sequence[Sampled]) -> list[Sampled]:
        """The groups, with a lesson for every completion."""
        nothing: list[list[str | None]] = [[None] * len(one.texts) for one in sampled]
        said = nothing if self.feedback is None else self.feedback(sampled)
        return [replace(one, lessons=self._of_group(one, texts)) for one, texts in zip(sampled, said, strict=True)]

    def _of_group(self, sampled: Sampled, said: Sequence[str | None]) -> list[Lesson]:
        config = self.config
        least = config.success_reward_threshold
        wins = [total is not None and total >= least for total in sampled.totals]
        texts = [self._solution(text) for text in sampled.texts]
        shown = [index for index, won in enumerate(wins) if won and texts[index].strip()]
        known = [text if text is not None and text.strip() else None for text in said]
        drafts = []
        for index, won in enumerate(wins):
            others = [one for one in shown if one != index or not config.dont_reprompt_on_self_success]
            solution = others[0] if config.use_successful_as_teacher and others else None
            if not asked(sampled.completions[index], self.mask_truncated):
                drafts.append(Lesson(won, None, known[index]))
                continue
            hidden = config.environment_feedback_only_without_solution and solution is not None
            drafts.append(Lesson(won, solution, known[index], None if hidden else known[index]))
        return self._prompted(sampled, texts, drafts)

    def _solution(self, text: str) -> str:
        return without_thinking(text) if self.config.remove_thinking_from_demonstration else text

    def _prompted(self, sampled: Sampled, texts: Sequence[str], lessons: Sequence[Lesson]) -> list[Lesson]:
        """The lessons with the teacher's prompts; completions that are shown the same share one."""
        keys = [(lesson.solution, lesson.feedback) for lesson in lessons]
        different = [key for key in dict.fromkeys(keys) if key != (None, None)]
        prompts = [
            self._prompt(sampled.prompt, None if solution is None else texts[solution], feedback)
            for solution, feedback in different
        ]
        found = dict(zip(different, self.encode(prompts), strict=True))
        fitting = {key: ids for key, ids in found.items() if len(ids) <= self.longest}
        return [replace(one, teacher_ids=fitting.get(key, [])) for one, key in zip(lessons, keys, strict=True)]

    def _prompt(self, prompt: TokenizedPrompt, solution: str | None, feedback: str | None) -> TokenizedPrompt:
        config, where = self.config, f"row {prompt.row_id}"
        parts = {
            "solution": ""
            if solution is None
            else fill(config.solution_template, {"successful_previous_attempt": solution}, where),
            "feedback": "" if feedback is None else fill(config.feedback_template, {"feedback_raw": feedback}, where),
        }
        shown = with_request(
            prompt.row, lambda asked: fill(config.reprompt_template, {"prompt": asked, **parts}, where)
        )
        return replace(prompt, row={**prompt.row, "prompt": shown})


@dataclass(frozen=True)
class TaughtGeneration:
    """Another `Generate`, with lessons."""

    generate: Generation
    lessons: Lessons

    def __call__(
        self, prompts: Sequence[TokenizedPrompt], seeds: Sequence[tuple[int, ...]], *, some_scored: bool = True
    ) -> list[Sampled]:
        """What was generated and scored, and what it teaches."""
        return self.lessons(self.generate(prompts, seeds, some_scored=some_scored))


def taught(
    context: Context,
    generation: Generation,
    dataset: Dataset,
    prompts: Sequence[TokenizedPrompt],
    context_length: int,
    mask_truncated: bool,
) -> TaughtGeneration:
    """By the settings of the stage. Raises DataError or StageError where a prompt or the dataset has no place for what
    the teacher is to see."""
    config = context.config
    for prompt in prompts:
        with_request(prompt.row, str)
    encoder = Encoder(generation.sampling.policy.tokenizer)

    def encode(shown: list[TokenizedPrompt]) -> list[list[int]]:
        return encode_prompts(encoder, dataset, [prompt.row for prompt in shown]) if shown else []

    longest = min(config.max_reprompt_len, context_length - config.max_completion_length)
    if longest < config.max_reprompt_len:
        context.log(f"prompts of the teacher may have {longest} tokens, all that the model's context has room for")
    feedback = _feedback_of(config, generation, dataset)
    return TaughtGeneration(generation, Lessons(config, encode, longest, feedback, mask_truncated))


def _feedback_of(config: SelfTeachingConfig, generation: Generation, dataset: Dataset) -> Feedback | None:
    column, named = config.feedback_column, config.feedback_function
    if named is not None:
        function = load_named("feedback_function", named)
        called = RewardFunction(named.rsplit(":", 1)[-1], function, kind="feedback_function", value="text")
        return partial(_by_function, called, generation)
    if column is not None and column not in dataset.columns:
        raise DataError(f"feedback_column is {column}; the dataset's columns are {', '.join(dataset.columns)}")
    return None if column is None else partial(_by_column, column)


def _by_column(column: str, sampled: Sequence[Sampled]) -> list[list[str | None]]:
    def said(one: Sampled) -> str | None:
        value = one.prompt.row.get(column)
        if value is not None and not isinstance(value, str):
            raise DataError(f"row {one.prompt.row_id}: column {column} has {value!r:.80}; feedback is a text, or null")
        return value

    return [[said(one)] * len(one.texts) for one in sampled]


def _is_whole(text: str) -> bool:
    """Whether it is made of characters; a lone surrogate is none, and no tokenizer takes it."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _by_function(
    function: RewardFunction, generation: Generation, sampled: Sequence[Sampled]
) -> list[list[str | None]]:
    """Called by the first process for all."""
    prompts, texts = [one.prompt for one in sampled], [one.texts for one in sampled]
    call = Call.of(prompts, [one.completions for one in sampled], texts)

    def ask() -> list[str | None]:
        (values,) = call_all([(function, call)])
        if isinstance(values, Exception):
            raise values
        for value, place in zip(values, call.places, strict=True):
            if value is not None and not (isinstance(value, str) and _is_whole(value)):
                raise StageError(f"{function.title} returned {value!r:.80} for {place}; give a text, or None")
        return values

    accelerator = generation.sampling.policy.accelerator
    rest = iter(ask() if accelerator is None else by_the_first(accelerator, ask))
    return [[next(rest) for _ in group] for group in texts]
