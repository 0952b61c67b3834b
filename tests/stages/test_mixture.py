"""The stage `mixture`: counts by hand, every row equally often, nothing by position, every row accounted for."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.errors import DataError
from stages.data.mixing import copies_of_each, rows_of_each
from stages.mixture import Config
from tests.data.characters import answers, turns
from tests.data.test_dataset import write
from tests.stages.small_models import logged, output, read_json, rows_of, run_stage


@pytest.mark.parametrize(
    ("sizes", "weights", "rows", "counts"),
    [
        ([5, 5], [1, 1], 4, [2, 2]),
        # 10/3 each: the third row goes to the first of equal remainders
        ([5, 5, 5], [1, 1, 1], 10, [4, 3, 3]),
        # 0.7 x 9 = 6.3 and 2.7: the larger remainder is rounded up; more rows than there are
        ([2, 100], [0.7, 0.3], 9, [6, 3]),
        # 3 rows at share 1/4 allow 12 in all
        ([3, 100], [1, 3], "first_exhausted", [3, 9]),
        # 10 rows at share 3/4 allow 13.33: 10 of it, and 3.33 of the other
        ([10, 100], [3, 1], "first_exhausted", [10, 3]),
        # all 100 at share 3/4 need 133.33: 100, and 33.33 of the 3, each 11 or 12 times
        ([3, 100], [1, 3], "all_exhausted", [34, 100]),
        # shares that no float holds: exactly 7 of 10, not 6
        ([7, 100], [0.7, 0.3], "first_exhausted", [7, 3]),
    ],
)
def test_counts_by_hand(sizes: list[int], weights: list[float], rows: Any, counts: list[int]) -> None:
    assert rows_of_each(sizes, weights, rows) == counts


WEIGHTS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=5)


@given(WEIGHTS, st.integers(1, 200))
def test_counts_for_any_weights(parts: list[tuple[int, int]], total: int) -> None:
    """Off by less than a row; none repeated and one used up; all used up and none more often than it takes."""
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    counts = rows_of_each(sizes, weights, total)
    assert sum(counts) == total
    assert all(abs(count - share * total) < 1 for count, share in zip(counts, shares, strict=True))
    counts = rows_of_each(sizes, weights, "first_exhausted")
    assert all(count <= size for count, size in zip(counts, sizes, strict=True))
    assert any(count == size for count, size in zip(counts, sizes, strict=True))
    counts = rows_of_each(sizes, weights, "all_exhausted")
    assert all(count >= size for count, size in zip(counts, sizes, strict=True))
    assert any(count == size for count, size in zip(counts, sizes, strict=True))


@given(st.integers(1, 30), st.integers(0, 100), st.integers(0, 3))
def test_every_row_equally_often_wherever_it_stands(size: int, count: int, seed: int) -> None:
    ids = [f"r{number}" for number in range(size)]
    copies = copies_of_each(ids, count, seed)
    assert sum(copies) == count and set(copies) <= {count // size, -(-count // size)}
    turned = copies_of_each(ids[::-1], count, seed)
    assert turned == copies[::-1]


def prompts(folder: Path, name: str, count: int, **columns: Any) -> Path:
    rows = [{"row_id": f"{name}{number}", "prompt": f"{name} {number}", **columns} for number in range(count)]
    return write(folder / name, rows, kind="prompt")


def mixed(folder: Path, inputs: list[Path], **config: Any) -> Path:
    context = run_stage("mixture", folder, {"datasets": inputs}, **config)  # type: ignore[dict-item]
    return output(context, "dataset")


def test_up_and_down_sampling_with_lineage(tmp_path: Path) -> None:
    """2 and 50 rows, half and half of 10: each of the 2 rows 2 or 3 times, 5 of the 50 once."""
    few, many = prompts(tmp_path, "a", 2), prompts(tmp_path, "b", 50)
    made = mixed(tmp_path / "mix", [few, many], weights=[1, 1], rows=10, names=["few", "many"])
    rows = rows_of(made)
    ids = [row["row_id"] for row in rows]
    assert len(set(ids)) == 10
    assert sorted(one for one in ids if one[0] == "a") in (
        ["a0", "a0*2", "a0*3", "a1", "a1*2"],
        ["a0", "a0*2", "a1", "a1*2", "a1*3"],
    )
    assert Counter(row["source"] for row in rows) == {"few": 5, "many": 5}
    for row in rows:  # a copy is its row
        name, number = row["row_id"][0], row["row_id"].partition("*")[0][1:]
        assert (row["prompt"], row["source"]) == (f"{name} {number}", {"a": "few", "b": "many"}[name])
    assert logged(made.parents[1]) == ["52 rows: 7 used; 45 dropped: filtered: not drawn by weight"]
    ledger = read_json(made / "ledger.json")
    assert ledger["states"] == {"filtered: not drawn by weight": 45, "used": 7} and ledger["input"] == 52
    assert ledger["changes"] == {"further copies of rows": 3}
    assert read_json(made / "dataset.json")["source"] == {
        "mixture": [{"drawn": 5, "name": "few", "rows": 2}, {"drawn": 5, "name": "many", "rows": 50}]
    }


def test_neither_the_first_rows_nor_one_after_the_other(tmp_path: Path) -> None:
    one, two = prompts(tmp_path, "a", 400), prompts(tmp_path, "b", 400)
    made = mixed(tmp_path / "mix", [one, two], weights=[1, 1], rows=400)
    ids = [row["row_id"] for row in rows_of(made)]
    drawn = sorted(int(one[1:]) for one in ids if one[0] == "a")
    assert len(drawn) == 200 and drawn != list(range(200))
    # of the 200 drawn, about half come from each half of the source, and from each half of the mixture
    assert 80 <= sum(number < 200 for number in drawn) <= 120
    assert 80 <= sum(one[0] == "a" for one in ids[:200]) <= 120
    assert ids == [row["row_id"] for row in rows_of(mixed(tmp_path / "same", [one, two], weights=[2, 2], rows=400))]
    other = [row["row_id"] for row in rows_of(mixed(tmp_path / "seed", [one, two], weights=[1, 1], rows=400, seed=1))]
    assert set(other) != set(ids)


def test_the_order_of_rows_in_a_source_changes_nothing(tmp_path: Path) -> None:
    rows = [{"row_id": f"r{number}", "prompt": str(number)} for number in range(30)]
    straight = write(tmp_path / "straight", rows, kind="prompt")
    turned = write(tmp_path / "turned", rows[::-1], kind="prompt")
    other = prompts(tmp_path, "a", 20)
    made = [mixed(tmp_path / f"m{n}", [one, other], weights=[1, 2]) for n, one in enumerate((straight, turned))]
    assert rows_of(made[0]) == rows_of(made[1])
    assert (made[0] / "data.parquet").read_bytes() == (made[1] / "data.parquet").read_bytes()


def test_rows_with_other_columns_and_tools(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": 2}}}
    talk = [*turns("a"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    one = [{"row_id": "t", "prompt": turns("a"), "completion": talk[1:], "tools": tools}]
    two = [{"row_id": "p", "prompt": turns("b"), "completion": answers("c"), "score": 1.5}]
    folders = [write(tmp_path / row[0]["row_id"], row, conversational=True) for row in (one, two)]
    made = {row["row_id"]: row for row in rows_of(mixed(tmp_path / "mix", folders, weights=[1, 1]))}
    assert made["t"] == {**one[0], "score": None}
    assert made["p"] == {**two[0], "tools": None}


def test_what_does_not_go_together(tmp_path: Path) -> None:
    one, two = prompts(tmp_path, "a", 3), prompts(tmp_path, "b", 300)
    with pytest.raises(DataError, match="weights has 3 numbers for 2 datasets"):
        mixed(tmp_path / "m0", [one, two], weights=[1, 1, 1])
    with pytest.raises(DataError, match="row a0 is in more than one of the given datasets"):
        mixed(tmp_path / "m1", [one, one], weights=[1, 1])
    with pytest.raises(DataError, match="dataset 1 would give no row under these weights"):
        mixed(tmp_path / "m2", [one, two], weights=[1, 200], rows=10)
    text = write(tmp_path / "text", [{"row_id": "t", "text": "a"}], kind="language_modeling")
    with pytest.raises(DataError, match="datasets of different types cannot be joined"):
        mixed(tmp_path / "m3", [one, text], weights=[1, 1])
    named = prompts(tmp_path, "c", 3, source="web")
    with pytest.raises(DataError, match="dataset 2 has a column 'source' already; give another source_column"):
        mixed(tmp_path / "m4", [one, named], weights=[1, 1], names=["x", "y"])
    for config, problem in [
        ({"weights": [1, 0]}, "greater than 0"),
        ({"weights": [1], "names": ["a", "b"]}, "2 names for 1 weights"),
        ({"weights": [1, 1], "names": ["a", "a"]}, "names must differ"),
        ({"weights": [1], "source_column": "x"}, "source_column is given, but names are not"),
    ]:
        with pytest.raises(ValueError, match=problem):
            Config.model_validate(config)


def test_masks_of_pretokenized_rows_must_agree(tmp_path: Path) -> None:
    with_labels = write(tmp_path / "a", [{"row_id": "a", "input_ids": [1, 2], "labels": [1, 2]}], "pretokenized")
    without = write(tmp_path / "b", [{"row_id": "b", "input_ids": [1, 2]}], "pretokenized")
    with pytest.raises(DataError, match="datasets 1 and 2: one has column 'labels', the other none"):
        mixed(tmp_path / "mix", [with_labels, without], weights=[1, 1])


def test_the_ledger_holds_every_row_of_every_source(tmp_path: Path) -> None:
    sizes = [7, 19, 40]
    inputs = [prompts(tmp_path, name, size) for name, size in zip("abc", sizes, strict=True)]
    made = mixed(tmp_path / "mix", inputs, weights=[3, 2, 1], rows="all_exhausted")
    # 40 rows at share 1/6 need 240: 120 of 7, 80 of 19
    ledger, rows = read_json(made / "ledger.json"), rows_of(made)
    assert (len(rows), ledger["input"], ledger["states"]) == (240, 66, {"used": 66})
    assert ledger["changes"] == {"further copies of rows": 240 - 66}
    times = Counter(row["row_id"].partition("*")[0] for row in rows)
    assert {times[f"a{n}"] for n in range(7)} == {17, 18} and {times[f"b{n}"] for n in range(19)} == {4, 5}
    assert {times[f"c{n}"] for n in range(40)} == {1}
