"""Stores made to do harm: each command that meets the harm says what and where, and nothing outside the store is
opened, listed, written or deleted."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts import open_store
from artifacts.disk import UNSYNCED
from flows.cli import main
from tests.artifacts.hostile_stores import (
    FINGERPRINT,
    Hostile,
    Spoil,
    a_pickle,
    alias,
    claim,
    deep_folders,
    extra,
    first_file,
    lease_for_ever,
    linked,
    made_from_each_other,
    make_huge,
    make_socket,
    manifest,
    marker,
    raw,
    record,
    run,
    special,
    sub_link_in_tmp,
)
from tests.artifacts.touches import touches

KIND = "verify ls plan path show export import"
INDEX = "verify plan lineage export import gc"
ALL = "verify ls plan path lineage show export import gc"
CONTENT, MANIFEST = "verify path export import", "verify path show export import"
KEEPING, VERIFY, NONE = "verify gc", "verify", ""
"""Which commands meet an artifact's content, its manifest, what says what to keep, or what only counts if right."""

STORES: dict[str, tuple[Spoil, str, str]] = {
    "nothing": (lambda hostile: None, NONE, ""),
    "artifacts is a link": (linked("artifacts", "folder"), ALL, r"artifacts is a link to '.*/outside/folder'"),
    "tmp is a link": (linked("tmp", "folder"), ALL, r"tmp is a link"),
    "scratch is a link": (linked("scratch", "folder"), ALL, r"scratch is a link"),
    "lock is a link": (linked("lock", "new"), ALL, r"lock is a link"),
    "a kind is a link": (linked("artifacts/model", "folder"), KIND, r"artifacts/model is a link"),
    "an artifact is a link": (linked("{model}", "folder"), MANIFEST, r"is a link"),
    "a payload is a link": (linked("{model}/files", "folder"), CONTENT, r"not a folder|is a link to"),
    "a folder of a payload is a link": (linked("{model}/files/sub", "folder"), CONTENT, r"sub"),
    "a file of a payload is a link": (linked("{model}/files/sub/weights", "secret"), CONTENT, r"not a regular file"),
    "a manifest is a link": (linked("{model}/manifest.json", "secret"), MANIFEST, r"no regular file"),
    "an index is a link": (linked("index/sft", "folder"), INDEX, r"index/sft is a link"),
    "records are behind a link": (linked(f"index/sft/{FINGERPRINT}", "folder"), VERIFY, r"no regular file"),
    "work is behind a link": (linked(f"work/{FINGERPRINT}", "folder"), VERIFY, r"is a link"),
    "aliases are behind a link": (linked("aliases/more", "folder"), NONE, r"more"),
    "a left-over is a link": (sub_link_in_tmp, NONE, ""),
    "../ in a manifest": (first_file(path="../../../../../outside/secret"), MANIFEST, r"not a plain relative path"),
    "an absolute name": (first_file(path="/etc/passwd"), MANIFEST, r"not a plain relative path"),
    "a NUL in a name": (first_file(path="a\0b"), MANIFEST, r"control character"),
    "an escape sequence in a name": (first_file(path="a\x9b2Jb"), MANIFEST, r"control character"),
    "a long name": (first_file(path="x" * 300), MANIFEST, r"too long"),
    "a decomposed name": (first_file(path="e\u0301"), MANIFEST, r"form NFC"),
    "names that collide by case": (
        manifest(files=[{"path": name, "size": 0, "sha256": "0" * 64} for name in ("A", "a")]), MANIFEST, r"case"),
    "a file twice": (manifest(files=[{"path": "a", "size": 0, "sha256": "0" * 64}] * 2), MANIFEST, r"twice"),
    "no files": (manifest(files=[]), MANIFEST, r"no file"),
    "files that are numbers": (manifest(files=[1, 2]), MANIFEST, r"not a manifest"),
    "a size that is a fraction": (first_file(size=2.0), MANIFEST, r"size 2.0"),
    "a size beyond all disks": (first_file(size=10**400), MANIFEST, r"size 1000"),
    "a size below nothing": (first_file(size=-1), MANIFEST, r"size -1"),
    "a manifest of another version": (manifest(format=2), MANIFEST, r"format 2; this posttrain reads 1"),
    "a manifest of no kind": (manifest(kind=["model"]), MANIFEST, r"manifest of"),
    "a manifest of another kind": (manifest(kind="dataset"), MANIFEST, r"manifest of"),
    "a producer that is a list": (manifest(producer=[]), MANIFEST, r"producer is list"),
    "inputs that are a text": (manifest(producer={"inputs": "x"}), MANIFEST, r"producer\.inputs is str"),
    "inputs of numbers": (manifest(producer={"inputs": {"model": [1]}}), MANIFEST, r"not an id"),
    "a manifest without end": (raw("manifest", b"[" * 200_000), MANIFEST, r"damaged"),
    "a manifest with NaN": (raw("manifest", b'{"format": NaN, "seal": ""}'), MANIFEST, r"damaged"),
    "a manifest with a key twice": (raw("manifest", b'{"format": 1, "format": 1, "seal": ""}'), MANIFEST, r"damaged"),
    "a manifest of a terabyte": (special(make_huge, "manifest"), MANIFEST, r"1099511627776 bytes"),
    "a manifest that is a pipe": (special(os.mkfifo, "manifest"), MANIFEST, r"no regular file"),
    "a manifest that is a socket": (special(make_socket, "manifest"), MANIFEST, r"no regular file"),
    "a payload that is a pipe": (special(os.mkfifo), CONTENT, r"not a regular file"),
    "a payload that is a socket": (special(make_socket), CONTENT, r"not a regular file"),
    "a payload of a terabyte": (special(make_huge), CONTENT, r"1099511627776 bytes instead of 50"),
    "one file more": (extra("evil.py"), CONTENT, r"evil\.py: does not belong there"),
    "one file more, to steer the terminal": (extra("\x1b[2J"), CONTENT, r"'\\x1b\[2J': does not belong there"),
    "folders without end": (deep_folders, "verify path export import gc", r"File name too long"),
    "a pickle": (a_pickle, NONE, ""),
    "artifacts made from each other": (made_from_each_other, NONE, ""),
    "a record of another stage": (record(stage="rl"), VERIFY, r"is a record of"),
    "a record of another fingerprint": (record(fingerprint="cd" * 32), VERIFY, r"is a record of"),
    "a record that leads outside": (record(outputs={"m": {"kind": "../x", "id": "0" * 64}}), VERIFY, r"not a record"),
    "outputs that are a list": (record(outputs=[1]), VERIFY, r"outputs is list"),
    "an identity that is a text": (record(identity="x"), VERIFY, r"identity is str"),
    "a provenance that is null": (record(provenance=None), VERIFY, r"provenance is null"),
    "an alias of another name": (alias("team/other", name="team/model"), KEEPING, r"is the alias 'team/model'"),
    "an alias to nowhere": (alias("team/other", id="../../outside"), KEEPING, r"not an alias"),
    "an alias to a number": (alias("team/other", id=5), KEEPING, r"not an alias"),
    "an alias that steers the terminal": (alias("\x1b[2J"), KEEPING, r"a name that no alias has"),
    "a run whose stages are a list": (run("r2", stages=[1]), VERIFY, r"not what a run writes"),
    "a run whose outputs are a text": (run("r2", stages={"a": {"outputs": "x"}}), VERIFY, r"not what a run writes"),
    "a run that steers the terminal": (run("\x1b[2J"), VERIFY, r"not the id of a run"),
    "a claim without an owner": (claim(artifacts=[], process=5), KEEPING, r"not a claim"),
    "a claim on a number": (claim(artifacts=[{"id": 5}], process="x"), KEEPING, r"not a claim"),
    "leases for ever": (lease_for_ever, NONE, ""),
    "a marker of another step": (marker(step=8), VERIFY, r"of another folder"),
    "a marker that leads outside": (
        marker(files=[{"path": "../../../../outside/secret", "size": 16, "sha256": "0" * 64}]), VERIFY, r"no marker"),
    "a marker of numbers": (marker(files=[1]), VERIFY, r"no marker"),
}  # fmt: skip
"""What was done -> (how, the commands that must refuse, what they say)."""

