"""Every damage is found before the content is used, named, and mended by the stage that runs again."""

import logging
import random

import pytest

from artifacts import DamagedError, Record, open_store, seal, unseal

FILES = {"weights.bin": bytes(range(256)) * 40, "sub/config.json": b'{"a": 1}'}
FINGERPRINT = "ab" * 32

DAMAGES = {
    "one bit": lambda data: data[:5000] + bytes([data[5000] ^ 4]) + data[5001:],
    "cut": lambda data: data[:4096],
    "appended": lambda data: data + b"\0",
    "zeroed tail": lambda data: data[:7680] + bytes(len(data) - 7680),
    "empty": lambda data: b"",
    "missing": None,
}
SAME_SIZE = ("one bit", "zeroed tail")


def harm(store, key, damage):
    change = DAMAGES[damage]
    data = store.files.read(key)
    store.files.delete(key)
    if change is not None:
        assert change(data) != data
        store.files.write(key, change(data))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_payload_is_found_named_and_mended(url, store, fill, damage):
    artifact = store.put("model", fill(FILES), producer={})
    store.append_record(Record("sft", FINGERPRINT, outputs={"model": artifact}))
    harm(store, f"{artifact.key}/files/weights.bin", damage)
    # sizes are what a look-up sees
    assert (store.lookup("sft", FINGERPRINT) is None) == (damage not in SAME_SIZE)
    with pytest.raises(DamagedError, match=r"weights\.bin"):
        store.materialize(artifact)
    # now everyone knows, so that the stage runs again
    assert open_store(url).lookup("sft", FINGERPRINT) is None
    [problem] = store.verify(artifact)
    assert "weights.bin" in problem
    store.put("model", fill(FILES), producer={})
    assert store.lookup("sft", FINGERPRINT) is not None and store.verify(artifact) == []
    assert (store.materialize(artifact) / "weights.bin").read_bytes() == FILES["weights.bin"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds_it_without_anyone_having_used_it(store, fill, damage):
    artifact = store.put("model", fill(FILES), producer={})
    harm(store, f"{artifact.key}/files/weights.bin", damage)
    [problem] = store.verify(artifact)
    assert "weights.bin" in problem and not store.is_intact(artifact)


def test_what_does_not_belong_there_is_found_and_taken_away(store, fill):
    artifact = store.put("model", fill(FILES), producer={})
    store.files.write(f"{artifact.key}/files/evil.py", b"import os")
    assert store.verify(artifact) == [f"{artifact}: evil.py: does not belong there"]
    store.put("model", fill(FILES), producer={})
    assert store.verify(artifact) == []


def test_two_files_that_changed_places_are_found(store, fill):
    artifact = store.put("model", fill({"a": b"1", "b": b"2"}), producer={})
    for name, data in (("a", b"2"), ("b", b"1")):
        store.files.delete(f"{artifact.key}/files/{name}")
        store.files.write(f"{artifact.key}/files/{name}", data)
    assert len(store.verify(artifact)) == 2


def test_a_manifest_in_another_folder_is_not_believed(store, fill):
    one, two = (store.put("model", fill({"a": data}), producer={}) for data in (b"1", b"2"))
    store.files.write(f"{two.key}/manifest.json", store.files.read(f"{one.key}/manifest.json"))
    with pytest.raises(DamagedError, match="is the manifest of"):
        store.manifest(two)
    assert not store.is_intact(two)


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "a/../../b", "a//b", "a\\b", "", "a\nb", "e\u0301", "x" * 300]
)
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path, fill, path):
    store = open_store(str(tmp_path / "store"))
    artifact = store.put("model", fill({"a": b"1"}), producer={})
    key = f"{artifact.key}/manifest.json"
    value = unseal(store.files.read(key), "")
    value["files"][0]["path"] = path
    store.files.write(key, seal(value))
    with pytest.raises(DamagedError, match="no artifact may hold"):
        store.materialize(artifact)


def test_every_byte_of_manifest_record_and_marker_counts(tmp_path, fill, caplog):
    store = open_store(str(tmp_path / "store"))
    artifact = store.put("model", fill({"a": b"1"}), producer={"stage": "sft"}, metrics={"loss": 0.25})
    store.append_record(Record("sft", FINGERPRINT, outputs={"model": artifact}, metrics={"loss": 0.25}))
    store.checkpoints(FINGERPRINT).save(7, fill({"state": b"7"}))
    [record] = store.files.tree(f"index/sft/{FINGERPRINT}")
    [saved] = store.files.children(f"work/{FINGERPRINT}/checkpoints")
    keys = {
        f"{artifact.key}/manifest.json": lambda: store.is_intact(artifact),
        f"index/sft/{FINGERPRINT}/{record}": lambda: bool(store.records("sft", FINGERPRINT)),
        f"work/{FINGERPRINT}/checkpoints/{saved}/DONE.json": lambda: store.checkpoints(FINGERPRINT).latest_step(),
    }
    rng = random.Random(0)
    caplog.set_level(logging.ERROR)
    for key, counts in keys.items():
        path = store.files.path(key)
        whole = path.read_bytes()
        assert counts()
        for position in range(len(whole)):
            flipped = whole[position] ^ (1 << rng.randrange(8))
            path.write_bytes(whole[:position] + bytes([flipped]) + whole[position + 1 :])
            assert not counts(), (key, position)
        for length in range(0, len(whole), 7):
            path.write_bytes(whole[:length])
            assert not counts(), (key, length)
        path.write_bytes(whole)
        assert counts()


def test_a_damaged_cache_of_a_remote_store_is_fetched_again(fill, tmp_path, cache):
    store = open_store(f"memory://{tmp_path.name}")
    artifact = store.put("model", fill(FILES), producer={})
    folder = store.materialize(artifact)
    assert folder.is_relative_to(cache) and (folder / "weights.bin").stat().st_mode & 0o222 == 0
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").write_bytes(b"short")
    (folder / "extra").write_bytes(b"")
    again = store.materialize(artifact)
    assert again == folder and sorted(path.name for path in again.iterdir()) == ["sub", "weights.bin"]
    assert (again / "weights.bin").read_bytes() == FILES["weights.bin"]


def test_bits_flipped_at_random_are_all_found_and_nothing_else_is(tmp_path, fill, caplog):
    caplog.set_level(logging.ERROR)
    store = open_store(str(tmp_path / "store"))
    artifact = store.put("model", fill(FILES), producer={})
    path = store.materialize(artifact) / "weights.bin"
    whole, rng = path.read_bytes(), random.Random(1)
    path.chmod(0o644)
    for _ in range(100):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert store.verify(artifact)
        path.write_bytes(whole)
        assert store.verify(artifact) == []
