"""What every store promises, on a local disk, in memory and on a real S3 server."""

import hashlib
import json
import logging
import shutil
import sys
import time

import pytest

from artifacts import (
    Artifact,
    DamagedError,
    FileEntry,
    MissingError,
    Record,
    RequestError,
    StoreError,
    digest_of,
    open_store,
)
from artifacts.sealed import LARGEST_BYTES

FILES = {"config.json": b'{"a": 1}', "weights/part 1.bin": bytes(range(256)) * 300, "empty": b"", "ä.txt": b"x"}
FINGERPRINT = "ab" * 32
OTHER = "cd" * 32


def independent_digest(files):
    """The digest as the documentation defines it, without any code of ours."""
    rows = [[path, len(data), hashlib.sha256(data).hexdigest()] for path, data in sorted(files.items())]
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_put_comes_back_under_the_digest_of_its_content(store, fill):
    artifact = store.put("model", fill(FILES), producer={"stage": "sft"}, metrics={"loss": 0.5}, counts={"n": 3})
    assert artifact == Artifact("model", independent_digest(FILES))
    assert content(store.materialize(artifact)) == FILES
    manifest = store.manifest(artifact)
    assert manifest.metrics == {"loss": 0.5} and manifest.counts == {"n": 3}
    assert manifest.producer == {"stage": "sft"} and "torch" in manifest.versions
    assert digest_of(manifest.files) == artifact.digest and manifest.size == sum(map(len, FILES.values()))
    assert list(store.artifacts()) == [artifact] and store.verify(artifact) == []


def test_another_process_sees_it(url, store, fill):
    artifact = store.put("dataset", fill(FILES), producer={})
    assert content(open_store(url).materialize(artifact)) == FILES


def test_putting_the_same_again_changes_nothing_but_its_age(store, fill):
    first = store.put("model", fill(FILES), producer={"stage": "first"})
    before = store.files.tree(first.key)
    again = store.put("model", fill(FILES), producer={"stage": "second"})
    assert again == first and store.manifest(first).producer == {"stage": "first"}
    assert {path: one.size for path, one in before.items()} == {
        path: one.size for path, one in store.files.tree(first.key).items()
    }
    assert store.files.tree(first.key)["manifest.json"].modified >= before["manifest.json"].modified


def test_a_folder_with_another_content_is_another_artifact(store, fill):
    one = store.put("model", fill({"a": b"1"}), producer={})
    assert one != store.put("model", fill({"a": b"2"}), producer={})
    assert one != store.put("model", fill({"b": b"1"}), producer={})
    assert one.digest == store.put("dataset", fill({"a": b"1"}), producer={}).digest


def test_what_is_not_there_is_missing(store):
    absent = Artifact("model", OTHER)
    with pytest.raises(MissingError, match="is not in"):
        store.manifest(absent)
    with pytest.raises(MissingError):
        store.materialize(absent)
    assert not store.is_intact(absent) and store.lookup("sft", FINGERPRINT) is None
    assert store.records("sft", FINGERPRINT) == [] and store.stage_records("sft") == []
    assert store.aliases() == {} and store.runs() == [] and list(store.artifacts()) == []


def test_records_come_newest_first_and_lookup_takes_the_newest_whole_one(store, fill, caplog):
    artifacts = [store.put("model", fill({"a": bytes([i])}), producer={}) for i in range(3)]
    for i, artifact in enumerate(artifacts):
        store.append_record(Record("sft", FINGERPRINT, {"config": {"i": i}}, {"model": artifact}, {"loss": float(i)}))
    store.append_record(Record("sft", OTHER, outputs={"model": artifacts[0]}))
    store.append_record(Record("rl", FINGERPRINT))
    assert [record.metrics["loss"] for record in store.records("sft", FINGERPRINT)] == [2.0, 1.0, 0.0]
    assert [record.fingerprint for record in store.stage_records("sft")] == [OTHER] + [FINGERPRINT] * 3
    found = store.lookup("sft", FINGERPRINT)
    assert found.outputs == {"model": artifacts[2]} and found.identity == {"config": {"i": 2}}
    store.files.delete(f"{artifacts[2].key}/files/a")
    with caplog.at_level(logging.WARNING):
        assert store.lookup("sft", FINGERPRINT).outputs == {"model": artifacts[1]}
    assert "a: missing" in caplog.text
    store.files.delete(f"{artifacts[1].key}/manifest.json")
    assert store.lookup("sft", FINGERPRINT).outputs == {"model": artifacts[0]}


