"""The form that completions are held to while they are sampled. Imports nothing heavy: recipes are checked with it."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from stages.rollouts.formats import schema_validator
from stages.stage import Config

LLGUIDANCE = {"llguidance": "'posttrain[structured]'"}
_KINDS = ("regex", "json_schema", "choices", "grammar")
_START = re.compile(r'"(?:\\.|[^"\\])*"|(?://|#)[^\n]*|/(?:\\.|[^/\\\n])+/|\bstart\b')
"""Of a grammar: texts, comments and expressions, in which the word means itself, and the name of its first rule."""
_NO_LINE = re.compile(r"\\.|/|\n", re.DOTALL)


class Structured(Config):
    """What every completion is, from its first token to its end: one of these."""

    regex: str | None = None
    """A regular expression that all of it matches, in the syntax of Rust's `regex`: without look-around and
    back-references."""
    json_schema: dict[str, Any] | str | None = None
    """A JSON schema, as a mapping or as JSON text: it is JSON that the schema allows, with properties in its order."""
    choices: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    """It is one of these texts."""
    grammar: str | None = None
    """A grammar in Lark's syntax as llguidance reads it; it is what rule `start` derives."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(_KINDS)}; found {' and '.join(given) or 'none'}")
        return self

    @field_validator("regex", "grammar", "choices")
    @classmethod
    def _is_read(cls, value: Any, info: Any) -> Any:
        """By what will read it, where that is here; without it the recipe is refused for that."""
        if value is not None and (reason := _refusal(_GRAMMARS[info.field_name](value))):
            raise ValueError(f"llguidance does not take it: {reason}")
        return value

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, value: Any) -> str | None:
        """As text, for the order of properties is part of it."""
        if value is None:
            return None
        try:
            schema = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from error
        text = json.dumps(schema, ensure_ascii=False)
        schema_validator(text)
        if reason := _refusal(_GRAMMARS["json_schema"](text)):
            raise ValueError(f"llguidance does not take it: {reason}")
        return text

    @property
    def lark(self) -> str:
        """The grammar that it comes to, in Lark's syntax, without the tokens that end a completion."""
        (name,) = (name for name in _KINDS if getattr(self, name) is not None)
        return str(_GRAMMARS[name](getattr(self, name)))

    def lark_with_ends(self, end_token_ids: Sequence[int]) -> str:
        """The same for vLLM, which would allow no end but the tokenizer's own: each of these may follow."""
        form = _START.sub(lambda found: "whole_form" if found[0] == "start" else found[0], self.lark)
        ends = " | ".join(f"<[{token}]>" for token in end_token_ids)
        return f"start: whole_form ({ends})?\n{form}\n"


class StructuredConfig(Config):
    """Of stages that sample."""

    structured: Structured | None = None
    """Hold every completion to a form: `{regex: ...}`, `{json_schema: ...}`, `{choices: [...]}` or `{grammar: ...}`.
    Tokens that leave it are impossible before temperature and filters, ends are possible where it is complete."""

    def packages(self) -> dict[str, dict[str, str]]:
        """Of the embedded sampler; vLLM brings its own."""
        rollouts = getattr(self, "rollouts", None)
        needed = self.structured is not None and not (rollouts is not None and rollouts.is_apart)
        return super().packages() | ({"structured": LLGUIDANCE} if needed else {})


def apart_problems(config: Any, engine: str) -> list[str]:
    """What does not go with a form where the sampler is vLLM: it says how likely a token was among those that the form
    allowed, and nobody knows how likely that was among all."""
    if config.structured is None:
        return []
    given = {
        f"loss_type {getattr(config, 'loss_type', '')}": getattr(config, "sampled_loss", None) is not None,
        "importance_sampling_mode": getattr(config, "importance_sampling_mode", None) is not None,
        "off_policy_mask_threshold": getattr(config, "off_policy_mask_threshold", None) is not None,
        "replay_buffer_size": getattr(config, "replay_buffer_size", 0) > 0,
        "rollouts.max_staleness": getattr(config.rollouts, "max_staleness", 0) > 0,
    }
    return [
        f"{name} together with structured: rollouts.engine {engine} says how likely a token was among the allowed "
        "ones, which does not compare with the trainer's among all; leave one out, or take the embedded engine"
        for name, is_given in given.items()
        if is_given
    ]


def _of_regex(regex: str) -> str:
    """Between slashes, on one line."""
    return f"start: /{_NO_LINE.sub(_on_one_line, regex) or '(?:)'}/"


def _on_one_line(found: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(found[0], found[0])


_GRAMMARS: dict[str, Any] = {
    "regex": _of_regex,
    "json_schema": lambda text: f"start: %json {text}",
    "choices": lambda texts: "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts),
    "grammar": lambda text: text,
}


def _refusal(lark: str) -> str:
    """Why llguidance does not take a grammar; empty where it does, or is not here."""
    if importlib.util.find_spec("llguidance") is None:
        return ""
    from llguidance import LLMatcher

    said = str(LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(lark), None))
    found = re.search(r"^error: (.*)$", said, re.MULTILINE)
    return found[1] if found else said.split("\n", 1)[0].rpartition("compile JSON schema: ")[2].strip()