COMMANDS: dict[str, Callable[[Hostile, str, Path], list[str]]] = {
    "verify": lambda hostile, store, folder: ["verify", "--store", store],
    "ls": lambda hostile, store, folder: ["ls", "--json", "--store", store],
    "plan": lambda hostile, store, folder: ["plan", str(folder / "small.yaml"), "--store", store],
    "path": lambda hostile, store, folder: ["path", hostile.model.id, "--store", store],
    "lineage": lambda hostile, store, folder: ["lineage", "@team/model", "--store", store],
    "show": lambda hostile, store, folder: ["show", "@team/model", "--json", "--store", store],
    "export": lambda hostile, store, folder: ["export", hostile.model.id, str(folder / "out"), "--store", store],
    "import": lambda hostile, store, folder: ["import", store, "--store", str(folder / "target")],
    "gc": lambda hostile, store, folder: [
        "gc", "--delete", "--keep-runs", "0", "--keep-days", "0", "--grace-hours", "1", "--store", store],
}  # fmt: skip


@pytest.mark.parametrize("name", STORES)
def test_a_hostile_store(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(UNSYNCED, "1")
    spoil, refusing, words = STORES[name]
    hostile = Hostile(tmp_path)
    request.addfinalizer(hostile.remove)
    spoil(hostile)
    hostile.age()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    inputs = {"model": "@team/model", "dataset": f"@{hostile.dataset.id}"}
    recipe = {"name": "small", "stages": {"sft": {"uses": "sft", "inputs": inputs}}}
    (tmp_path / "small.yaml").write_text(json.dumps(recipe))
    refused, before = [], everything(hostile.outside)
    with touches(hostile.outside) as found:
        for command, arguments in COMMANDS.items():
            capsys.readouterr()
            status = main(arguments(hostile, str(hostile.root), tmp_path))
            out, err = capsys.readouterr()
            assert "unexpected" not in err, err
            assert "\x1b" not in out + err
            if status:
                refused.append(command)
                assert re.search(words, out + err), err
    assert refused == refusing.split()
    assert found == []
    assert everything(hostile.outside) == before
    assert not (tmp_path / "work" / "ran").exists()
    target = open_store(str(tmp_path / "target"))
    assert not any(problem for artifact in target.artifacts() for problem in target.verify(artifact))


def everything(folder: Path) -> dict[str, object]:
    """Path -> kind, times, links and content of all below a folder."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = os.lstat(path)
        content = path.read_bytes() if path.is_file() and status.st_size < 1e6 else None
        found[str(path)] = (status.st_mode, status.st_nlink, status.st_mtime_ns, status.st_size, content)
    return found
