"""Room that things take, copies from store to store, and the check of everything."""

import os
import shutil

import pytest

from artifacts import Artifact, Record, RequestError, Store, open_store, seal
from artifacts.digest import canonical_json, sha256_bytes
from artifacts.inspection import inspect
from artifacts.transfer import export, import_
from artifacts.usage import Row, usage

FINGERPRINT = "ab" * 32


def make(store: Store, fill, content: str, stage: str, *inputs: Artifact, kind: str = "model") -> Artifact:
    """An artifact of `len(content)` bytes with the record of how it was made."""
    named = {f"input{position}": artifact.digest for position, artifact in enumerate(inputs)}
    identity = {"stage": stage, "version": 1, "config": {"content": content}, "inputs": named}
    artifact = store.put(kind, fill({"a": content.encode()}), producer=identity, metrics={"loss": 0.5})
    fingerprint = sha256_bytes(canonical_json(identity))
    store.append_record(Record(stage, fingerprint, identity, {"out": artifact}, {"loss": 0.5}))
    return artifact


def payload_bytes(store: Store, *artifacts: Artifact) -> int:
    """Files and manifests, by the store's own listing."""
    return sum(stored.size for found in artifacts for stored in store.files.tree(found.key).values())


def test_what_is_shared_counts_once_in_the_total_and_in_nobodys_own(store, fill):
    data = make(store, fill, "d" * 5000, "normalize", kind="dataset")
    base = make(store, fill, "b" * 300, "init_model")
    one = make(store, fill, "1" * 7000, "sft", base, data)
    two = make(store, fill, "2" * 9000, "sft", base)
    alone = make(store, fill, "3" * 100, "sft")
    store.set_alias("x/one", one)
    store.set_alias("x/two", two)
    for run, recipe, made in (("r1", "x", [one]), ("r2", "x", [two]), ("r3", "y", [one])):
        stages = {str(index): {"outputs": {"out": found.to_json()}} for index, found in enumerate(made)}
        store.write_run(run, {"recipe": recipe, "stages": stages})
    store.checkpoints(FINGERPRINT).save(1, fill({"state": b"s" * 1000}))
    store.shards("cd" * 32).save("ef" * 32, b"[1]")

    def size(*artifacts: Artifact) -> int:
        return payload_bytes(store, *artifacts)

    found = usage(store)
    everything = (data, base, one, two, alone)
    assert (found.artifacts, found.size) == (5, size(*everything))
    assert found.tables["kind"] == [
        Row("model", 4, size(base, one, two, alone), size(base, one, two, alone)),
        Row("dataset", 1, size(data), size(data)),
    ]
    assert {row.name: row.artifacts for row in found.tables["stage"]} == {"normalize": 1, "init_model": 1, "sft": 3}
    assert set(found.tables["alias"]) == {
        Row("@x/one", 3, size(one, base, data), size(one, data)),
        Row("@x/two", 2, size(two, base), size(two)),
    }
    assert set(found.tables["run"]) == {
        Row("r1", 3, size(one, base, data), 0),
        Row("r2", 2, size(two, base), size(two)),
        Row("r3", 3, size(one, base, data), 0),
    }
    assert set(found.tables["recipe"]) == {
        Row("x", 4, size(one, two, base, data), size(two)),
        Row("y", 3, size(one, base, data), 0),
    }
    assert found.others["checkpoints"] > 1000 and found.others["rewards"] == 3
    assert {"index", "runs", "aliases"} <= set(found.others)


def test_what_is_exported_is_cached_where_it_is_imported(store, fill, tmp_path):
    data = make(store, fill, "rows", "normalize", kind="dataset")
    model = make(store, fill, "weights", "sft", data)
    other = make(store, fill, "other", "sft")
    moved = export(store, [model], tmp_path / "out", lineage=True)
    assert moved.copied == (data, model) and moved.there == () and moved.records == 2
    again = export(store, [model], tmp_path / "out", lineage=True)
    assert again.copied == () and set(again.there) == {data, model} and again.records == 0
    assert all(store.verify(artifact) == [] for artifact in (data, model)), "the first store keeps its files"

    target = open_store(str(tmp_path / "target"))
    moved = import_(target, tmp_path / "out")
    assert set(moved.copied) == {data, model} and moved.records == 2
    assert set(target.artifacts()) == {data, model} and other not in set(target.artifacts())
    for artifact in (data, model):
        assert target.verify(artifact) == []
        assert target.files.read(f"{artifact.key}/manifest.json") == store.files.read(f"{artifact.key}/manifest.json")
    fingerprint = sha256_bytes(canonical_json(dict(store.manifest(model).producer)))
    found = target.lookup("sft", fingerprint)
    assert found is not None and found.outputs == {"out": model} and found.metrics == {"loss": 0.5}
    assert import_(target, tmp_path / "out").copied == () and len(target.records("sft", fingerprint)) == 1
    assert list(target.scratch.iterdir()) == [], "nothing is left of the copying"


