"""Bad input as the user of the command line meets it, and a disk, a store and a port that do not serve.

Part of the table in test_bad_input_end_to_end.py.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from artifacts import open_store
from artifacts.errors import StoreError
from flows.cli import main
from flows.launch import run_stage_process
from flows.plan import plan
from flows.recipe import Launch, Recipe
from flows.run import Run
from flows.stage_result import StageFailed
from tests.bad_stages import CODE, DIVERGED, DIVERGING, RAISED, TRAINING, rewarded, stage
from tests.in_process import assert_nothing_half_written, failures, run_here, states
from tests.tiny_recipe import write_recipe
from tests.waiting import LIMIT_SECONDS
from tests.warm import Warm

ROOT = Path(__file__).resolve().parents[2]


def posttrain(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user calls it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=ROOT,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


@pytest.mark.slow
def test_in_the_terminal_in_the_log_and_in_prefect(tmp_path: Path, warm_process: Warm) -> None:
    run_here(write_recipe(tmp_path / "recipe", {}), tmp_path / "store")
    (tmp_path / "recipe" / "torn.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    (tmp_path / "recipe" / "bad.py").write_text(CODE)
    bad = {
        "torn": {"uses": "normalize", "with": {"source": {"path": "torn.jsonl"}}},
        "after": stage("sft", "torn", TRAINING),
        "nan": stage("sft", "rows", DIVERGING),
        "raises": rewarded("rl", "raises"),
    }
    recipe = write_recipe(tmp_path / "recipe", bad, python=warm_process.interpreter(tmp_path / "python"))
    done = posttrain(
        "run", str(recipe), "--store", str(tmp_path / "store"), "--json", PREFECT_HOME=str(tmp_path / "prefect")
    )
    assert done.returncode == 1
    payload = json.loads(done.stdout)
    assert states(payload) == {
        **dict.fromkeys(("rows", "pairs", "base"), "cached"),
        **{"torn": "failed", "after": "skipped", "nan": "failed", "raises": "failed"},
    }
    with sqlite3.connect(tmp_path / "prefect" / "prefect.db") as database:
        told = " ".join(row[0] for row in database.execute("SELECT message FROM task_run_state WHERE type = 'FAILED'"))
    expected = {"torn": r"torn\.jsonl row 2 is not JSON", "nan": DIVERGED, "raises": RAISED}
    for name, message in expected.items():
        (log,) = tmp_path.glob(f"store/scratch/*/{name}/log.txt")
        places = {"json": failures(payload)[name], "terminal": done.stderr, "log": log.read_text(), "prefect": told}
        assert {place for place, text in places.items() if not re.search(message, text)} == set(), (name, places)
        told_of_it = [line for line in done.stderr.splitlines() if line.startswith(f"{name}: ")]
        assert sum(bool(re.search(message, line)) for line in told_of_it) == 1, told_of_it
        assert f"{name}: the whole output is in {log}" in told_of_it
    assert "Traceback" not in done.stderr
    assert_nothing_half_written(tmp_path / "store", payload)


def test_requests_are_refused_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "a": {"uses": "stf"},
        "b": stage("sft", "rows", {"learning_rat": 1, "max_steps": "many"}),
        "c": {"uses": "sft", "inputs": {"model": "rows"}},
        "d": {"uses": "normalize", "with": {"source": {"path": "absent.jsonl"}}},
    }
    assert main(["run", str(write_recipe(tmp_path, wrong)), "--store", str(tmp_path / "store")]) == 2
    shown = capsys.readouterr().err
    for part in ("'stf'; did you mean 'sft'?", "did you mean 'learning_rate'?", "max_steps", "dataset", "absent.jsonl"):
        assert part in shown, shown
    assert not (tmp_path / "store" / "artifacts").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 KiB: room for the datasets and the run's record, not for a model of 64 KiB beside them."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe", {"sft": stage("sft", "rows", TRAINING)})
    payload = run_here(recipe, small_disk / "store")
    assert states(payload) == {"rows": "ran", "pairs": "ran", "base": "failed", "sft": "skipped"}
    message = r"No space left on device.*the disk is full: free some space or give another --store"
    assert re.search(message, failures(payload)["base"]), failures(payload)
    assert_nothing_half_written(small_disk / "store", payload)
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert run_here(recipe, small_disk / "store")["state"] == "ok"


def test_a_job_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    spec = {"job": str(tmp_path / "file" / "job"), "threads": 1}
    with pytest.raises(StageFailed, match=r"cannot be started: no job folder .*file/job: Not a directory; free some"):
        run_stage_process(spec, Launch(), lambda event: None)


def test_people_see_the_end_of_a_run_that_the_store_cannot_keep(tmp_path: Path) -> None:
    run = Run(plan(Recipe.load(str(write_recipe(tmp_path, {}))), open_store(str(tmp_path / "store"))), mock.Mock())
    with mock.patch.object(run.store, "write_run", side_effect=StoreError("no space left")):
        with pytest.raises(StoreError, match="no space left"):
            run.finish()
    (payload,) = run.listener.finished.call_args.args
    assert states(payload) == dict.fromkeys(("rows", "pairs", "base"), "skipped")
    assert payload["state"] == "failed"  # no stage failed, and none had its turn


def test_a_store_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, {})
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
        assert main(["run", str(recipe), "--store", "s3://bucket/x"]) == 2
    shown = capsys.readouterr().err
    assert re.search(r"--store s3://bucket/x: cannot open store s3://bucket/x.*AWS_ENDPOINT_URL", shown), shown


class _Page(http.server.BaseHTTPRequestHandler):
    """A web page at every address, as a server of something else has it; below /none nothing."""

    def do_GET(self) -> None:
        self.send_response(404 if self.path.startswith("/none") else 200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, *_: object) -> None:
        pass


class _Mail(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"220 mail.example ESMTP\r\n")


@pytest.mark.parametrize(
    ("handler", "path", "found"),
    [(_Page, "/api", "says b'<html>"), (_Page, "/none/api", "has no /health"), (_Mail, "/api", "no HTTP")],
)
def test_a_port_of_another_program(
    handler: Any,
    path: str,
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}{path}"
        monkeypatch.setenv("PREFECT_API_URL", url)
        assert main(["run", str(write_recipe(tmp_path, {})), "--store", str(tmp_path / "store")]) == 2
        server.shutdown()
    shown = capsys.readouterr().err
    assert re.search(rf"what answers at {url} is not Prefect's API \(.*{found}.*PREFECT_API_URL", shown), shown
    assert not list((tmp_path / "store").glob("artifacts/*/*"))
