"""Pages of runs that lie beside the store, and go with their runs."""

import os

import pytest

from artifacts import Store, open_store
from artifacts.retention import Policy
from artifacts.survey import survey
from artifacts.sweep import sweep

DAY = 86400.0


@pytest.fixture
def pages(tmp_path):
    """Pages of two runs of this store and of one of another store, and a file of somebody else, all 40 days old."""
    folder = tmp_path / "reports"
    folder.mkdir()
    for name in ("run-1.html", "run-2.html", "run-of-another-store.html", "notes.html"):
        (folder / name).write_text(name)
        written = (folder / name).stat().st_mtime - 40 * DAY
        os.utime(folder / name, (written, written))
    return folder


@pytest.fixture
def two_runs(tmp_path) -> Store:
    store = open_store(str(tmp_path / "store"))
    for run in ("run-1", "run-2"):
        store.write_run(run, {"stages": {}})
        # run-2 is the newer one by a day
        path = tmp_path / "store" / "runs" / f"{run}.json"
        written = path.stat().st_mtime - (41 if run == "run-1" else 40) * DAY
        os.utime(path, (written, written))
    return store


def test_pages_go_with_their_runs(two_runs, pages):
    found = survey(two_runs, Policy(keep_runs=1), pages)
    going, staying = ([item for item in items if item.what == "page"] for items in (found.goes, found.stays))
    assert [(item.name, item.size, item.reason) for item in going] == [
        (str(pages / "run-1.html"), len("run-1.html"), "of a run that is not kept")
    ]
    assert [(item.name, item.reason) for item in staying] == [(str(pages / "run-2.html"), "of a run that is kept")]
    swept = sweep(two_runs, found, "test")
    assert [item.name for item in swept.deleted if item.what == "page"] == [str(pages / "run-1.html")]
    assert sorted(path.name for path in pages.iterdir()) == ["notes.html", "run-2.html", "run-of-another-store.html"]


def test_pages_of_sweeps_go_with_the_run_they_are_named_after(two_runs, pages):
    for run in ("run-1", "run-2"):
        (pages / f"{run}.html").rename(pages / f"{run}.sweep.html")
    found = survey(two_runs, Policy(keep_runs=1), pages)
    sweep(two_runs, found, "test")
    assert sorted(path.name for path in pages.iterdir()) == [
        "notes.html",
        "run-2.sweep.html",
        "run-of-another-store.html",
    ]


def test_a_page_that_is_young_or_was_written_meanwhile_stays(two_runs, pages):
    (pages / "run-1.html").write_text("new")
    found = survey(two_runs, Policy(keep_runs=0), pages)
    assert {item.name: item.reason for item in found.stays if item.what == "page"} == {
        str(pages / "run-1.html"): "written in the last 24 h"
    }
    (pages / "run-2.html").write_text("new")
    swept = sweep(two_runs, found, "test")
    assert [item.name for item in swept.spared] == [str(pages / "run-2.html")]
    assert sorted(path.name for path in pages.iterdir() if path.name.startswith("run-")) == [
        "run-1.html",
        "run-2.html",
        "run-of-another-store.html",
    ]
