"""Every form that people keep rows in, and the typed rows it must give."""

import csv
import json
from hashlib import sha256

import pyarrow
import pytest

from artifacts.errors import DataError
from tests.stages.normalized import Normalized, assistant, system, user, write_jsonl

TALK = [user("a"), assistant("b"), user("c"), assistant("d")]
SHARE = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def normalized(tmp_path, rows, **config):
    return Normalized(tmp_path, write_jsonl(tmp_path / "in" / "rows.jsonl", rows), **config)


FORMS = {
    "text": ({"text": "a b"}, "auto", {"text": "a b"}, "language_modeling"),
    "messages": ({"messages": TALK}, "auto", {"messages": TALK}, "language_modeling"),
    "messages as JSON text": ({"messages": json.dumps(TALK)}, "auto", {"messages": TALK}, "language_modeling"),
    "from and value, as JSON text": (
        {"messages": json.dumps(SHARE)},
        "prompt_completion",
        {"prompt": [user("a")], "completion": [assistant("b")]},
        "prompt_completion",
    ),
    "from and value": ({"conversations": SHARE}, "auto", {"messages": TALK[:2]}, "language_modeling"),
    "messages as a question and its answer": (
        {"messages": TALK},
        "prompt_completion",
        {"prompt": TALK[:3], "completion": TALK[3:]},
        "prompt_completion",
    ),
    "a prompt of messages": ({"messages": [user("a")]}, "prompt", {"prompt": [user("a")]}, "prompt"),
    "question and answer as one text": (
        {"prompt": "a ", "completion": "b"},
        "language_modeling",
        {"text": "a b"},
        "language_modeling",
    ),
    "prompt": ({"prompt": "a", "answer": 3}, "auto", {"prompt": "a", "answer": 3}, "prompt"),
    "Alpaca with input": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        "auto",
        {"prompt": [user("Add.\n\n1, 2")], "completion": [assistant("3")]},
        "prompt_completion",
    ),
    "Alpaca without": (
        {"instruction": "Hi.", "input": "", "output": "Ho."},
        "auto",
        {"prompt": [user("Hi.")], "completion": [assistant("Ho.")]},
        "prompt_completion",
    ),
    "transcript": (
        {"text": "\n\nHuman: a\n\nstill a\n\nAssistant: b"},
        "auto",
        {"messages": [user("a\n\nstill a"), assistant("b")]},
        "language_modeling",
    ),
    "hh-rlhf": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
        },
        "auto",
        {"prompt": TALK[:3], "chosen": [assistant("d")], "rejected": [assistant("e")]},
        "preference",
    ),
    "a transcript that waits for its answer": (
        {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " c"},
        "auto",
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        "preference",
    ),
    "explicit preference": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5},
        "auto",
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5},
        "preference",
    ),
    # the two conversations part after the user's first message, though they share the assistant's too
    "implicit prompt ends with the user": (
        {"chosen": TALK, "rejected": [*TALK[:2], user("x"), assistant("y")]},
        "auto",
        {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [TALK[1], user("x"), assistant("y")]},
        "preference",
    ),
    # TRL's own example: the space before the split belongs to the completions
    "implicit prompt of text": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "auto",
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        "preference",
    ),
    "one text begins with the other": (
        {"chosen": "abc", "rejected": "abcd"},
        "auto",
        {"prompt": "ab", "chosen": "c", "rejected": "cd"},
        "preference",
    ),
    "UltraFeedback: the prompt again in both": (
        {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        "auto",
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        "preference",
    ),
    "triple preference": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "reference": "d", "source": "x"},
        "triple_preference",
        {"prompt": "a", "chosen": "b", "rejected": "c", "reference": "d", "source": "x"},
        "triple_preference",
    ),
    "triple preference, the prompt again in all three": (
        {
            "prompt": "a",
            "chosen": TALK[:2],
            "rejected": [user("a"), assistant("c")],
            "reference": [user("a"), assistant("e")],
        },
        "triple_preference",
        {
            "prompt": [user("a")],
            "chosen": [assistant("b")],
            "rejected": [assistant("c")],
            "reference": [assistant("e")],
        },
        "triple_preference",
    ),
    "a column `reference` alone makes no triple": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "reference": "a book"},
        "auto",
        {"prompt": "a", "chosen": "b", "rejected": "c", "reference": "a book"},
        "preference",
    ),
    "privileged context": (
        {"prompt": "a", "privileged_context": "b", "source": "x"},
        "auto",
        {"prompt": "a", "privileged_context": "b", "source": "x"},
        "privileged_context",
    ),
    "privileged context of text beside messages": (
        {"prompt": [user("a")], "privileged_context": "b"},
        "auto",
        {"prompt": [user("a")], "privileged_context": [user("b")]},
        "privileged_context",
    ),
    "privileged context of messages in any order": (
        {"prompt": [user("a")], "privileged_context": [assistant("b"), assistant("c"), user("d")]},
        "privileged_context",
        {"prompt": [user("a")], "privileged_context": [assistant("b"), assistant("c"), user("d")]},
        "privileged_context",
    ),
    "steps": (
        {"prompt": "a", "completions": ["b", "c"], "labels": [True, False], "id": 7},
        "auto",
        {"prompt": "a", "completions": ["b", "c"], "labels": [True, False], "id": 7},
        "stepwise_supervision",
    ),
    "steps with labels as numbers": (
        {"prompt": "a", "completions": ["b", "c"], "labels": [1, 0]},
        "stepwise_supervision",
        {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
        "stepwise_supervision",
    ),
    "unpaired": (
        {"prompt": "a", "completion": "b", "label": True},
        "auto",
        {"prompt": "a", "completion": "b", "label": True},
        "unpaired_preference",
    ),
    "unpaired with labels as text": (
        {"messages": TALK[:2], "label": "false"},
        "unpaired_preference",
        {"prompt": [user("a")], "completion": [assistant("b")], "label": False},
        "unpaired_preference",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_form(tmp_path, name):
    row, wanted, expected, kind = FORMS[name]
    made = normalized(tmp_path, [row], type=wanted)
    assert made.rows() == [expected]
    assert (made.dataset().type, made.dataset().columns[0]) == (kind, "row_id")
    assert made.ledger()["states"] == {"used": 1} and made.ledger()["changes"] == {}


def test_system_message_goes_only_where_there_is_none(tmp_path):
    rows = [{"messages": TALK}, {"messages": [system("x"), *TALK]}]
    made = normalized(tmp_path, rows, system="Be brief.")
    assert [row["messages"][0] for row in made.rows()] == [system("Be brief."), system("x")]


def test_message_fields_that_are_left_out_are_counted(tmp_path):
    rows = [{"messages": [{**user("a"), "name": "Ann", "weight": None}, {**assistant("b"), "id": 3}]}]
    made = normalized(tmp_path, rows)
    assert made.rows() == [{"messages": TALK[:2]}]
    assert made.ledger()["changes"] == {"message fields left out: id, name": 1}
    assert made.ledger()["examples"] == {"message fields left out: id, name": [{"row": "row 1", "detail": "messages"}]}


def test_useless_rows_are_dropped_by_reason(tmp_path):
    good = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    rows = [
        good,
        {**good, "rejected": [assistant("b")]},
        {**good, "prompt": [user("")]},
    ]
    made = normalized(tmp_path, rows)
    assert made.ledger()["states"] == {
        "filtered: chosen equals rejected": 1,
        "filtered: empty text": 1,
        "used": 1,
    }
    implicit = [
        {"chosen": TALK[:2], "rejected": [user("a"), assistant("x")]},
        {"chosen": TALK[:2], "rejected": TALK[:2]},
        {"chosen": TALK[:2], "rejected": [user("other"), assistant("x")]},
    ]
    made = normalized(tmp_path / "implicit", implicit)
    assert made.ledger()["states"] == {
        "filtered: chosen and rejected share no prompt": 1,
        "filtered: chosen equals rejected": 1,
        "used": 1,
    }


def test_bad_rows_can_be_dropped_and_counted(tmp_path):
    rows = [{"messages": TALK}, {"messages": TALK[:3]}, {"messages": TALK[1:]}, {"other": 1}]
    made = normalized(tmp_path, rows, on_bad_row="drop")
    assert made.ledger()["states"] == {
        "bad row: field 'messages': a language_modeling row has no 'messages'": 1,
        "bad row: field 'messages': the conversation does not end with the assistant": 1,
        "bad row: field 'messages': wrong role order: it must begin with the user": 1,
        "used": 1,
    }
    detail = (
        "field 'messages': the conversation does not end with the assistant; "
        "found user, assistant, user; cut what stands after its last message"
    )
    assert made.ledger()["examples"]["bad row: field 'messages': the conversation does not end with the assistant"] == [
        {"row": "row 2", "detail": detail}
    ]


def test_the_log_names_the_file_the_row_and_the_field_of_what_was_dropped(tmp_path):
    """One line a kind of fault; where it stands inside of a column does not make another kind."""
    unknown = {"role": "narrator", "content": "x"}
    rows = [{"messages": TALK}, {"messages": [unknown, *TALK]}, {"messages": [*TALK[:1], unknown]}, {"messages": 3}]
    made = normalized(tmp_path, rows, on_bad_row="drop")
    file = tmp_path / "in" / "rows.jsonl"
    said = made.logged()
    assert said[0] == ("4 rows: 1 used; 3 dropped: bad row")
    assert said[1].startswith(
        f"bad row, 2 of this kind, the first: {file} row 2: field 'messages[0]': unknown role; found 'narrator'; roles"
    )
    assert said[2] == (
        f"bad row, 1 of this kind, the first: {file} row 4: field 'messages': must be text or a list of messages; "
        "found a whole number; correct the row"
    )


def test_what_is_wrong_is_told_of_the_column_that_the_file_has(tmp_path):
    rows = [{"talk": TALK}, {"talk": [user("a"), {"role": "narrator", "content": "x"}]}]
    with pytest.raises(DataError, match=r"row 2: field 'messages\[1\]' \(column 'talk'\): unknown role"):
        normalized(tmp_path, rows, columns={"messages": "talk"})
    with pytest.raises(DataError, match=r"row 2: field 'a': missing column; found columns b; name one of these"):
        normalized(tmp_path / "1", [{"a": "x", "b": "y"}, {"b": "y"}], columns={"prompt": "a", "a": "b"})
    with pytest.raises(DataError, match=r"'talk' looks like a conversation: name it with `columns: {messages: talk}`"):
        normalized(tmp_path / "2", rows)


def test_a_conversation_that_is_to_be_prompt_and_completion(tmp_path):
    rows = [{"messages": TALK}, {"messages": []}, {"messages": TALK[:3]}]
    states = normalized(tmp_path, rows, type="prompt_completion", on_bad_row="drop").ledger()["states"]
    assert states == {
        "used": 1,
        "bad row: field 'messages': a conversation without messages": 1,
        "bad row: field 'messages': the conversation does not end with the assistant": 1,
    }


def test_empty_lines_are_no_rows(tmp_path):
    """At the end or amid the others, and whatever the line ends; rows keep the numbers of their lines."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n \t\r\n\r\n')
    made = Normalized(tmp_path, path)
    assert [row["text"] for row in made.rows()] == ["a", "b"]
    assert made.ledger()["states"] == {"used": 2}
    digest = sha256(path.read_bytes()).hexdigest()
    ids = [sha256(f"{digest}:{index}".encode()).hexdigest()[:24] for index in (0, 2)]
    assert [row["row_id"] for row in made.rows(ids=True)] == ids
    path.write_bytes(b"\n \n")
    with pytest.raises(DataError, match=r"a\.jsonl is empty: it has no row"):
        Normalized(tmp_path / "none", path)
    path.write_bytes(b'\n{"text": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl row 2: field 'text': must be text"):
        Normalized(tmp_path / "second", path)


def test_empty_lines_of_tables_are_no_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\r\na,b\r\n\r\nc,d\r\n \r\n\r\n")
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert Normalized(tmp_path, path).rows() == rows


@pytest.mark.parametrize("name", ["rows.jsonl.zst", "rows.csv.zst", "rows.jsonl.gz"])
def test_compressed_files(tmp_path, name):
    content = {"jsonl": b'{"text": "\xc3\xa4"}\n{"text": "b"}\n', "csv": b"text\n\xc3\xa4\nb\n"}[name.split(".")[1]]
    kind = {"gz": "gzip", "zst": "zstd"}[name.split(".")[2]]
    packed = pyarrow.compress(content, codec=kind, asbytes=True)
    path = tmp_path / name
    path.write_bytes(packed)
    assert Normalized(tmp_path, path).rows() == [{"text": "\u00e4"}, {"text": "b"}]
    path.write_bytes(packed[:-9])
    with pytest.raises(DataError, match=rf"{name} row \d: the {kind} file is damaged or cut off: .*; get it again"):
        Normalized(tmp_path / "cut", path)


@pytest.mark.parametrize("holds", ["[", "{"])
def test_a_byte_order_mark_before_json(tmp_path, holds):
    """Windows writes it; what is called .json may hold a list or JSON lines."""
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + {"[": b'[{"text": "a"}]', "{": b'{"text": "a"}\n'}[holds])
    assert Normalized(tmp_path, path).rows() == [{"text": "a"}]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("float('inf')", r"a number must be finite; found inf; write null; on_bad_row: drop"),
        ("{'a': ['\\ud800']}", r"half of a surrogate pair \(.*\); found .*; remove it; on_bad_row: drop"),
        ("{'a': {1, 2}}", r"a dataset keeps text.*; found a set; convert it, or name the columns"),
    ],
)
def test_a_value_that_a_dataset_cannot_hold_is_named_by_its_column(tmp_path, value, said):
    """Only functions and tables give such values."""
    lines = ["def rows():", "    yield {'text': 'a'}", f"    yield {{'text': 'b', 'score': {value}}}"]
    (tmp_path / "code.py").write_text("\n".join(lines))
    source = {"function": f"{tmp_path}/code.py:rows"}
    with pytest.raises(DataError, match=rf"code.py:rows row 2: field 'score': {said}"):
        Normalized(tmp_path, source)
    assert Normalized(tmp_path / "dropped", source, on_bad_row="drop").rows() == [{"text": "a"}]


def test_columns_of_other_types_stay_as_they_are(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": {"model": "x"}, "messages": None, "text": 3}
    assert normalized(tmp_path, [row]).rows() == [row]


def test_messages_in_a_table(tmp_path):
    """A table's cell can hold no list: messages are JSON text there, as tools are."""
    rows = [TALK, [system("x"), user('a, "b"'), assistant("c\nd")]]
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in" / "rows.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["messages"], *([json.dumps(row)] for row in rows)])
    assert Normalized(tmp_path, tmp_path / "in" / "rows.csv").rows() == [{"messages": row} for row in rows]
