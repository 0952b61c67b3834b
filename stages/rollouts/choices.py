"""Multiple choice: the letter that a completion settles on, against the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator

from stages.rollouts.reward_base import text_of
from stages.rollouts.verdicts import Verdict

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_DRESS = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\b|[*_$`]")
_SPACE = re.compile(r"\s+")
_CUE = r"(?i:\b(?:answer|choice|option)(?:\s+(?:is|should\s+be)\s*[:=]?|\s*[:=])\s*)"


class MultipleChoice(Verdict):
    """1 where the completion settles on the right letter: boxed, alone on its last line, or after "answer is"."""

    letters: str = Field("ABCDEFGHIJ", min_length=2)
    """The choices in order. A right answer may be a letter, "(B) text", or a number: the place, from 0."""

    @field_validator("letters")
    @classmethod
    def _distinct(cls, letters: str) -> str:
        if not (letters.isascii() and letters.isalnum() and letters.upper() == letters):
            raise ValueError(f"letters are capital ASCII letters or digits, found {letters!r}")
        if len(set(letters)) < len(letters):
            raise ValueError(f"letters has one twice: {letters!r}")
        return letters

    def score(self, completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
        """None where the right answer is no choice; 0 where the completion names none, or two at once."""
        verdicts: list[float | None] = []
        for made, reference in zip(completions, self.references(columns), strict=True):
            expected = None if reference is None else right_choice(reference, self.letters)
            verdicts.append(None if expected is None else float(final_choice(text_of(made), self.letters) == expected))
        return verdicts


def right_choice(reference: str, letters: str) -> str | None:
    """The letter that a reference means; None: it means none of them."""
    match = re.fullmatch(rf"\(?([{letters}])\)?(?:[.:)].*)?", reference[:1].upper() + reference[1:], re.DOTALL)
    if match is None and reference.startswith("("):
        match = re.match(rf"\(([{letters}])\)", reference.upper())
    if match is not None:
        return match[1]
    if reference.isascii() and reference.isdigit() and len(reference) < 4 and int(reference) < len(letters):
        return letters[int(reference)]
    return None


def final_choice(text: str, letters: str) -> str | None:
    """The letter in the last \\boxed{}; else alone on the last line; else the last after "answer is" or the like; else
    at the start of a text of one line. None: there is none, or another stands beside it ("A or B")."""
    boxes = _BOXED.findall(text)
    if boxes:
        return _only(_DRESS.sub("", boxes[-1]).strip("{} \n"), letters)
    plain = _SPACE.sub(_one_space, _DRESS.sub("", text).replace("{", "").replace("}", ""))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    if lines and (alone := _only(lines[-1], letters, labelled=False)) is not None:
        return alone
    letter = _letter(letters)
    cued = list(re.finditer(rf"{_CUE}{letter}(?P<more>\s*(?:,|/|&|\band\b|\bor\b)\s*(?:{letter}))?", plain))
    if cued:
        first, *others = [found.upper() for found in cued[-1].groups() if found and len(found) == 1]
        return None if any(other != first for other in others) else first
    return _only(lines[0], letters) if len(lines) == 1 else None


def _one_space(match: re.Match[str]) -> str:
    """Of white space its kind alone, or long runs of it would take the patterns quadratic time."""
    return "\n" if "\n" in match[0] else " "


def _letter(letters: str) -> str:
    """A choice in brackets, or a capital; A and I are words where a small letter follows, but before a reason."""
    both = letters + letters.lower()
    word = r"(?!\s+(?!because\b|since\b|as\b|and\b|or\b)[a-z])"
    return rf"(?:\(([{both}])\)|([{letters}])\b(?![’'])(?:(?<![AI])|{word}))"


def _only(fragment: str, letters: str, *, labelled: bool = True) -> str | None:
    """B, (b), B. or, labelled, "B) Paris"."""
    both = letters + letters.lower()
    rest = r"(?:[.:)]\s.*)?" if labelled else ""
    match = re.fullmatch(rf"\W*([{both}])\)?[.:]?\W*|\(?([{both}])\)?(?:\)\s.*|{rest})", fragment)
    return None if match is None else (match[1] or match[2]).upper()
