"""The number that a text ends with, as an exact fraction: no floating point decides a verdict."""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 400
"""Longer strings of digits are no answer, and Python refuses to read very long ones."""

_MARKER = re.compile(r"####|\bA:")
_FRAC = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", re.ASCII)
_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)\]]) [-+\u2212] (?=[$€£]?\.?\d) )?   # not the minus of a difference, 10-3
    [$€£]?
    (?<![\w])                                              # not the 2 of x2
    (?P<number>
        (?: \d{1,3} (?:,\d{3})+ (?!\d) | \d+ ) (?:\.\d+)?  # 1,234.5
        | \.\d+
    )
    (?P<exponent> [eE][-+]?\d{1,2} (?!\d) )?
    (?: (?: \s (?P<part>\d+) )? \s? / \s? (?P<whole>\d+) (?!\d|\.\d) )?   # 3/4, 1 3/4
    """,
    re.VERBOSE | re.ASCII,
)


def final_number(text: str) -> Fraction | None:
    """The first number after the last `####` or `A:`; in a text without either, the last number. None: there is none.

    Reads 1,234, -$5, .5, 2e3, 3/4, 1 3/4 and LaTeX's fractions and {,}; units and % after a number do not count.
    """
    markers = list(_MARKER.finditer(text))
    numbers = list(_NUMBER.finditer(_plain(text[markers[-1].end() :] if markers else text)))
    if not numbers:
        return None
    return _value(numbers[0] if markers else numbers[-1])


def _plain(text: str) -> str:
    return _FRAC.sub(r" \1/\2", text.replace("{,}", ",").replace("\\,", "").replace("\\$", "$"))


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match.group()) > LONGEST:
        return None
    value = Fraction(match["number"].replace(",", "") + (match["exponent"] or ""))
    if match["whole"]:
        over = int(match["whole"])
        if over == 0:
            return None
        value = value / over if match["part"] is None else value + Fraction(int(match["part"]), over)
    return -value if match["sign"] in ("-", "\u2212") else value
