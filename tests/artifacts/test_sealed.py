"""Canonical JSON, sealed files, secrets."""

import json
import subprocess
import sys
import traceback

import pytest

from artifacts import DamagedError, Record, StoreError, canonical_json, open_store, scrub, seal, unseal
from artifacts.digest import collisions, path_problem

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


def test_canonical_json_has_one_text_for_one_value():
    assert canonical_json({"b": (1, 2.5), "a": {"ä": None}}) == '{"a":{"ä":null},"b":[1,2.5]}'.encode()
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})
    with pytest.raises(TypeError):
        canonical_json({1: "a"})
    with pytest.raises(TypeError):
        canonical_json({"a": {1, 2}})


def test_a_seal_survives_reading_and_nothing_else():
    payload = {"a": [1, "ä", None, True, 1.5], "b": {}}
    data = seal(payload)
    assert unseal(data, "x") == payload
    for other in (
        b"",
        b"[]",
        b"null",
        data + b" ",
        data.replace(b"\n", b""),
        json.dumps(payload).encode(),
        b"[" * 99999,
    ):
        with pytest.raises(DamagedError, match="x is damaged"):
            unseal(other, "x")


def test_paths():
    assert path_problem("a/b c/ä.txt") is None
    for path in ("", "/a", "a/", "a//b", "./a", "a/..", "a\\b", "a\x00", "\ud800", None, 3):
        assert path_problem(path) is not None
    assert collisions(["a", "b/A", "b/c"]) == []
    assert (
        len(collisions(["a", "A"])) == 1 and len(collisions(["a/x", "A/y"])) == 1 and len(collisions(["a", "a/b"])) == 1
    )


def test_scrubbed_text_holds_no_secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    text = scrub(f"GET http://me:pass@host/x?X-Amz-Signature=abc123&a=1 {SECRET} http://host/y@z")
    assert text == "GET http://***@host/x?X-Amz-Signature=***&a=1 *** http://host/y@z"


def test_no_secret_of_the_environment_is_kept(monkeypatch, tmp_path, fill):
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    store = open_store(str(tmp_path / "store"))
    producer = {"config": {"key": SECRET, "url": f"https://user:{SECRET}@host/"}, "argv": ["--key", SECRET]}
    artifact = store.put("model", fill({"a": b"1"}), producer=producer, metrics={SECRET: 1})
    store.append_record(Record("sft", "ab" * 32, producer, {"model": artifact}, provenance=producer))
    store.write_run("r", producer)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert len(files) == 4
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert store.manifest(artifact).producer["argv"] == ["--key", "***"]


def test_no_secret_is_in_an_error_or_its_traceback(monkeypatch, s3_environment):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:passwordpassword@127.0.0.1:9")
    with pytest.raises(StoreError) as caught:
        open_store("s3://bucket/x", answer_seconds=2)
    text = "".join(traceback.format_exception(caught.value))
    assert SECRET not in text and "passwordpassword" not in text


def test_the_package_imports_nothing_heavy():
    heavy = "torch", "prefect", "transformers", "datasets", "fsspec", "s3fs", "pyarrow", "numpy"
    code = f"import sys, artifacts; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
