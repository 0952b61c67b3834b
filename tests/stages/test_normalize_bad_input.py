"""Malformed sources, one by one: what, where, what was found, what to do. Nothing half-written is left."""

import gzip

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from artifacts.errors import DataError
from stages.normalize import NormalizeConfig
from tests.stages.normalized import Normalized, assistant, system, user

PAIR = '{"prompt": "a", "completion": "b"}\n'
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'

FILES = {
    "not JSON": (PAIR + '{"prompt": "a"\n', r"a\.jsonl row 2 is not JSON: Expecting ',' delimiter at character 15"),
    "cut off last row": (PAIR + '{"prompt": "a", "compl', r"row 2 is not JSON: Unterminated string"),
    "not an object": (PAIR + "[1]\n", r"row 2 is a list, not an object"),
    "empty file": ("", r"a\.jsonl is empty: it has no row"),
    "empty line": (PAIR + "\n" + PAIR, r"row 2 is an empty line; remove it"),
    "NaN": ('{"text": NaN}\n', r"row 1: NaN is not JSON; write null"),
    "infinity": ('{"text": "a", "x": -Infinity}\n', r"row 1: -Infinity is not JSON"),
    "a number beyond floats": ('{"text": "a", "x": 1e999}\n', r"row 1: the number 1e999 is too large"),
    "duplicate key": ('{"text": "a", "text": "b"}\n', r"row 1: the key 'text' occurs twice"),
    "lone surrogate": ('{"text": "\\ud800"}\n', r"row 1 has half of a surrogate pair"),
    "byte order mark": ("\ufeff" + PAIR, r"row 1 is not JSON: .*byte order mark: save it as plain UTF-8"),
    "Latin-1": (b'{"text": "\xe9"}\n', r"row 1 is not UTF-8 \(invalid continuation byte at byte 10\)"),
    "no known column": ('{"a": 1}\n', r"row 1: cannot tell the dataset type from the columns a; set `type`"),
    "missing column later": (PAIR + '{"prompt": "a"}\n', r"row 2: field 'completion': a prompt_completion row has no"),
    "no rejected": (
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n',
        r"row 2: field 'rejected': a preference row has no 'rejected'; found columns prompt, chosen; map it with",
    ),
    "a label too few": (
        '{"prompt": "a", "completions": ["b", "c"], "labels": [true]}\n',
        r"row 1: field 'labels': every step has one label; found 1 labels for 2 steps",
    ),
    "a label that is none": (
        '{"prompt": "a", "completions": ["b", "c"], "labels": [true, "maybe"]}\n',
        r"row 1: field 'labels\[1\]': must be true or false; found 'maybe'",
    ),
    "steps that are no list": (
        '{"prompt": "a", "completions": "b", "labels": [true]}\n',
        r"row 1: field 'completions': must be a list with an entry a step; found a str",
    ),
    "a step that is no text": (
        '{"prompt": "a", "completions": ["b", 2], "labels": [true, false]}\n',
        r"row 1: field 'completions\[1\]': a step is text; found a int",
    ),
    "text, then messages": (
        '{"text": "a"}\n' + CHAT,
        r"row 2: field 'messages': mixed types: the rows before it hold text; found messages; make all rows alike",
    ),
    "text beside messages": (
        '{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}\n',
        r"row 1: field 'chosen': mixed types: text and messages in one row; found prompt is text, .*; give all of them",
    ),
    "an extra column that changes": (
        '{"text": "a", "n": 1}\n{"text": "b", "n": "1"}\n',
        r"row 2: column 'n' holds a string, in rows before it a whole number",
    ),
    "every row dropped": (
        '{"text": ""}\n{"text": " "}\n',
        r"no row of the source is left \(2 filtered: empty text; the first: row 1, text\); see source and filters",
    ),
    "a transcript among texts": (
        '{"text": "Human: a\\n\\nAssistant: b"}\n{"text": "c"}\n',
        r"row 2: field 'text': no Human:/Assistant: transcript as in the rows before it; found 'c'",
    ),
    "our own column": ('{"text": "a", "row_id": "7"}\n', r"row 1: field 'row_id': the column name is ours; map it"),
}


def normalized(tmp_path, content, name="a.jsonl", **config):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return Normalized(tmp_path, path, **config)


@pytest.mark.parametrize("name", FILES)
def test_malformed_jsonl(tmp_path, name):
    content, message = FILES[name]
    with pytest.raises(DataError, match=message):
        normalized(tmp_path, content)
    assert not list(tmp_path.glob("job/out/*/dataset.json")) and not list(tmp_path.glob("job/scratch-0/*"))


def test_line_separators_inside_strings_are_no_line_ends(tmp_path):
    made = normalized(tmp_path, '{"text": "a\u2028b\u0085c"}\r\n{"text": "d"}')
    assert made.rows() == [{"text": "a\u2028b\u0085c"}, {"text": "d"}]


