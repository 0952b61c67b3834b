"""The local store and what the operating system may do to it."""

import errno
import os
import subprocess
import unicodedata

import pytest

from artifacts import RequestError, Store, StoreError, open_store
from artifacts.disk import Disk
from artifacts.local import LocalFiles

FINGERPRINT = "ab" * 32


@pytest.fixture
def local(tmp_path):
    return open_store(str(tmp_path / "store"))


def everything(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_files_are_moved_not_copied_and_read_only(local, tmp_path):
    folder = local.scratch / "job"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"w" * 100)
    inode = (folder / "weights").stat().st_ino
    artifact = local.put("model", folder, producer={})
    stored = local.materialize(artifact) / "weights"
    assert stored.is_relative_to(tmp_path / "store/artifacts") and stored.stat().st_ino == inode
    assert stored.stat().st_mode & 0o777 == 0o444 and not (folder / "weights").exists()


def test_a_file_with_a_second_name_is_copied(local, tmp_path, fill):
    folder = fill({"a": b"1"})
    os.link(folder / "a", tmp_path / "mine")
    artifact = local.put("model", folder, producer={})
    (tmp_path / "mine").write_bytes(b"2")
    assert (local.materialize(artifact) / "a").read_bytes() == b"1"


def test_a_changed_file_with_its_old_time_is_seen(local, fill):
    artifact = local.put("model", fill({"a": b"11"}), producer={})
    path = local.materialize(artifact) / "a"
    status = path.stat()
    path.chmod(0o644)
    path.write_bytes(b"12")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert local.verify(artifact)


def link(folder):
    (folder / "b").symlink_to("/etc/passwd")


def link_to_folder(folder):
    (folder / "b").symlink_to("/etc")


def pipe(folder):
    os.mkfifo(folder / "b")


def left_over(folder):
    (folder / ".tmpAbC123").write_bytes(b"")


def two_cases(folder):
    (folder / "A").write_bytes(b"")


def folder_of_another_case(folder):
    (folder / "sub").mkdir()
    (folder / "sub/x").write_bytes(b"")
    (folder / "SUB").mkdir()
    (folder / "SUB/y").write_bytes(b"")


def decomposed(folder):
    (folder / unicodedata.normalize("NFD", "ä")).write_bytes(b"")


def not_unicode(folder):
    with open(os.fsencode(folder) + b"/\xff", "wb"):
        pass


def control(folder):
    (folder / "a\nb").write_bytes(b"")


@pytest.mark.parametrize(
    "spoil",
    [
        link,
        link_to_folder,
        pipe,
        left_over,
        two_cases,
        folder_of_another_case,
        decomposed,
        not_unicode,
        control,
    ],
    ids=lambda f: f.__name__,
)
def test_what_may_not_be_stored_is_refused_and_nothing_happens(local, fill, tmp_path, spoil):
    folder = fill({"a": b"1"})
    spoil(folder)
    before = everything(tmp_path / "store")
    with pytest.raises(StoreError, match="cannot store") as caught:
        local.put("model", folder, producer={})
    str(caught.value).encode()
    assert everything(tmp_path / "store") == before and (folder / "a").read_bytes() == b"1"


def test_links_in_a_hostile_store_are_not_followed(local, fill, tmp_path):
    artifact = local.put("model", fill({"a": b"1", "sub/b": b"2"}), producer={})
    files = local.files.path(f"{artifact.key}/files")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b").write_bytes(b"2")
    (files / "sub/b").unlink()
    (files / "sub").rmdir()
    (files / "sub").symlink_to(outside)
    assert local.verify(artifact) and not local.is_intact(artifact)
    local.put("model", fill({"a": b"1", "sub/b": b"2"}), producer={})
    assert local.verify(artifact) == [] and not (files / "sub").is_symlink()
    assert (outside / "b").read_bytes() == b"2"


class BadDisk(Disk):
    """The call number `at` of one primitive fails."""

    def __init__(self, name: str, at: int, code: int) -> None:
        self.left = at
        step = getattr(super(), name)

        def fail(*arguments):
            self.left -= 1
            if self.left == 0:
                raise OSError(code, os.strerror(code))
            return step(*arguments)

        setattr(self, name, fail)