def test_references(store, fill):
    one, two = (store.put(kind, fill({"a": b"1"}), producer={}) for kind in ("dataset", "model"))
    store.set_alias("team/best", one)
    store.set_alias("team/best", two)
    assert store.aliases() == {"team/best": two}
    assert store.find("@team/best") == store.find("team/best") == two
    with pytest.raises(RequestError, match="may be 2 artifacts: dataset/sha256:"):
        store.find(one.id)
    for reference in (f"dataset/{one.digest[:8]}", f"dataset/{one.id}", f"dataset/sha256:{one.digest[:20]}"):
        assert store.find(reference) == one
    three = store.put("model", fill({"a": b"2"}), producer={})
    for reference in (three.id, f"@{three.id}", three.digest[:8], f"sha256:{three.digest[:9]}"):
        assert store.find(reference) == three
    with pytest.raises(RequestError, match=r"did you mean @team/best\?"):
        store.find("@team/bst")
    for unknown in ("sha256:" + "0" * 64, "@" + three.digest[:8] + "zz", three.digest[:7], "", "../x"):
        with pytest.raises(RequestError, match="there is no artifact"):
            store.find(unknown)
    for name in ("", "/a", "a/../b", "deadbeef", "a b", ".hidden"):
        with pytest.raises(RequestError, match="not a name"):
            store.set_alias(name, one)
    with pytest.raises(MissingError):
        store.set_alias("x", Artifact("model", OTHER))


def test_runs(store):
    store.write_run("2026-1", {"state": "running"})
    store.write_run("2026-2", {"state": "ok", "seconds": 1.5})
    store.write_run("2026-1", {"state": "failed"})
    assert store.read_run("2026-1") == {"state": "failed"} and set(store.runs()) == {"2026-1", "2026-2"}
    with pytest.raises(RequestError, match="did you mean '2026-2'"):
        store.read_run("2026-22")
    with pytest.raises(RequestError, match="not the id of a run"):
        store.write_run("../x", {})


def test_lineage_follows_inputs_to_what_is_outside(store, fill):
    data = store.put("dataset", fill({"rows": b"1"}), producer={"stage": "normalize", "fingerprint": OTHER})
    inputs = {
        "dataset": [data.to_json(), {"artifact": data.id, "kind": "dataset"}, data.id],
        "model": {"hub": "owner/name", "digest": OTHER},
        "gone": {"kind": "model", "id": f"sha256:{OTHER}"},
    }
    model = store.put("model", fill({"w": b"1"}), producer={"stage": "sft", "inputs": inputs})
    tree = store.lineage(model)
    leaf = {
        "artifact": data.id,
        "kind": "dataset",
        "stage": "normalize",
        "fingerprint": OTHER,
        "inputs": {},
    }
    assert tree["stage"] == "sft" and tree["inputs"]["dataset"] == [leaf] * 3
    assert tree["inputs"]["model"]["source"] == {"hub": "owner/name", "digest": OTHER}
    assert "is not in" in tree["inputs"]["gone"]["note"]


def test_a_stage_that_wrote_what_it_had_read_does_not_go_round(store, fill):
    digest = independent_digest({"a": b"1"})
    own = Artifact("dataset", digest)
    store.put("dataset", fill({"a": b"1"}), producer={"stage": "normalize", "inputs": {"dataset": own.to_json()}})
    assert "further up" in store.lineage(own)["inputs"]["dataset"]["note"]


def test_checkpoints_keep_the_newest_and_skip_the_damaged(store, fill, caplog):
    checkpoints = store.checkpoints(FINGERPRINT, keep=2)
    assert checkpoints.latest() is None and checkpoints.latest_step() is None
    for step in (10, 20, 30):
        checkpoints.save(step, fill({"state.json": b"%d" % step, "rank0/w": bytes([step]) * 100}))
    names = store.files.children(f"work/{FINGERPRINT}/checkpoints")
    assert [int(name[:10]) for name in names] == [20, 30]
    step, folder = store.checkpoints(FINGERPRINT).latest()
    assert step == 30 == checkpoints.latest_step() and (folder / "state.json").read_bytes() == b"30"
    # one byte of the newest, at equal size: only its content shows it
    if not store.is_local:
        shutil.rmtree(folder)
    store.files.write(f"work/{FINGERPRINT}/checkpoints/{names[1]}/rank0/w", b"\0" + bytes([30]) * 99)
    with caplog.at_level(logging.WARNING):
        step, folder = checkpoints.latest()
    assert step == 20 and (folder / "rank0/w").read_bytes() == bytes([20]) * 100
    assert names[1] in caplog.text and "rank0/w: sha256" in caplog.text
    # work goes on from there; the damaged one is never counted among those that are kept
    checkpoints.save(25, fill({"state.json": b"25"}))
    assert checkpoints.latest()[0] == 25
    kept = [int(name[:10]) for name in store.files.children(f"work/{FINGERPRINT}/checkpoints")]
    assert {20, 25} <= set(kept)
    checkpoints.clear()
    assert checkpoints.latest() is None and store.files.tree(f"work/{FINGERPRINT}/checkpoints") == {}


@pytest.mark.parametrize("harm", ["no marker", "torn marker", "no file", "short file"])
def test_an_unfinished_checkpoint_does_not_count(store, fill, harm):
    checkpoints = store.checkpoints(FINGERPRINT)
    for step in (1, 2):
        checkpoints.save(step, fill({"state": b"%d" % step * 50}))
    newest = f"work/{FINGERPRINT}/checkpoints/{store.files.children(f'work/{FINGERPRINT}/checkpoints')[1]}"
    if harm == "no marker":
        store.files.delete(f"{newest}/DONE.json")
    elif harm == "torn marker":
        store.files.write(f"{newest}/DONE.json", store.files.read(f"{newest}/DONE.json")[:-20])
    elif harm == "no file":
        store.files.delete(f"{newest}/state")
    else:
        store.files.write(f"{newest}/state", b"2" * 49)
    assert checkpoints.latest_step() == 1 and checkpoints.latest()[0] == 1


