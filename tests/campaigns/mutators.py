"""Ways to spoil a text: what hands, disks, other tools and malice do to it."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

Draws = np.random.Generator
Mutator = Callable[[bytes, Draws], bytes]

_NUMBER = re.compile(rb"-?\d+(\.\d+)?")
_WORD = re.compile(rb"[A-Za-z_]\w*")
NUMBERS = (b"-1", b"0", b"1e999", b"-0.0", b"18446744073709551616", b"1" * 5000, b"NaN", b"0.1", b"1_0")
VALUES = (
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"~",
    b'"\\ud800"',
    b'"../../x"',
    b"!!python/name:os.system",
    b"*a",
    b"\0",
)


def _cut(text: bytes, draws: Draws) -> tuple[int, int]:
    """Begin and end of a short piece."""
    begin = int(draws.integers(len(text) + 1))
    return begin, min(len(text), begin + int(draws.integers(1, 40)))


def flip_a_bit(text: bytes, draws: Draws) -> bytes:
    if not text:
        return text
    place = int(draws.integers(len(text)))
    return text[:place] + bytes([text[place] ^ 1 << int(draws.integers(8))]) + text[place + 1 :]


def drop(text: bytes, draws: Draws) -> bytes:
    begin, end = _cut(text, draws)
    return text[:begin] + text[end:]


def double(text: bytes, draws: Draws) -> bytes:
    begin, end = _cut(text, draws)
    return text[:end] + text[begin:end] + text[end:]


def move(text: bytes, draws: Draws) -> bytes:
    begin, end = _cut(text, draws)
    rest = text[:begin] + text[end:]
    place = int(draws.integers(len(rest) + 1))
    return rest[:place] + text[begin:end] + rest[place:]


def cut_off(text: bytes, draws: Draws) -> bytes:
    return text[: int(draws.integers(len(text) + 1))]


def random_bytes(text: bytes, draws: Draws) -> bytes:
    begin, end = _cut(text, draws)
    return text[:begin] + draws.bytes(int(draws.integers(1, 9))) + text[end:]


def another_number(text: bytes, draws: Draws) -> bytes:
    return _replace(_NUMBER, NUMBERS, text, draws)


def another_value(text: bytes, draws: Draws) -> bytes:
    return _replace(_WORD if draws.integers(2) else _NUMBER, VALUES, text, draws)


def another_word(text: bytes, draws: Draws) -> bytes:
    words = _WORD.findall(text)
    return _replace(_WORD, words, text, draws) if words else text


def nest(text: bytes, draws: Draws) -> bytes:
    place, depth = int(draws.integers(len(text) + 1)), int(draws.choice([3, 30, 3000, 30_000]))
    opening = (b"[", b"{", b'{"a":', b"- ", b"(")[int(draws.integers(5))]
    return text[:place] + opening * depth + text[place:]


def line_without_end(text: bytes, draws: Draws) -> bytes:
    place = int(draws.integers(len(text) + 1))
    return text[:place] + b"x" * int(draws.choice([300, 300_000])) + text[place:]


def _replace(pattern: re.Pattern[bytes], values: tuple[bytes, ...] | list[bytes], text: bytes, draws: Draws) -> bytes:
    found = list(pattern.finditer(text))
    if not found:
        return text
    match = found[int(draws.integers(len(found)))]
    return text[: match.start()] + values[int(draws.integers(len(values)))] + text[match.end() :]


MUTATORS: tuple[Mutator, ...] = (
    flip_a_bit, drop, double, move, cut_off, random_bytes, another_number, another_value, another_word, nest,
    line_without_end,
)  # fmt: skip


def spoil(text: bytes, draws: Draws) -> bytes:
    """The text after one to four mutations."""
    for _ in range(int(draws.choice([1, 1, 1, 2, 3, 4]))):
        text = MUTATORS[int(draws.integers(len(MUTATORS)))](text, draws)
    return text