@pytest.mark.parametrize("name", ["mkdir", "create", "write", "fsync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_a_failing_disk_is_reported_and_leaves_nothing(fill, tmp_path, name, code):
    at = 1
    while True:
        root = tmp_path / f"{name}{at}"
        open_store(str(root))
        disk = BadDisk(name, at, code)
        folder = fill({"a": b"1", "sub/b": b"2"})
        store = Store(LocalFiles(root, disk), tmp_path)
        try:
            artifact = store.put("model", folder, producer={})
        except StoreError as error:
            assert ("no space left in" if code == errno.ENOSPC else "Input/output error") in str(error)
            assert list((root / "tmp").iterdir()) == []
            healthy = open_store(str(root))
            if list(healthy.artifacts()) == []:
                assert everything(folder) == {"a", "sub/b"} and everything(root) <= {"lock"}
            else:
                # only the last syncs were left: it is there, and whole, and was not acknowledged
                assert name == "fsync"
                assert [healthy.verify(artifact) for artifact in healthy.artifacts()] == [[]]
        if disk.left > 0:
            assert at > 1 and store.verify(artifact) == []
            return
        at += 1


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=200", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_reported_with_what_is_needed_and_free(small_disk, fill):
    store = open_store(str(small_disk / "store"))
    folder = fill({"big": b"x" * 3_000_000, "small": b"y"})
    with pytest.raises(StoreError, match=r"no space left in .*small/store.*: 300\d{4} bytes needed, \d+ free"):
        store.put("model", folder, producer={})
    assert everything(small_disk) == set() and everything(folder) == {"big", "small"}
    with pytest.raises(StoreError, match="no space left"):
        store.checkpoints(FINGERPRINT).save(1, folder)
    assert store.checkpoints(FINGERPRINT).latest_step() is None and everything(small_disk) == set()
    artifact = store.put("model", fill({"small": b"y"}), producer={})
    assert store.verify(artifact) == []


def test_a_place_that_cannot_be_a_store_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="a file is where a folder should be"):
        open_store(str(tmp_path / "file"))
    for url, reason in {
        "": "empty",
        "ftp://host/x": "found 'ftp://host/x'",
        "s3://key:secretsecret@bucket/x": "no credentials",
        "s3://bucket/x?token=secretsecret": "no options",
        "s3://": "names no bucket",
    }.items():
        with pytest.raises(RequestError, match=reason) as caught:
            open_store(url)
        assert "secretsecret" not in str(caught.value)


def test_where_the_store_is(tmp_path, monkeypatch, cache):
    assert open_store().url == str(cache / "store")
    assert open_store().scratch == cache / "store/scratch"
    monkeypatch.setenv("POSTTRAIN_STORE", f"file://{tmp_path}/a%20b")
    assert open_store().url == str(tmp_path / "a b")
    here, other = (open_store(f"memory://{tmp_path.name}/{name}").scratch for name in ("a", "b"))
    assert here.parent == other.parent == cache / "scratch" and here != other
    assert open_store(f"memory://{tmp_path.name}/a/").scratch == here


def test_strangers_in_the_store_do_not_stop_it(local, fill):
    artifact = local.put("model", fill({"a": b"1"}), producer={})
    for path in ("artifacts/.DS_Store", "artifacts/model/notes.txt", "index/x", "aliases/README", "runs/x"):
        local.files.path(path).parent.mkdir(parents=True, exist_ok=True)
        local.files.path(path).write_bytes(b"?")
    assert list(local.artifacts()) == [artifact] == [local.find(artifact.id)]
    assert local.aliases() == {} and local.runs() == [] and local.stage_records("x") == []


def test_only_the_dead_are_cleared_away(local, tmp_path):
    mine = tmp_path / "store/tmp/elsewhere-1-1-abcdef"
    mine.mkdir()
    open_store(local.url)
    assert mine.exists()