def make_pair(store: Store, fill, config: str, *inputs: Artifact) -> tuple[Artifact, Artifact, str]:
    """Model and rollouts of one work, and its fingerprint; the bytes do not depend on `config`."""
    named = {f"input{position}": artifact.digest for position, artifact in enumerate(inputs)}
    identity = {"stage": "rl", "version": 1, "config": {"content": config}, "inputs": named}
    model = store.put("model", fill({"a": b"policy"}), producer=identity)
    rollouts = store.put("dataset", fill({"a": b"rollouts"}), producer=identity)
    fingerprint = sha256_bytes(canonical_json(identity))
    outputs = {"model": model, "rollouts": rollouts}
    store.append_record(Record("rl", fingerprint, identity, outputs, provenance={"stage_name": "grpo"}))
    return model, rollouts, fingerprint


def test_with_lineage_every_work_behind_it_is_cached_with_all_its_outputs(store, fill, tmp_path):
    """The judge reads the model only; a record counts with all outputs, so the rollouts come along. A later work of
    other settings wrote the same bytes: it is cached there too. One from other inputs is not of this lineage."""
    base, other = make(store, fill, "base", "sft"), make(store, fill, "other", "sft")
    model, rollouts, first = make_pair(store, fill, "1", base)
    *_, second = make_pair(store, fill, "2", base)
    judge = make(store, fill, "score", "evaluate", model, kind="evaluation")
    make(store, fill, "not asked for", "evaluate", rollouts, kind="evaluation")
    *_, third = make_pair(store, fill, "3", other)
    moved = export(store, [judge], tmp_path / "out", lineage=True)
    assert set(moved.copied) == {base, model, rollouts, judge} and moved.left_out == ()
    target = open_store(str(tmp_path / "target"))
    assert import_(target, tmp_path / "out").left_out == ()
    for fingerprint in (first, second):
        found = target.lookup("rl", fingerprint)
        assert found is not None and found.outputs == {"model": model, "rollouts": rollouts}
    assert other not in set(target.artifacts()) and target.lookup("rl", third) is not None


def test_an_output_that_another_stage_needs_brings_what_that_was_made_from(store, fill, tmp_path):
    """The rollouts were stored first by another work, from data that the model does not need."""
    data, base = make(store, fill, "rows", "normalize", kind="dataset"), make(store, fill, "base", "sft")
    rollouts = make(store, fill, "rollouts", "normalize", data, kind="dataset")
    model, same, _ = make_pair(store, fill, "1", base)
    assert same == rollouts
    moved = export(store, [model], tmp_path / "out", lineage=True)
    assert set(moved.copied) == {data, base, rollouts, model} and moved.records == 4


def test_what_is_needed_is_there_before_what_needs_it(store, fill, tmp_path):
    """The data is needed by the base and, nearer, by the model itself. The base's bytes were made from the same
    bytes, as by a work that changes nothing: that is no reason to go on for ever."""
    data = make(store, fill, "rows", "normalize", kind="dataset")
    same = make(open_store(str(tmp_path / "elsewhere")), fill, "base", "sft")
    base = make(store, fill, "base", "sft", same, data)
    model = make(store, fill, "weights", "preference", data, base)
    assert same == base
    assert export(store, [model], tmp_path / "out", lineage=True).copied == (data, base, model)


def test_a_record_that_stays_behind_is_named(store, fill, tmp_path):
    model, rollouts, _ = make_pair(store, fill, "1")
    said = ("grpo: its output rollouts",)
    assert export(store, [model], tmp_path / "one").left_out == said
    store.files.remove(rollouts.key, first="manifest.json")  # as gc does
    moved = export(store, [model], tmp_path / "two", lineage=True)
    assert (moved.copied, moved.records, moved.left_out) == ((model,), 0, said)


def test_without_lineage_only_the_artifact_goes(store, fill, tmp_path):
    data = make(store, fill, "rows", "normalize", kind="dataset")
    model = make(store, fill, "weights", "sft", data)
    assert export(store, [model], tmp_path / "out").copied == (model,)
    assert set(open_store(str(tmp_path / "out")).artifacts()) == {model}


