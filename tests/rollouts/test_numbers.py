"""Reading the final number of a text."""

from fractions import Fraction

import pytest

from stages.rollouts.numbers import final_number

CASES = [
    ("72", 72),
    ("She sold 48/2 = <<48/2=24>>24 clips.\n48+24 = 72 altogether.\n#### 72", 72),
    ("So 16 - 3 - 4 = 9 eggs.\nA: 18", 18),
    ("#### 1,234,567 dollars, 3 more than before", 1_234_567),
    ("#### 5\nno, wait\n#### 6", 6),
    ("#### none", None),
    ("there are 12, 15 and 18 of them", 18),
    ("no number here", None),
    ("", None),
    ("It costs $1,080.50.", Fraction("1080.5")),
    ("0.1", Fraction(1, 10)),
    ("about .5 of it", Fraction(1, 2)),
    ("ends the sentence with 5.", 5),
    ("-7", -7),
    ("\N{MINUS SIGN}7", -7),
    ("-$7.25", Fraction("-7.25")),
    ("$-7", -7),
    ("x=-3", -3),
    ("10-3", 3),
    ("10 - 3", 3),
    ("(2)-3", 3),
    ("3/4", Fraction(3, 4)),
    ("It is 3/4.", Fraction(3, 4)),
    ("1 3/4 cups", Fraction(7, 4)),
    (r"\frac{3}{4}", Fraction(3, 4)),
    (r"1\frac{3}{4}", Fraction(7, 4)),
    (r"$1{,}234$", 1234),
    (r"\boxed{42}", 42),
    ("3/0", None),
    ("50%", 50),
    ("12kg", 12),
    ("2e3", 2000),
    ("1.5E-2", Fraction("0.015")),
    # an exponent of nine digits would take gigabytes
    ("1e999999999", 1),
    ("x2", None),
    ("0042", 42),
    ("9" * 5000, None),
    # a list, not thousands
    ("1,2,3", 3),
    ("1,2345", 2345),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_final_number(text, expected):
    assert final_number(text) == expected


def test_values_are_exact():
    assert final_number("0.1") + final_number("0.2") == final_number("0.3")
    assert final_number("0.30000000000000004") != final_number("0.3")
    assert final_number("100000000000000000001") != final_number("100000000000000000000")
