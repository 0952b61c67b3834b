"""From every source and form to the same typed rows; splits, samples, duplicates and filters."""

import gzip
import hashlib
import json
import random
import subprocess
import sys

import fsspec
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.external import data_identity, folder_digest
from tests.stages.normalized import Normalized, assistant, system, user, write_jsonl
from tests.stages.small_models import logged

QA = [{"prompt": f"question {i}", "completion": f"answer {i}", "score": i} for i in range(7)]


def test_row_ids_follow_from_the_file_and_the_index(tmp_path):
    path = write_jsonl(tmp_path / "qa.jsonl", QA)
    found = Normalized(tmp_path, path).rows(ids=True)
    digest = hashlib.sha256((tmp_path / "qa.jsonl").read_bytes()).hexdigest()
    assert [row["row_id"] for row in found] == [
        hashlib.sha256(f"{digest}:{i}".encode()).hexdigest()[:24] for i in range(7)
    ]
    assert [{key: row[key] for key in QA[0]} for row in found] == QA


def test_golden(tmp_path):
    """Fails when the same rows would come out differently: raise the stage's version, then these digests."""
    talks = [("2+2?", "4", 1), ("Größe 日本?", "ja\n", None), ("2+2?", "4", 1), ("1+1?", "2", 2.5)]
    rows = [
        {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}], "n": n}
        for asked, said, n in talks
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    made = Normalized(tmp_path, path, test_size=1, system="Be brief.", seed=3)
    assert made.digest("train") == "d141fc9f810153d978434787e905ce938b298d00fe5d881b758ee3be3cdb341d"
    assert made.digest("test") == "2cba357fb95e90fb8822177d4663712b2a208c61de4d4141209680a2e3883864"
    assert made.ledger("train") == {
        "input": 4,
        "states": {"duplicate": 1, "in the test split": 1, "used": 2},
        "changes": {},
        "truncated_tokens": 0,
        "examples": {"duplicate": [{"row": "row 3", "detail": ""}]},
    }
    assert logged(tmp_path / "job") == ["4 rows: 2 train, 1 test; 1 dropped: duplicate"]