def exported(tmp_path, fill):
    source = open_store(str(tmp_path / "source"))
    model = make(source, fill, "weights", "sft")
    export(source, [model], tmp_path / "out")
    return model, tmp_path / "out" / model.key


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone", "more", "link", "manifest", "../"])
def test_a_folder_that_is_not_as_it_says_gives_nothing(harm, store, fill, tmp_path):
    model, folder = exported(tmp_path, fill)
    file = folder / "files/a"
    if harm in ("flipped", "cut", "link"):
        file.unlink()
    if harm == "flipped":
        file.write_bytes(b"Weights")
    elif harm == "cut":
        file.write_bytes(b"weight")
    elif harm == "gone":
        file.unlink()
        (folder / "files/b").write_bytes(b"weights")
    elif harm == "more":
        (folder / "files/b").write_bytes(b"")
    elif harm == "link":
        (tmp_path / "secret").write_bytes(b"weights")
        file.symlink_to(tmp_path / "secret")
    else:
        text = (folder / "manifest.json").read_bytes()
        manifest = folder / "manifest.json"
        manifest.unlink()
        if harm == "../":
            row = {"path": "../a", "size": 7, "sha256": sha256_bytes(b"weights")}
            manifest.write_bytes(seal({"format": 1, "kind": "model", "id": model.id, "files": [row], "producer": {},
                                       "metrics": {}, "counts": {}, "versions": {}}))  # fmt: skip
        else:
            manifest.write_bytes(text.replace(b'"loss": 0.5', b'"loss": 0.1'))
    with pytest.raises(Exception) as caught:
        import_(store, tmp_path / "out")
    assert type(caught.value).__name__ in ("DamagedError", "StoreError"), caught.value
    assert list(store.artifacts()) == [] and store.files.tree("index") == {}


def test_only_exported_folders_are_taken_and_nothing_else_is_written_over(store, fill, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(RequestError, match="no exported folder"):
        import_(store, tmp_path / "mine")
    model = make(store, fill, "weights", "sft")
    with pytest.raises(RequestError, match="holds something else"):
        export(store, [model], tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_nothing_is_written_into_a_folder_that_is_imported(tmp_path, fill):
    model, _ = exported(tmp_path, fill)
    shutil.rmtree(tmp_path / "out/tmp")
    before = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*"))
    assert import_(open_store(str(tmp_path / "target")), tmp_path / "out").copied == (model,)
    assert sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")) == before


def problems(store: Store) -> dict[str, tuple[str, ...]]:
    return {found.what: found.problems for found in inspect(store) if found.problems}


def test_everything_is_inspected_and_what_is_damaged_is_named(store, fill):
    model = make(store, fill, "weights", "sft")
    store.set_alias("best", model)
    store.write_run("run-1", {"state": "ok"})
    store.claim("run-2", [model])
    store.checkpoints(FINGERPRINT).save(1, fill({"state": b"s" * 100, "sub/more": b"m"}))
    store.shards(FINGERPRINT).save("rows-0", b"[]")
    whole = list(inspect(store))
    expected = ["artifact", "record", "alias", "run", "claim", "checkpoint", "shard"]
    assert [found.what for found in whole] == expected and not problems(store)
    [record] = [found.name for found in whole if found.what == "record"]
    [checkpoint] = [found.name for found in whole if found.what == "checkpoint"]
    shard = f"work/{FINGERPRINT}/shards/rows-0.{sha256_bytes(b'[]')}"
    places = {
        "artifact": f"{model.key}/files/a",
        "record": record,
        "alias": "aliases/best.json",
        "run": "runs/run-1.json",
        "claim": "claims/run-2.json",
        "checkpoint": f"{checkpoint}/state",
        "shard": shard,
    }
    for what, key in places.items():
        data = store.files.read(key)
        store.files.write(key, bytes([data[0] ^ 1]) + data[1:])
        assert set(problems(store)) == {what}, what
        store.files.write(key, data)
    assert not problems(store)
    store.files.remove(model.key, first="manifest.json")
    assert set(problems(store)) == {"alias"}


def test_artifacts_are_listed_newest_first(tmp_path, fill):
    store = open_store(str(tmp_path / "store"))
    made = [make(store, fill, str(number), "sft", kind=kind) for number, kind in enumerate(("model", "dataset") * 2)]
    for age, artifact in enumerate(reversed(made)):
        os.utime(store.files.path(artifact.key), (10**9 - age, 10**9 - age))
    assert store.newest_first() == made[::-1]
    assert store.newest_first("dataset") == [made[3], made[1]] and store.newest_first("model") == [made[2], made[0]]


def test_every_store_lists_them(store, fill):
    made = {make(store, fill, str(number), "sft") for number in range(3)}
    assert set(store.newest_first()) == made and store.newest_first("dataset") == []
