"""The quickstart's rows: right answers for the checker, and slips in the demonstrations alone."""

from __future__ import annotations

import runpy
from pathlib import Path

import flows

RECIPES = Path(flows.__file__).parent / "recipes"
TASK = runpy.run_path(str(RECIPES / "arithmetic.py"))


def test_one_demonstration_in_four_is_ten_too_high() -> None:
    off_by = []
    for row in TASK["problems"]():
        question, shown = row["prompt"][0]["content"], row["completion"][0]["content"]
        left, right = int(question[:2]), int(question[3:])
        right_answer = left + right if question[2] == "+" else left - right
        assert row["answer"] == str(right_answer)
        off_by.append(int(shown) - right_answer)
    assert len(off_by) == 90 * 90 + 90 * 91 // 2 and set(off_by) == {0, 10}
    share = off_by.count(10) / len(off_by)
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / len(off_by)) ** 0.5


def test_the_checker_knows_a_slip() -> None:
    said = [[{"role": "assistant", "content": text}] for text in ("65", " 65 ", "75", "", "65 or 75")]
    assert TASK["correct"]([[]] * 5, said, answer=["65"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
