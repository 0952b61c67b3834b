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
_WORDS = re.compile(
    r'"(?:\\.|[^"\\])*"|(?://|#)[^\n]*|/(?:\\.|[^/\\])+/|<[^<>\s]+>|%lark\s*\{|[{}]|\bstart\b', re.DOTALL
)
"""Of a grammar: texts, comments, expressions and tokens, in which `start` means itself; where grammars within it, which
have a `start` of their own, begin and end; and the name of its first rule."""
_NO_LINE = re.compile(r"\\.|/|\n", re.DOTALL)
_VERBOSE = re.compile(r"\\.|(?P<flag>\(\?[a-zA-Z]*x[a-zA-Z]*(?:-[a-zA-Z]*)?[:)])", re.DOTALL)
_UNFORCED = '%llguidance {"no_forcing": true}'
"""Else llguidance allows of a text that must come only the tokens that the tokenizer writes it with: not `a` of `ab`,
and of a text that is an added token `<...>` only that one, which it then does not take. The last such line counts, and
lines before it keep their numbers in what llguidance says."""


class Structured(Config):
    """What every completion is, from its first token to its end: one of these. All but a grammar's `<think>` is text,
    which no added token `<...>` ever writes, even where that is the token's own text: other tokens spell it out."""

    regex: str | None = None
    """A regular expression that all of it matches, in the syntax of Rust's `regex`: without look-around and
    back-references. Flag x goes on one line."""
    json_schema: dict[str, Any] | str | None = None
    """A JSON schema, as a mapping or as JSON text: it is JSON that the schema allows, with properties in its order."""
    choices: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    """It is one of these texts."""
    grammar: str | None = None
    """A grammar in Lark's syntax as llguidance reads it; it is what rule `start` derives. `<think>`, without quotes, is
    the added token of that name."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(_KINDS)}; found {' and '.join(given) or 'none'}")
        return self

    @field_validator("regex")
    @classmethod
    def _is_on_one_line(cls, value: str | None) -> str | None:
        """With the flag a line end is none of the form, without it it is; llguidance is given one line."""
        if value is not None and "\n" in value and any(found["flag"] for found in _VERBOSE.finditer(value)):
            raise ValueError("flag x together with a line end; write the expression on one line, without comments")
        return value

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
        return f"{self._lark}\n{_UNFORCED}\n"

    @property
    def _lark(self) -> str:
        (name,) = (name for name in _KINDS if getattr(self, name) is not None)
        return str(_GRAMMARS[name](getattr(self, name)))

    @property
    def texts(self) -> str:
        """What it has tokens write as text: texts and expressions, a line each, without backslashes before marks."""
        words = (found[0] for found in _WORDS.finditer(self._lark))
        return re.sub(r"\\(\W)", r"\1", "\n".join(word for word in words if word[0] in '"/' and word[:2] != "//"))

    @property
    def tokens(self) -> list[str]:
        """What its grammar has whole tokens for, as it is written there: `<think>`, `<[3]>`, `<[^1-2,7]>`."""
        return [found[0] for found in _WORDS.finditer(self._lark) if found[0][0] == "<"]

    def lark_with_ends(self, end_token_ids: Sequence[int]) -> str:
        """The same for vLLM, which would allow no end but the tokenizer's own: each of these may follow."""
        return _with_ends(self.lark, end_token_ids)


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


def _with_ends(lark: str, end_token_ids: Sequence[int]) -> str:
    name = "whole_form"
    while name in lark:
        name += "_"
    ends = " | ".join(f"<[{token}]>" for token in end_token_ids)
    return f"start: {name} ({ends})?\n{_renamed(lark, name)}"


def _renamed(lark: str, name: str) -> str:
    """The grammar with another name for `start`; those within it keep theirs."""
    depth = 0

    def word(found: re.Match[str]) -> str:
        nonlocal depth
        if found[0].startswith("%lark") or (depth and found[0] == "{"):
            depth += 1
        elif depth and found[0] == "}":
            depth -= 1
        return name if found[0] == "start" and not depth else found[0]

    return _WORDS.sub(word, lark)


_GRAMMARS: dict[str, Any] = {
    "regex": _of_regex,
    "json_schema": lambda text: f"start: %json {text}",
    "choices": lambda texts: "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts),
    "grammar": lambda text: text,
}


def _refusal(lark: str) -> str:
    """Why llguidance does not take a grammar, or the one that vLLM is given; empty where it does, or is not here."""
    if importlib.util.find_spec("llguidance") is None:
        return ""
    if problem := _said_of(lark):
        return problem
    problem = _said_of(_with_ends(f"{lark}\n{_UNFORCED}\n", [0]))
    return problem and f"with a rule around `start`, as vLLM is given it: {problem}"


def _said_of(lark: str) -> str:
    from llguidance import LLMatcher

    said = str(LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(lark), None))
    found = re.search(r"^error: (.*)$", said, re.MULTILINE)
    return found[1] if found else said.split("\n", 1)[0].rpartition("compile JSON schema: ")[2].strip()