@pytest.fixture
def each_format(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", QA)
    (folder / "lines.json").write_bytes((folder / "a.jsonl").read_bytes())
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    (folder / "a.json").write_text(json.dumps(QA, indent=2))
    header = "prompt,completion,score\n"
    (folder / "a.csv").write_text(header + "".join(f'"question {i}",answer {i},{i}\n' for i in range(7)))
    (folder / "a.tsv").write_text((folder / "a.csv").read_text().replace(",", "\t"))
    table = pyarrow.Table.from_pylist(QA)
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    with pyarrow.ipc.new_file(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    with pyarrow.ipc.new_stream(folder / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    return folder


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "lines.json", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "stream.arrow"],
)
def test_every_file_format_gives_the_same_rows(tmp_path, each_format, name):
    expected = QA if "sv" not in name else [{**row, "score": str(row["score"])} for row in QA]
    assert Normalized(tmp_path, each_format / name).rows() == expected


def test_saved_datasets(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(QA)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "two")
    assert Normalized(tmp_path / "a", tmp_path / "one").rows() == QA
    assert Normalized(tmp_path / "b", {"path": str(tmp_path / "two"), "split": "test"}).rows() == [QA[1]]
    memory = fsspec.filesystem("memory")
    for name, split in (("one", None), ("two", "test")):
        memory.put(str(tmp_path / name), f"/saved/{name}", recursive=True)
        there = Normalized(tmp_path / "far" / name, {"path": f"memory://saved/{name}", "split": split})
        assert there.rows() == (QA if split is None else [QA[1]])
        # one content has one digest, wherever it lies
        assert data_identity(f"memory://saved/{name}") == {"sha256": folder_digest(tmp_path / name)}
        assert data_identity(str(tmp_path / name)) == data_identity(f"memory://saved/{name}")


def test_folders_globs_and_urls(tmp_path, each_format):
    folder = tmp_path / "parts"
    for index, name in enumerate(["b.jsonl", "a.jsonl", "c.jsonl"]):
        write_jsonl(folder / name, QA[index * 2 : index * 2 + 2])
    (folder / "README.md").write_text("not rows")
    ordered = QA[2:4] + QA[0:2] + QA[4:6]  # by name: a, b, c
    made = Normalized(tmp_path / "1", folder)
    assert made.rows() == ordered
    parts = json.loads((made.out / "train" / "dataset.json").read_bytes())["source"]["parts"]
    assert [(part["name"], part["rows"]) for part in parts] == [("a.jsonl", 2), ("b.jsonl", 2), ("c.jsonl", 2)]
    assert Normalized(tmp_path / "2", f"{folder}/[ab].jsonl").rows() == ordered[:4]
    assert Normalized(tmp_path / "3", f"file://{folder}/a.jsonl").rows() == QA[2:4]
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.jsonl.gz", (each_format / "a.jsonl.gz").read_bytes())
    memory.pipe("/bucket/b.parquet", (each_format / "a.parquet").read_bytes())
    assert Normalized(tmp_path / "4", "memory://bucket/b.parquet").rows() == QA
    both = Normalized(tmp_path / "5", "memory://bucket/*")
    assert both.rows() == QA and both.ledger()["states"] == {"duplicate": 7, "used": 7}
    assert not list((tmp_path / "5" / "job").glob("scratch-0/*"))


def test_files_of_equal_content_keep_different_row_ids(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / "parts" / name, QA)
    made = Normalized(tmp_path, tmp_path / "parts", deduplicate=False)
    assert len({row["row_id"] for row in made.rows(ids=True)}) == 14


def test_python_functions(tmp_path):
    (tmp_path / "rows.py").write_text(
        "def rows(count):\n"
        "    for i in range(count):\n"
        "        yield {'prompt': f'p{i}', 'completion': (f'c{i}')}\n"
        "def pairs(row, suffix):\n"
        "    if row['score'] == 0: return None\n"
        "    if row['score'] == 1: return {'prompt': 'one', 'completion': suffix}\n"
        "    return [{'prompt': row['prompt'], 'completion': suffix + str(k)} for k in range(2)]\n"
        "def even(row): return row['score'] % 2 == 0\n"
    )
    made = Normalized(tmp_path / "1", {"function": f"{tmp_path}/rows.py:rows", "arguments": {"count": 2}})
    assert made.rows() == [{"prompt": "p0", "completion": "c0"}, {"prompt": "p1", "completion": "c1"}]
    path = write_jsonl(tmp_path / "qa.jsonl", QA[:3])
    source = {"path": path, "function": f"{tmp_path}/rows.py:pairs", "arguments": {"suffix": "x"}}
    made = Normalized(tmp_path / "2", source)
    assert [row["completion"] for row in made.rows()] == ["x", "x0", "x1"]
    assert made.ledger()["states"] == {"filtered: rows.py:pairs": 1, "used": 3}
    assert made.ledger()["examples"] == {"filtered: rows.py:pairs": [{"row": "row 1", "detail": "gave no row"}]}
    assert len({row["row_id"] for row in made.rows(ids=True)}) == 3
    kept = Normalized(tmp_path / "3", path, filters={"keep": f"{tmp_path}/rows.py:even"})
    assert [row["score"] for row in kept.rows()] == [0, 2]
    assert kept.ledger()["states"] == {"filtered: rows.py:even": 1, "used": 2}


def test_columns_templates_and_system(tmp_path):
    rows = [{"q": "2+2?", "a": {"text": "4"}, "level": 3, "other": [1]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    made = Normalized(tmp_path / "1", path, columns={"prompt": "q", "completion": "a.text"}, keep_columns=["level"])
    assert made.rows() == [{"prompt": "2+2?", "completion": "4", "level": 3}]
    templates = {
        "prompt": [{"role": "user", "content": "Level {level}: {q} {{x}}"}],
        "completion": [{"role": "assistant", "content": "It is {a.text}."}],
    }
    made = Normalized(tmp_path / "2", path, templates=templates, keep_columns=[], system="Be brief.")
    prompt = [system("Be brief."), user("Level 3: 2+2? {x}")]
    assert made.rows() == [{"prompt": prompt, "completion": [assistant("It is 4.")]}]
    made = Normalized(tmp_path / "3", path, templates={"text": "{q} {a.text}"}, keep_columns=[])
    assert made.rows() == [{"text": "2+2? 4"}] and made.dataset().type == "language_modeling"


def test_duplicates_and_length_filters_are_counted_with_examples(tmp_path):
    rows = [{"text": "aa", "id": 1}, {"text": "bbb", "id": 2}, {"text": "aa", "id": 1}, {"text": "aa", "id": 3}]
    rows += [{"text": "c" * 9, "id": 4}, {"text": "d", "id": 5}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    bounds = {"min_characters": 2, "max_characters": 8}
    made = Normalized(tmp_path / "1", path, filters=bounds)
    assert [row["id"] for row in made.rows()] == [1, 2, 3]
    assert made.ledger()["states"] == {
        "duplicate": 1, "filtered: max_characters": 1, "filtered: min_characters": 1, "used": 3,
    }  # fmt: skip
    assert made.ledger()["examples"]["filtered: max_characters"] == [{"row": "row 5", "detail": "9 characters"}]
    made = Normalized(tmp_path / "2", path, deduplicate=["text"], filters=bounds)
    assert [row["id"] for row in made.rows()] == [1, 2]
    assert logged(tmp_path / "2" / "job") == [
        "6 rows: 2 used; 4 dropped: 2 duplicate, 1 filtered: max_characters, 1 filtered: min_characters"
    ]
    assert len(Normalized(tmp_path / "3", path, deduplicate=False, filters={}).rows()) == 6
    assert logged(tmp_path / "3" / "job") == []


def test_limit_and_split_depend_on_content_and_seed_not_on_order(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(60)]
    shuffled = list(rows)
    random.Random(0).shuffle(shuffled)
    first = write_jsonl(tmp_path / "a.jsonl", rows)
    second = write_jsonl(tmp_path / "b.jsonl", shuffled)

    def texts(folder, path, name="train", **config):
        return [row["text"] for row in Normalized(tmp_path / folder, path, **config).rows(name)]

    sample = texts("1", first, limit=10)
    assert len(sample) == 10 and sample != [row["text"] for row in rows[:10]]
    assert sample == sorted(sample, key=lambda text: int(text[4:]))  # the source's order is kept
    assert sorted(texts("2", second, limit=10)) == sorted(sample)
    assert sorted(texts("3", first, limit=10, seed=1)) != sorted(sample)
    assert set(sample) < set(texts("4", first, limit=20))
    held = texts("5", first, "test", test_size=0.2)
    assert len(held) == 12 and sorted(texts("6", second, "test", test_size=12)) == sorted(held)
    assert set(texts("7", first, test_size=0.2)) == {row["text"] for row in rows} - set(held)


@settings(max_examples=25)
@given(
    problems=st.lists(st.integers(0, 9), min_size=6, max_size=40).filter(lambda ids: len(set(ids)) > 4),
    fraction=st.sampled_from([0.3, 0.5]),
    limit=st.sampled_from([None, 30]),
    seed=st.integers(0, 5),
)
def test_groups_stay_on_one_side_and_every_row_has_one_state(tmp_path_factory, problems, fraction, limit, seed):
    folder = tmp_path_factory.mktemp("groups")
    rows = [
        {"prompt": f"p{problem}", "completion": f"{i % 17}", "problem": problem} for i, problem in enumerate(problems)
    ]
    path = write_jsonl(folder / "a.jsonl", rows)
    largest = max(problems.count(problem) for problem in problems)
    config = {
        "test_size": max(largest, round(fraction * len(rows))),
        "group_by": "problem",
        "limit": limit,
        "seed": seed,
    }
    if config["test_size"] >= len({json.dumps(row) for row in rows}):
        return
    made = Normalized(folder, path, **config)
    sides = {name: {row["problem"] for row in made.rows(name)} for name in ("train", "test")}
    assert sides["test"] and sides["train"] and not sides["train"] & sides["test"]
    for name, other in (("train", "test"), ("test", "train")):
        states = made.ledger(name)["states"]
        assert made.ledger(name)["input"] == len(rows)
        assert states["used"] == len(made.rows(name)) and states[f"in the {other} split"] == len(made.rows(other))


def test_same_bytes_again_and_no_path_of_the_machine(tmp_path):
    path = write_jsonl(tmp_path / "qa.jsonl", [*QA, {"prompt": "", "completion": "x", "score": 1}])
    first, second = (Normalized(tmp_path / name, path, test_size=2, limit=6) for name in "ab")
    for name in ("train", "test"):
        for file in ("data.parquet", "dataset.json", "ledger.json"):
            data = (first.out / name / file).read_bytes()
            assert data == (second.out / name / file).read_bytes()
            assert str(tmp_path).encode() not in data


def test_config_and_stage_import_nothing_heavy():
    code = (
        "import sys, stages.normalize, stages.init_model; "
        "print([name for name in ('torch', 'transformers', 'pyarrow', 'datasets', 'prefect') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_run_imports_neither_torch_nor_transformers(tmp_path):
    path = write_jsonl(tmp_path / "qa.jsonl", QA)
    code = (
        "import sys; from pathlib import Path; from tests.stages.normalized import Normalized; "
        f"Normalized(Path({str(tmp_path)!r}), {path!r}, test_size=2); "
        "print([name for name in ('torch', 'transformers', 'prefect') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