CONVERSATIONS = {
    "ends with the user": ([user("a")], "does not end with the assistant; found user; cut or leave it out"),
    "begins with the assistant": ([assistant("a")], "wrong role order: it must begin with the user; found assistant"),
    "two in a row": (
        [user("a"), user("b"), assistant("c")],
        "wrong role order: user and assistant take turns .*found user, user, assistant",
    ),
    "late system": ([user("a"), system("b"), assistant("c")], "wrong role order: .* at most one system message"),
    "empty": ([], "a conversation without messages"),
    "content is not text": (
        [user("a"), {"role": "assistant", "content": None}], "content must be text; found a NoneType"),
    "a part of text without text": ([user([{"type": "text"}])], r"field 'messages\[0\].content\[0\]': .* no text"),
    "an image": (
        [user([{"type": "text", "text": "a"}, {"type": "image"}])],
        r"field 'messages\[0\].content\[1\]': images, .* parts of text; found a part of type image"),
    "no content": ([{"role": "user"}], r"field 'messages\[0\]': a message has no 'content'; found keys role"),
    "unknown role": ([{"role": "narrator", "content": "a"}], r"field 'messages\[0\]': unknown role; found 'narrator'"),
    "not a message": (["a"], r"field 'messages\[0\]': a message is an object with role and content; found str"),
    "not a list": ({"role": "user"}, "field 'messages': must be text or a list of messages; found a dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_malformed_conversations(tmp_path, name):
    import json

    messages, message = CONVERSATIONS[name]
    with pytest.raises(DataError, match=rf"a\.jsonl row 2: .*{message}"):
        normalized(tmp_path, CHAT + json.dumps({"messages": messages}) + "\n")


def test_malformed_files_of_other_formats(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv row 2 \(line 3\) has 3 fields, the header 2; quote fields"):
        normalized(tmp_path, "prompt,completion\na,b\na,b,c\n", "a.csv")
    with pytest.raises(DataError, match=r"a\.csv: the header names a column twice: text, text"):
        normalized(tmp_path, "text,text\na,b\n", "a.csv")
    with pytest.raises(DataError, match=r"a\.csv is empty"):
        normalized(tmp_path, "text\n", "a.csv")
    with pytest.raises(DataError, match=r"a\.csv after row \d is not UTF-8"):
        normalized(tmp_path, b"text\n\xe9\n", "a.csv")
    with pytest.raises(DataError, match=r"a\.csv row 1 is not CSV"):
        normalized(tmp_path, 'text\n"a"b\n', "a.csv")
    with pytest.raises(DataError, match=r"a\.json holds a int; give a list of objects"):
        normalized(tmp_path, "3", "a.json")
    with pytest.raises(DataError, match=r"a\.json row 2 is a int, not an object"):
        normalized(tmp_path, '[{"text": "a"}, 3]', "a.json")
    with pytest.raises(DataError, match=r"b\.json is empty"):
        normalized(tmp_path, "[]", "b.json")
    packed = gzip.compress(PAIR.encode() * 1000)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz row \d+: the gzip file is damaged or cut off"):
        normalized(tmp_path, packed[:-20], "a.jsonl.gz")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz is empty"):
        normalized(tmp_path, gzip.compress(b""), "b.jsonl.gz")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet"):
        normalized(tmp_path, b"PAR1 no", "a.parquet")
    with pytest.raises(DataError, match=r"a\.arrow cannot be read as Arrow"):
        normalized(tmp_path, b"ARROW1 no", "a.arrow")
    with pytest.raises(DataError, match=r"a\.txt: unknown extension '\.txt'; set source\.format"):
        normalized(tmp_path, "text", "a.txt")


def test_parquet_values(tmp_path):
    table = {"text": ["a", "b"], "score": [1.5, float("nan")], "raw": [b"x", b"y"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet row 1 holds a bytes; .* keep_columns"):
        Normalized(tmp_path, tmp_path / "a.parquet")
    made = Normalized(tmp_path / "1", tmp_path / "a.parquet", keep_columns=["score"])
    assert made.rows() == [{"text": "a", "score": 1.5}, {"text": "b", "score": None}]


def test_missing_files_name_what_is_there(tmp_path):
    (tmp_path / "train.jsonl").write_text(PAIR)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "README.md").write_text("x")
    where = str(tmp_path)
    for url, message in {
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
        ({"function": f"{code}:fails"}, {}, r"source function rows\.py:fails failed: KeyError: 'x'"),
        ({"function": f"{code}:numbers"}, {}, r"rows\.py:numbers row 1 is a int; a row is a dict"),
        ({"function": f"{code}:nothing"}, {}, r"rows\.py:nothing gave no row"),
        ({"path": path, "function": f"{code}:bad_map"}, {}, r"a\.jsonl row 1: rows\.py:bad_map gave a int; a dict"),
        ({"path": path, "function": f"{code}:failing_map"}, {}, r"row 1: rows\.py:failing_map failed: KeyError"),
        ({"path": path}, {"filters": {"keep": f"{code}:maybe"}}, r"row 1: filter rows\.py:maybe gave 1; it must give"),
        ({"path": path}, {"filters": {"keep": f"{code}:failing_filter"}}, r"row 1: filter .* failed: ValueError: no"),
    ]:
        with pytest.raises(DataError, match=message):
            Normalized(tmp_path, source, **config)


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
        ({"source": {"path": "a"}, "test_size": 1.5}, "a fraction below 1"),
        ({"source": {"path": "a"}, "test_size": 0}, "greater than 0"),
        ({"source": {"path": "a"}, "templates": {"text": "{a"}}, "a lone brace at character 1"),
        ({"source": {"path": "a"}, "templates": {"text": "x"}, "columns": {"text": "y"}}, "both in columns and in"),
        ({"source": {"path": "a"}, "group_by": "x"}, "group_by without test_size"),
        ({"source": {"path": "a"}, "type": "pairs"}, "language_modeling"),
        ({"source": {"path": "a"}, "limit": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_are_refused_before_anything_runs(config, message):
    with pytest.raises(ValidationError, match=message):
        NormalizeConfig.model_validate(config)
