"""Planted secrets are nowhere after runs that end well or fail: not in the store, logs, Prefect or reports."""

from __future__ import annotations

import base64
import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from flows.cli import main
from tests.bad_stages import CODE, DIVERGING, TRAINING, rewarded, stage
from tests.canaries import CANARIES, NAMES, leaks
from tests.flows.test_bad_input_command import ROOT
from tests.tiny_recipe import write_recipe

TELLING = '''
import os


def tells(completions, **_):
    """Raises an error that quotes a secret, as some clients do."""
    raise RuntimeError(f"401: key {os.environ['OPENAI_API_KEY']} refused; https://me:{os.environ['HF_TOKEN']}@host/x")

'''


@pytest.mark.parametrize(
    ("how", "write"),
    [
        ("text", lambda secret: secret.encode()),
        ("hex", lambda secret: secret.encode().hex().encode()),
        ("base64 at offset 1", lambda secret: base64.b64encode(b"x" + secret.encode() + b"yz")),
        ("base64 at offset 2", lambda secret: base64.b64encode(b"xx" + secret.encode())),
        ("JSON", lambda secret: json.dumps({"a": secret}).encode()),
        ("text", lambda secret: b"head" + gzip.compress(secret.encode())),
    ],
)
def test_the_search_finds_what_is_there(tmp_path: Path, how: str, write) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_bytes(b"before " + write(CANARIES["HF_TOKEN"]) + b" after")
    assert f"sub/file: HF_TOKEN as {how}" in leaks(tmp_path, {})


@pytest.mark.slow
def test_a_run_with_successes_and_failures_tells_no_secret(tmp_path: Path) -> None:
    """Through the command and Prefect: good stages, a training that diverges, torn data, and rewards that leak."""
    recipe = write_recipe(
        tmp_path / "recipe",
        {
            "sft": stage("sft", "rows", TRAINING),
            "torn": {"uses": "normalize", "with": {"source": {"path": "torn.jsonl"}}},
            "nan": stage("sft", "rows", DIVERGING),
            "raises": rewarded("rl", "raises"),
            "tells": rewarded("rl", "tells"),
        },
    )
    (tmp_path / "recipe" / "torn.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    (tmp_path / "recipe" / "bad.py").write_text(CODE + TELLING)
    command = [sys.executable, "-m", "flows.cli", "run", str(recipe), "--store", str(tmp_path / "store"), "--json"]
    lines: set[str] = set()
    environment = {**_clean_environment(), **CANARIES, "PREFECT_HOME": str(tmp_path / "prefect")}
    for name in ("PREFECT_API_KEY", "PREFECT_SERVER_API_AUTH_STRING"):
        environment.pop(name)  # a temporary server needs none, and would ask for it
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True) as process:
        watch = threading.Thread(target=_collect_command_lines, args=(process, lines))
        watch.start()
        out, err = process.communicate(timeout=400)
        watch.join()
    ended = {name: entry["state"] for name, entry in json.loads(out)["stages"].items()}
    assert ended == {
        **dict.fromkeys(("rows", "pairs", "base", "sft"), "ran"),
        **dict.fromkeys(("torn", "nan", "raises", "tells"), "failed"),
    }
    assert main(["report", "latest", "--store", str(tmp_path / "store"), "-o", str(tmp_path / "report.html")]) == 0
    assert any("stages" in line for line in lines), "no stage's command line was seen"
    assert leaks(tmp_path, {"stdout": out, "stderr": err, "command lines": "\n".join(lines)}) == []


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PREFECT") and name not in NAMES}


def _collect_command_lines(process: subprocess.Popen[str], lines: set[str]) -> None:
    """The command lines of all processes below `process`, looked at again and again until it ends."""
    while process.poll() is None:
        try:
            for child in psutil.Process(process.pid).children(recursive=True):
                lines.add(" ".join(child.cmdline()))
        except psutil.Error:
            continue
