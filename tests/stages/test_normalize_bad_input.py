"""Malformed sources that need more than a file; those that are one are in `tests/bad_input/datasets`."""

import json
from datetime import timedelta

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from artifacts.errors import DataError
from stages.normalize import NormalizeConfig
from tests.stages.normalized import Normalized

PAIR = '{"prompt": "a", "completion": "b"}\n'


def normalized(tmp_path, content, name="a.jsonl", **config):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return Normalized(tmp_path, path, **config)


def test_line_separators_inside_strings_are_no_line_ends(tmp_path):
    made = normalized(tmp_path, '{"text": "a\u2028b\u0085c"}\r\n{"text": "d"}')
    assert made.rows() == [{"text": "a\u2028b\u0085c"}, {"text": "d"}]


def test_parquet_values(tmp_path):
    table = {"text": ["a", "b"], "score": [1.5, float("nan")], "raw": [b"x", b"y"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a\.parquet row 1: field 'raw': a dataset keeps text.*; found a bytes; .* keep_columns"
    ):
        Normalized(tmp_path, tmp_path / "a.parquet")
    made = Normalized(tmp_path / "1", tmp_path / "a.parquet", keep_columns=["score"])
    assert made.rows() == [{"text": "a", "score": 1.5}, {"text": "b", "score": None}]


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.csv", '"text; or more"\nhello\n', {"text; or more": "hello"}),
        ("a.csv", '"text; or more"\none; two\n', {"text; or more": "one; two"}),
        ("a.csv", '"a\tb"\none\ttwo\n', {"a\tb": "one\ttwo"}),
        ("a.csv", "text; or more\nhello\n", {"text; or more": "hello"}),
        ("a.csv", 'text; or more\n"one; two"\n', {"text; or more": "one; two"}),
        ("a.tsv", "text; or more\nhello, you\n", {"text; or more": "hello, you"}),
    ],
)
def test_one_column_with_a_separator_of_other_files_in_its_name(tmp_path, name, content, columns):
    (column,) = columns
    assert normalized(tmp_path, content, name, columns={"text": column}).rows() == [{"text": columns[column]}]


@pytest.mark.parametrize(
    ("name", "content", "do"),
    [
        ("a.tsv", "prompt;answer\na;b\n", "save it with tabs between them"),
        ("a.csv", 'prompt;answer\n"a; c";"b, d"\n', "save it with commas between them"),
        ("a.csv", "prompt\tanswer\na\tb\n", r"call the file \.tsv"),
    ],
)
def test_columns_apart_by_another_separator(tmp_path, name, content, do):
    with pytest.raises(DataError, match=rf"header is one field, .*apart by '(;|.t)'; {do}, or quote the header if"):
        normalized(tmp_path, content, name)


@pytest.mark.parametrize(("ending", "kind"), [("gz", "gzip"), ("zst", "zstd")])
def test_json_that_is_called_packed_and_is_not(tmp_path, ending, kind):
    """`.json` is looked into for what it is, before any row is read."""
    with pytest.raises(DataError, match=rf"a\.json\.{ending} row 1: the {kind} file is damaged or cut off: .*; get it"):
        normalized(tmp_path, PAIR, f"a.json.{ending}")


