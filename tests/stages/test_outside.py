"""Stamps of files and tags of remote ones: what is hashed again, and what is known without being read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from artifacts.digest import sha256_bytes, sha256_file
from artifacts.errors import StageError
from stages import outside
from stages.external import argument_identity, resolve_reference
from stages.held import Held, content_in_force
from stages.identity import Named
from stages.outside import Outside, stamp_of
from stages.rollouts.reward_cache import reward_identity
from stages.rollouts.reward_spec import RewardSpec


class Tagged(MemoryFileSystem):
    """Files in memory, with the tags that S3 has; its listings are as old as the last `invalidate_cache`."""

    protocol = "tagged"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    known: ClassVar[dict[str, Any]] = {}

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        found = super().info(path, **options)
        fresh = {**found, "ETag": sha256_bytes(self.store[found["name"]].getvalue())}
        return self.known.setdefault(path, fresh)

    def invalidate_cache(self, path: str | None = None) -> None:
        self.known.clear()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is hashed, in order; files are old enough for a stamp."""
    found: list[str] = []
    content_of = outside.content_of
    monkeypatch.setattr(outside, "content_of", lambda *what: found.append(what[1]) or content_of(*what))
    monkeypatch.setattr(outside, "RACY_SECONDS", -60.0)
    return found


def test_a_file_as_young_as_the_clock_is_coarse_has_no_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    written, times = path.stat().st_ctime, {1.0: False, 1.99: False, 2.1: True}
    for age, stamped in times.items():
        monkeypatch.setattr(outside.time, "time", lambda age=age: written + age)
        assert (stamp_of("data", str(path)) is not None) == stamped


@pytest.mark.parametrize("kind", ["data", "folder", "argument"])
def test_another_file_of_equal_name_size_and_time_has_another_stamp(
    tmp_path: Path, hashed: list[str], kind: str
) -> None:
    path, other = tmp_path / "given" / "rows.jsonl", tmp_path / "other"
    path.parent.mkdir()
    path.write_text('{"a": 1}\n')
    seen = Outside()
    first = seen.look(kind, str(path.parent))
    assert seen.look_again(kind, str(path.parent)) == first and len(hashed) == 1
    other.write_text('{"a": 2}\n')
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)
    assert seen.look(kind, str(path.parent)) == first  # who planned means what was there
    assert seen.look_again(kind, str(path.parent)).content != first.content and len(hashed) == 2
    (path.parent / "more.jsonl").write_text("{}\n")
    assert seen.look_again(kind, str(path.parent)).stamp is not None and len(hashed) == 3


def test_remote_files_are_known_by_their_tags(hashed: list[str]) -> None:
    """And read again where their file system has none."""
    fsspec.register_implementation("tagged", Tagged, clobber=True)
    for scheme, times in {"tagged": 1, "memory": 2}.items():
        hashed.clear()
        seen, url = Outside(), f"{scheme}://held/rows.jsonl"
        with fsspec.open(url, "w") as file:
            file.write("{}\n")
        first = seen.look("data", url)
        assert seen.look_again("data", url).content == first.content and len(hashed) == times
        with fsspec.open(url, "w") as file:
            file.write("[]\n")
        assert seen.look_again("data", url).content["sha256"] == sha256_bytes(b"[]\n")


def test_what_the_plan_saw_goes_to_the_process_as_json(tmp_path: Path, hashed: list[str]) -> None:
    (tmp_path / "a.txt").write_text("a")
    where, seen = str(tmp_path), Outside()
    named = Named("folder", where, "input model", seen.content("folder", where))
    known = json.loads(json.dumps(seen.known([("folder", where), ("folder", "/elsewhere")])))
    assert len(known) == 1 and len(hashed) == 1
    with Held([named], known, tmp_path.parent / "told.json") as held:
        held.require_unchanged()
        assert len(hashed) == 1
        (tmp_path / "a.txt").write_text("bb")  # within a tick of the clock only its size tells
        with pytest.raises(StageError, match=r"input model: .* has changed since the run was planned \(.*\); of its"):
            held.require_unchanged()
    with pytest.raises(StageError, match=r"input model: .* has changed since the run was planned; of its files a\.txt"):
        Held([named], [], tmp_path.parent / "told.json").__enter__()  # nobody says when


def test_arguments_that_are_paths(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "plain").write_text("p")
    (tmp_path / "train" / "b.txt").write_text("b")
    (tmp_path / "train" / "é.txt").write_text("e")
    paths = {"a.txt": "a.txt", "./plain": "plain", "train/b.txt": "train/b.txt", "train/": "train", "./train": "train"}
    for text, path in paths.items():
        assert resolve_reference("argument", text, tmp_path) == str(tmp_path / path)
        assert resolve_reference("argument", str(tmp_path / path), Path("/elsewhere")) == str(tmp_path / path)
    # names of splits and the like, what separates, and what leads nowhere
    for text in ("train", "plain", "/", "//", ".", "..", "", "b.txt", "https://a.org/b", "a\0.txt", "x." * 5000):
        assert resolve_reference("argument", text, tmp_path) == text == argument_identity(text)
    assert argument_identity(str(tmp_path / "a.txt")) == {"sha256": sha256_file(tmp_path / "a.txt"), "suffix": ".txt"}
    assert argument_identity(str(tmp_path / "train")).keys() == {"sha256"}


def test_cached_rewards_are_of_the_files_that_parameters_name(tmp_path: Path) -> None:
    """Within a stage, of those that were planned: the code that is loaded is that code."""
    code, words = tmp_path / "code.py", tmp_path / "words.txt"
    code.write_text("def reward(completions, words):\n    return [1.0]\n")
    words.write_text("a")
    spec = RewardSpec(name=f"{code}:reward", parameters={"words": str(words), "n": 1})
    before = reward_identity(spec)
    assert str(tmp_path) not in json.dumps(before) and before["parameters"]["n"] == 1
    planned = [Named("code", spec.name, "with.rewards.0", before["reward"])]
    with Held(planned, [], tmp_path / "told.json"):
        code.write_text("def reward(completions, words):\n    return [2.0]\n")
        assert reward_identity(spec) == before == {**before, "reward": content_in_force("code", spec.name)}
    assert reward_identity(spec)["reward"] != before["reward"]
    words.write_text("b")
    assert reward_identity(spec)["parameters"] != before["parameters"]
