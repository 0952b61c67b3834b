"""Row weights from columns, and what is wrong with them."""

import pytest

from artifacts.errors import DataError
from stages.data.ledger import RowLedger
from stages.data.types import Dataset
from stages.data.weights import row_weights, without_idle_rows

ROWS = [{"text": "a", "w": 2, "source": "web"}, {"text": "b", "w": 0.5, "source": "books"}]


def weights(rows=ROWS, column=None, source="source", by_source=None):
    listed = [{"row_id": f"r{index}", **row} for index, row in enumerate(rows)]
    data = Dataset("language_modeling", False, ("row_id", *rows[0]), listed)
    return row_weights(data, column, source, by_source or {})


def test_from_columns():
    assert weights() is None
    assert weights(column="w") == {"r0": 2.0, "r1": 0.5}
    assert weights(by_source={"web": 0.25, "books": 3.0}) == {"r0": 0.25, "r1": 3.0}
    assert weights(column="w", by_source={"web": 0.25, "books": 3.0}) == {"r0": 0.5, "r1": 1.5}


@pytest.mark.parametrize("value", [-1, None, "2", True])
def test_no_weight(value):
    rows = [ROWS[0], {**ROWS[1], "w": value}]
    with pytest.raises(DataError, match=rf"row r1: field 'w': a weight is a number of at least 0; found {value!r}"):
        weights(rows, column="w")


def test_rows_of_weight_zero_are_dropped_and_counted():
    listed = [{"row_id": f"r{index}", "text": "a"} for index in range(3)]
    data, ledger = Dataset("language_modeling", False, ("row_id", "text"), listed), RowLedger()
    kept = without_idle_rows(data, {"r0": 1.0, "r1": 0.0, "r2": 2.0}, ledger)
    assert [row["row_id"] for row in kept] == ["r0", "r2"]
    assert ledger.to_json()["states"] == {"filtered: weight 0": 1}


def test_unknown_sources_and_columns():
    with pytest.raises(DataError, match=r"row r1: field 'source': source 'books' has no weight; .* names web"):
        weights(by_source={"web": 1.0})
    with pytest.raises(DataError, match=r"the dataset has no column 'weigth'; it has row_id, text, w, source"):
        weights(column="weigth")
    with pytest.raises(DataError, match="every one of the 2 rows has weight 0"):
        weights(by_source={"web": 0.0, "books": 0.0})