def test_shards(store):
    shards = store.shards(FINGERPRINT)
    assert shards.names() == set()
    shards.save("rows.0-99", b"one")
    shards.save("rows.100-199", b"")
    shards.save("rows.0-99", b"two")
    assert shards.names() == {"rows.0-99", "rows.100-199"}
    assert shards.load("rows.0-99") == b"two" and shards.load("rows.100-199") == b""
    name = f"work/{FINGERPRINT}/shards/rows.0-99.{hashlib.sha256(b'two').hexdigest()}"
    store.files.write(name, b"twO")
    with pytest.raises(DamagedError, match=r"rows\.0-99"):
        shards.load("rows.0-99")
    shards.save("rows.0-99", b"two")
    assert shards.load("rows.0-99") == b"two"
    with pytest.raises(MissingError):
        shards.load("rows")
    with pytest.raises(RequestError, match="shard's name"):
        shards.save("a/b", b"")
    shards.clear()
    assert shards.names() == set()


def test_numbers_that_json_does_not_have_become_null(store, fill):
    artifact = store.put("model", fill({"a": b"1"}), producer={}, metrics={"x": float("nan"), "y": [float("inf")]})
    assert store.manifest(artifact).metrics == {"x": None, "y": [None]}


def test_swap_has_one_winner_and_age_is_the_stores(store):
    assert store.files.age("work/x") is None
    assert store.files.swap("work/x", None, b"1") and not store.files.swap("work/x", None, b"2")
    assert not store.files.swap("work/x", b"0", b"2") and store.files.swap("work/x", b"1", b"2")
    assert not store.files.swap("work/absent", b"1", b"2")
    assert store.files.read("work/x") == b"2" and 0 <= store.files.age("work/x") < 60


def test_an_empty_folder_is_refused(store, fill):
    with pytest.raises(StoreError, match="no file in it"):
        store.put("model", fill({}), producer={})


@pytest.mark.parametrize("stage", ["", "a/b", "..", "0"])
def test_names_that_would_leave_the_store_are_refused(store, stage):
    with pytest.raises(RequestError):
        store.records(stage, FINGERPRINT)
    with pytest.raises(RequestError):
        store.checkpoints("../../x")


def test_a_wrong_reference_is_no_artifact():
    assert FileEntry("a", 1, OTHER) < FileEntry("b", 0, OTHER)
    with pytest.raises(RequestError):
        Artifact("model", "../" * 21 + "x")


def test_lookups_do_not_wait(store):
    waits = []
    sys.setprofile(lambda frame, event, called: waits.append(frame) if called is time.sleep else None)
    try:
        assert store.lookup("sft", FINGERPRINT) is None
    finally:
        sys.setprofile(None)
    assert waits == []


def test_what_is_read_as_a_whole_has_a_limit(store, fill, caplog):
    store.files.write("work/x", b"12345")
    assert store.files.read("work/x", 5) == b"12345"
    with pytest.raises(DamagedError, match=r"work/x has .*(4|5) bytes; nothing that is read as a whole is so large"):
        store.files.read("work/x", 4)
    artifact = store.put("model", fill(FILES), producer={})
    # more than a manifest may have, though it is well-formed JSON
    store.files.write(f"{artifact.key}/manifest.json", b'"' + b" " * LARGEST_BYTES + b'"')
    with pytest.raises(DamagedError, match=r"manifest\.json has (more than )?6710886\d bytes"):
        store.materialize(artifact)
    store.files.delete(f"{artifact.key}/damaged.json")
    with caplog.at_level(logging.WARNING):
        assert not store.is_intact(artifact) and "manifest.json has" in caplog.text


@pytest.mark.parametrize("url", ["memory", "s3"], indirect=True)
def test_no_more_than_the_limit_comes_over_the_net(url, monkeypatch):
    files = open_store(url).files
    files.write("work/x", b"x" * 1000)
    arrived, fetch = [], files.fs.cat_file
    monkeypatch.setattr(files.fs, "cat_file", lambda *given, **how: arrived.append(fetch(*given, **how)) or arrived[-1])
    with pytest.raises(DamagedError, match="more than 10 bytes"):
        files.read("work/x", 10)
    assert list(map(len, arrived)) == [11]


def test_touching_makes_young_and_brings_nothing_back(store):
    store.files.write("work/x", b"1")
    before = store.files.tree("work")["x"]
    store.files.touch("work/x")
    after = store.files.tree("work")["x"]
    assert store.files.read("work/x") == b"1" and after.size == before.size and after.modified >= before.modified
    assert abs(store.files.now() - after.modified) < 60
    store.files.delete("work/x")
    with pytest.raises(FileNotFoundError):
        store.files.touch("work/x")
    assert store.files.tree("work") == {}
