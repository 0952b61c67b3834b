"""Datasets and ledgers on disk."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.errors import DataError, StageError
from stages.data import RowLedger, merge, read_dataset, write_dataset
from tests.data.characters import answers, turns


def write(folder, rows, kind="prompt_completion", conversational=False):
    folder.mkdir(parents=True, exist_ok=True)
    ledger = RowLedger()
    ledger.use(len(rows))
    write_dataset(folder, rows, type=kind, conversational=conversational, ledger=ledger, source={"digest": "0"})
    return folder


def rows_of(count, **extra):
    return [{"row_id": f"r{i}", "prompt": f"p{i}", "completion": f"c{i}", **extra} for i in range(count)]


def test_rows_come_back_as_they_were(tmp_path):
    rows = rows_of(2500, score=0.5, tags=["a", "b"], nested={"x": None, "y": 3})
    data = read_dataset(write(tmp_path / "a", rows))
    assert (data.type, data.conversational, len(data)) == ("prompt_completion", False, 2500)
    assert data.columns == ("row_id", "prompt", "completion", "score", "tags", "nested")
    assert list(data) == rows
    assert data[-1] == rows[-1] and data[1024] == rows[1024]
    assert list(data.select([2000, 3])) == [rows[2000], rows[3]]
    assert [row for block in data.blocks(999) for row in block] == rows


def test_equal_rows_give_equal_bytes(tmp_path):
    rows = [{"row_id": "r", "prompt": turns("a"), "completion": answers("b"), "n": 1}]
    first, second = (write(tmp_path / name, rows, conversational=True) for name in "ab")
    for name in ("data.parquet", "dataset.json", "ledger.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert list(read_dataset(first)) == rows


def test_late_values_widen_a_column(tmp_path):
    rows = rows_of(4)
    for row, value in zip(rows, [None, 1, 2.5, None], strict=True):
        row["score"] = value
    assert [row["score"] for row in read_dataset(write(tmp_path / "a", rows))] == [None, 1.0, 2.5, None]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, "x"], "row r1: column 'extra' holds a string, in rows before it a whole number"),
        ([[1], ["x"]], r"row r1: column 'extra\[\]' holds a string"),
        ([{"a": 1}, {"a": [1]}], "row r1: column 'extra.a' holds a list"),
        ([2**63, 1], "row r0: column 'extra': 9223372036854775808 does not fit 64 bits"),
        ([b"x", b"y"], "row r0: column 'extra' holds a bytes"),
        ([{}, {}], "column 'extra' holds only empty objects"),
    ],
)
def test_mixed_types_name_row_and_column(tmp_path, values, message):
    rows = [{**row, "extra": value} for row, value in zip(rows_of(2), values, strict=True)]
    with pytest.raises(DataError, match=message):
        write(tmp_path / "a", rows)


def test_required_columns_and_empty(tmp_path):
    with pytest.raises(DataError, match="row r0 has no 'completion'; found columns: row_id, prompt"):
        write(tmp_path / "a", [{"row_id": "r0", "prompt": "p"}])
    with pytest.raises(DataError, match="no row is left"):
        write(tmp_path / "b", [])


def test_folders_that_are_no_dataset(tmp_path):
    with pytest.raises(DataError, match=r"is not a dataset: it has no dataset\.json"):
        read_dataset(tmp_path)
    folder = write(tmp_path / "a", rows_of(3))
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**description, "rows": 4}))
    with pytest.raises(DataError, match=r"data\.parquet has 3 rows, dataset\.json says 4"):
        read_dataset(folder)
    (folder / "dataset.json").write_text(json.dumps({**description, "type": "preference"}))
    with pytest.raises(DataError, match="no column 'chosen'"):
        read_dataset(folder)
    (folder / "dataset.json").write_text(json.dumps({**description, "type": "tables"}))
    with pytest.raises(DataError, match="unknown dataset type 'tables'"):
        read_dataset(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="does not describe a dataset"):
        read_dataset(folder)


def test_a_flipped_bit_in_the_rows_is_seen(tmp_path):
    folder = write(tmp_path / "a", rows_of(200))
    damaged = bytearray((folder / "data.parquet").read_bytes())
    damaged[len(damaged) // 4] ^= 1
    (folder / "data.parquet").write_bytes(damaged)
    with pytest.raises(DataError, match=r"data\.parquet cannot be read: .*CRC"):
        list(read_dataset(folder))


def test_merge_keeps_order_and_refuses_other_types_and_doubles(tmp_path):
    first = read_dataset(write(tmp_path / "a", rows_of(2)))
    second = read_dataset(write(tmp_path / "b", [{**row, "row_id": row["row_id"] + "b"} for row in rows_of(3)]))
    both = merge([first, second])
    assert [row["row_id"] for row in both] == ["r0", "r1", "r0b", "r1b", "r2b"]
    assert both[-1]["row_id"] == "r2b" and len(both) == 5
    with pytest.raises(DataError, match="row r0 is in more than one"):
        merge([first, first])
    chat = [{"row_id": "x", "messages": turns("a", "b")}]
    other = read_dataset(write(tmp_path / "c", chat, "language_modeling", True))
    with pytest.raises(DataError, match=r"language_modeling \(conversational\), prompt_completion \(standard\)"):
        merge([first, other])


@given(st.lists(st.sampled_from(["use", "drop", "truncate"])), st.integers(0, 3))
def test_states_sum_to_the_input(fates, missing):
    ledger = RowLedger()
    for index, fate in enumerate(fates):
        arguments = {"use": (), "drop": ("filtered: short",), "truncate": (index + 1,)}[fate]
        getattr(ledger, fate)(f"r{index}", *arguments)
    ledger.check(len(fates))
    state = ledger.to_json()
    assert sum(state["states"].values()) == state["input"] == len(fates)
    assert state["truncated_tokens"] == sum(i + 1 for i, fate in enumerate(fates) if fate == "truncate")
    assert all(len(examples) <= 5 for examples in state["examples"].values())
    if missing:
        with pytest.raises(StageError, match=f"{len(fates) + missing} rows came in, {len(fates)} have a state"):
            ledger.check(len(fates) + missing)