def test_a_fault_is_of_one_kind_wherever_it_is_in_the_text(tmp_path):
    """A kind has one line of the log and one entry in the ledger, whatever place or name the error has."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    broken = [{"messages": talk, "tools": "[" + " " * number + "x"} for number in range(20)]
    misnamed = [{"messages": talk, "chat_template_kwargs": {f"{number}a": 1}} for number in range(20)]
    rows = "".join(json.dumps(row) + "\n" for row in ({"messages": talk}, *broken, *misnamed))
    made = normalized(tmp_path, rows, on_bad_row="drop")
    argument = "an argument's name has letters, digits and _ only, and no digit first"
    assert made.ledger()["states"] == {
        "used": 1,
        "bad row: field 'tools': not JSON": 20,
        f"bad row: field 'chat_template_kwargs': {argument}": 20,
    }
    told = [line for line in made.logged() if line.startswith("bad row, ")]
    assert len(told) == 2 and "a.jsonl row 2: field 'tools': not JSON; found '[x': Expecting value: line 1" in told[0]


def test_of_many_kinds_of_bad_rows_the_first_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.data.normalizing.KINDS_TOLD", 2)
    made = normalized(tmp_path, f'{PAIR}[]\n{{\n{{"a": 1, "a": 2}}\n{{"a": NaN}}\n', on_bad_row="drop")
    told = [line for line in made.logged() if line.startswith("bad row, ")]
    assert [line[:24] for line in told] == ["bad row, 1 of this kind,"] * 2 + ["bad row, and 2 more kind"]


def test_missing_files_name_what_is_there(tmp_path):
    (tmp_path / "train.jsonl").write_text(PAIR)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "nothing_alike.yaml").write_text("x")
    (tmp_path / "texts" / "README.md").write_text("x")
    where = str(tmp_path)
    for url, message in {
        where + "/nothing_alike.jsonl": r"no file or folder \S*nothing_alike\.jsonl$",
        where + "/trian.csv": r"no file or folder \S*trian\.csv; did you mean 'train\.jsonl'\?$",
        "file://" + where + "/trian.jsonl": r"no file or folder .*trian\.jsonl; did you mean 'train\.jsonl'\?",
        "file://" + where + "/nowhere/a.jsonl": r"the folder .*/nowhere does not exist",
        "file://" + where + "/*.parquet": r"no file matches .*\*\.parquet",
        where + "/empty": r"the folder .*/empty has no file of rows .*found: nothing",
        where + "/texts": r"the folder .*/texts has no file of rows .*found: README\.md",
        "memory://nothing/a.jsonl": r"no file or folder memory://nothing/a\.jsonl",
        "nosuch://a/b.jsonl": r"cannot read nosuch://a/b\.jsonl: ValueError: Protocol not known",
    }.items():
        from stages.data.files import locate

        with pytest.raises(DataError, match=message):
            locate(url, "auto")


def test_saved_datasets_and_the_hub(tmp_path, monkeypatch):
    import datasets

    from stages.data.sources import hub_source

    table = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"one": table, "two": table}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved has several splits; set source\.split to one of one, two"):
        Normalized(tmp_path, tmp_path / "saved")
    with pytest.raises(DataError, match=r"has no split 'three'; set source\.split to one of one, two"):
        Normalized(tmp_path, {"path": str(tmp_path / "saved"), "split": "three"})
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"cannot load the Hub dataset 'nobody/nothing': .*give a local copy as source.path"
    ):
        list(hub_source("nobody/nothing", None, None, "0" * 40))


def test_user_functions_that_fail(tmp_path):
    (tmp_path / "rows.py").write_text(
        "def fails():\n    yield {'text': 'a'}\n    raise KeyError('x')\n"
        "def numbers():\n    yield 3\n"
        "def nothing():\n    return []\n"
        "def bad_map(row): return 3\n"
        "def failing_map(row): return row['missing']\n"
        "def maybe(row): return 1\n"
        "def failing_filter(row): raise ValueError('no')\n"
    )
    code = f"{tmp_path}/rows.py"
    (tmp_path / "a.jsonl").write_text(PAIR)
    path = str(tmp_path / "a.jsonl")
    for source, config, message in [
        ({"function": f"{code}:fails"}, {}, r"source function rows\.py:fails failed: KeyError: 'x' \(rows\.py:3\)"),
        ({"function": f"{code}:numbers"}, {}, r"rows\.py:numbers row 1 is a whole number; a row is a dict"),
        ({"function": f"{code}:nothing"}, {}, r"rows\.py:nothing gave no row"),
        (
            {"path": path, "function": f"{code}:bad_map"},
            {},
            r"py:bad_map gave a whole number; a dict",
        ),
        (
            {"path": path, "function": f"{code}:failing_map"},
            {},
            r"failing_map failed: KeyError: 'missing' \(rows\.py:9\)",
        ),
        ({"path": path}, {"filters": {"keep": f"{code}:maybe"}}, r"row 1: filter rows\.py:maybe gave 1; it must give"),
        (
            {"path": path},
            {"filters": {"keep": f"{code}:failing_filter"}},
            r"row 1: filter .* failed: ValueError: no \(rows\.py:11\)",
        ),
    ]:
        with pytest.raises(DataError, match=message):
            Normalized(tmp_path, source, **config)


CODE = """
from datetime import timedelta

class Shown:
    pass

def rows(kept):
    unfit = [float("inf"), timedelta(1), {3: "x"}, "\\ud800", {"b", "a"}, Shown(), b"x", 7]
    for number, value in enumerate(unfit):
        yield {"text": str(number), "other": value, **({"score": value} if kept else {})}
