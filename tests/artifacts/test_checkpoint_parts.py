"""Checkpoints that several processes save together, on every kind of store."""

import logging

import pytest

from artifacts.errors import RequestError, StoreError

FINGERPRINT = "cd" * 32
KEY = f"work/{FINGERPRINT}/checkpoints"


class NotYet(Exception):
    pass


def not_yet() -> None:
    raise NotYet


def test_it_counts_once_every_part_is_there(store, fill):
    checkpoints = store.checkpoints(FINGERPRINT)
    name = checkpoints.new_name(7)
    checkpoints.save_part(name, 1, fill({"state": b"one", "deep/er": b"x"}))
    with pytest.raises(NotYet):
        checkpoints.finish(name, 2, not_yet)
    assert checkpoints.latest() is None and checkpoints.latest_step() is None
    # the other process ends while this one waits for it
    checkpoints.finish(name, 2, lambda: checkpoints.save_part(name, 0, fill({"state": b"zero"})))
    step, folder = store.checkpoints(FINGERPRINT).latest()
    assert step == 7 == checkpoints.latest_step()
    assert (folder / "part-00000/state").read_bytes() == b"zero"
    assert (folder / "part-00001/state").read_bytes() == b"one"
    assert (folder / "part-00001/deep/er").read_bytes() == b"x"
    assert checkpoints.open(folder.name) == folder


def test_a_damaged_part_is_named_and_the_one_before_counts(store, fill, caplog):
    checkpoints = store.checkpoints(FINGERPRINT)
    checkpoints.save(1, fill({"state": b"whole"}))
    name = checkpoints.new_name(2)
    for part in (0, 1):
        checkpoints.save_part(name, part, fill({"state": b"%d" % part * 50}))
    checkpoints.finish(name, 2, not_yet)
    store.files.write(f"{KEY}/{name}/part-00001/state", b"1" * 49 + b"\0")
    with caplog.at_level(logging.WARNING):
        step, folder = store.checkpoints(FINGERPRINT).latest()
    assert step == 1 and (folder / "state").read_bytes() == b"whole"
    assert name in caplog.text and "part-00001/state" in caplog.text


def test_unfinished_parts_do_not_push_out_what_counts(store, fill):
    """A run that was killed while it saved, again and again, and then ends well."""
    checkpoints = store.checkpoints(FINGERPRINT, keep=1)
    checkpoints.save(1, fill({"state": b"good"}))
    for _ in range(3):
        checkpoints.save_part(checkpoints.new_name(2), 0, fill({"state": b"half"}))
    assert checkpoints.latest()[0] == 1
    name = checkpoints.new_name(3)
    for part in (0, 1):
        checkpoints.save_part(name, part, fill({"state": b"new"}))
    checkpoints.finish(name, 2, not_yet)
    assert checkpoints.latest()[0] == 3
    checkpoints.clear()
    assert store.files.tree(KEY) == {}


def test_names_of_markers_and_steps_out_of_range_are_refused(store, fill):
    checkpoints = store.checkpoints(FINGERPRINT)
    with pytest.raises(StoreError, match=r"part\.json is the name of its marker"):
        checkpoints.save_part(checkpoints.new_name(1), 0, fill({"part.json": b"{}"}))
    with pytest.raises(RequestError, match="between 0 and 10"):
        checkpoints.new_name(-1)


def test_one_file_of_the_newest_where_it_is_right(store, fill):
    checkpoints = store.checkpoints(FINGERPRINT)
    assert checkpoints.newest_file("notes", 100) is None
    checkpoints.save(1, fill({"state": b"weights", "notes": b"one"}))
    name = checkpoints.new_name(2)
    checkpoints.save_part(name, 0, fill({"state": b"weights", "notes": b"two"}))
    assert checkpoints.newest_file("notes", 100) == (1, b"one")  # the other one is not finished
    checkpoints.finish(name, 1, not_yet)
    assert checkpoints.newest_file("notes", 100) == (2, b"two")
    store.files.write(f"{KEY}/{name}/part-00000/notes", b"twO")
    assert checkpoints.newest_file("notes", 100) == (1, b"one")
    assert checkpoints.newest_file("notes", 2) is None and checkpoints.newest_file("state", 100) == (2, b"weights")