"""


def test_a_column_that_nobody_keeps_may_hold_anything(tmp_path):
    """Only of those that are kept a row can be bad, and ids are the same in every process."""
    (tmp_path / "rows.py").write_text(CODE)
    source = {"function": f"{tmp_path}/rows.py:rows", "arguments": {"kept": False}}
    made = [Normalized(tmp_path / str(n), source, keep_columns=[], on_bad_row="drop") for n in range(2)]
    assert made[0].rows() == [{"text": str(number)} for number in range(8)]
    assert made[0].rows(ids=True) == made[1].rows(ids=True)
    source["arguments"] = {"kept": True}
    some = Normalized(tmp_path / "some", source, keep_columns=["score"], on_bad_row="drop")
    assert some.rows() == [{"text": "7", "score": 7}] and some.ledger()["states"]["used"] == 1
    with pytest.raises(DataError, match=r"row 1: field 'score': a number must be finite; found inf"):
        Normalized(tmp_path / "none", source, keep_columns=["score"])


def test_a_saved_dataset_with_a_duration_that_nobody_keeps(tmp_path):
    import datasets

    table = {"text": ["a", "b"], "took": [timedelta(seconds=1), timedelta(seconds=2)]}
    datasets.Dataset(pyarrow.table(table)).save_to_disk(tmp_path / "saved")
    made = Normalized(tmp_path, tmp_path / "saved", keep_columns=[], on_bad_row="drop")
    assert made.rows() == [{"text": "a"}, {"text": "b"}]


def test_columns_that_are_not_there(tmp_path):
    for config, message in [
        ({"columns": {"prompt": "promt"}}, "row 1: field 'promt': missing column; .* did you mean 'prompt'"),
        ({"templates": {"prompt": "{question}"}}, r"row 1: field 'question': missing column"),
        ({"keep_columns": ["score"]}, r"row 1: field 'score': missing column"),
        ({"deduplicate": ["id"]}, r"row 1: field 'id': no such column to group or deduplicate by"),
        ({"group_by": "problem", "test_size": 1}, r"row 1: field 'problem': no such column to group"),
        ({"system": "x"}, r"row 1: field 'prompt': a system message needs conversational rows; found text"),
        ({"type": "preference"}, r"row 1: field 'chosen': a preference row has no 'chosen'"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            normalized(tmp_path, PAIR, **config)
    with pytest.raises(DataError, match=r"row 1: field 'label': must be true or false; found 'good'"):
        normalized(tmp_path, '{"prompt": "a", "completion": "b", "label": "good"}\n')
    with pytest.raises(DataError, match=r"row 1: field 'a': the column is null"):
        normalized(tmp_path, '{"a": null}\n', columns={"text": "a"})
    with pytest.raises(DataError, match=r"row 1: field 'a': a template takes text or a number; found a list"):
        normalized(tmp_path, '{"a": [1]}\n', templates={"text": "{a}"})


def test_splits_that_cannot_be(tmp_path):
    rows = "".join(f'{{"text": "{i}", "g": {i // 2}}}\n' for i in range(4))
    with pytest.raises(DataError, match="test_size 4 leaves nothing to train on: there are 4 rows"):
        normalized(tmp_path, rows, test_size=4)
    with pytest.raises(DataError, match=r"test_size 1 is 1 rows and every group has more \(the smallest 2\)"):
        normalized(tmp_path, rows, test_size=1, group_by="g")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"source": {}}, "give path .* or function"),
        ({"source": {"path": "a", "arguments": {"x": 1}}}, "arguments without function"),
        (
            {"source": {"path": "a"}, "test_size": 1.5},
            "a fraction below 1 or a whole number of rows, found 1.5",
        ),
        ({"source": {"path": "a"}, "test_size": 0}, "greater than 0"),
        ({"source": {"path": "a"}, "templates": {"text": "{a"}}, "a lone brace at character 1"),
        ({"source": {"path": "a"}, "templates": {"text": "x"}, "columns": {"text": "y"}}, "both in columns and in"),
        ({"source": {"path": "a"}, "group_by": "x"}, "group_by says how test_size splits"),
        ({"source": {"path": "a"}, "type": "pairs"}, "language_modeling"),
        ({"source": {"path": "a"}, "limit": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_are_refused_before_anything_runs(config, message):
    with pytest.raises(ValidationError, match=message):
        NormalizeConfig.model_validate(config)
