"""Planted secrets are nowhere after runs that end well or fail: not in the store, logs, Prefect or reports."""

from __future__ import annotations

import base64
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from flows.cli import main
from tests.bad_stages import CODE, DIVERGING, TRAINING, rewarded, stage
from tests.canaries import CANARIES, NAMES, leaks
from tests.flows.test_bad_input_command import ROOT
from tests.in_process import failures, run_here
from tests.key_shapes import key_shapes, key_shapes_below
from tests.leaking_stages import CODE as CODE_THAT_LEAKS
from tests.leaking_stages import PRINTS_ALL, failing_stages, from_function, refused_recipes
from tests.prefect_homes import NewHome
from tests.telling_server import telling_server
from tests.tiny_recipe import write_recipe
from tests.waiting import LIMIT_SECONDS, until
from tests.warm import Warm

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
def test_a_run_with_successes_and_failures_tells_no_secret(tmp_path: Path, warm_process: Warm) -> None:
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
        python=warm_process.interpreter(tmp_path / "python"),
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
    assert key_shapes_below(tmp_path) == []


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
        time.sleep(0.02)  # it would take a core from what it looks at


PLANTED = CANARIES | {name: CANARIES[name].replace("é", "e") for name in ("HF_TOKEN", "OPENAI_API_KEY")}
"""What a client sends in a header is ASCII."""


@pytest.fixture
def planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_prefect_home: NewHome
) -> Iterator[tuple[str, list[str]]]:
    """The canaries in the environment, and a server for every client that tells all it was sent."""
    with telling_server() as (server, told):
        for name in set(os.environ) - set(_clean_environment()):
            monkeypatch.delenv(name)
        servers = dict.fromkeys(("AWS_ENDPOINT_URL", "HF_ENDPOINT"), f"http://{server}")
        # the variable is read when the library is imported, which other tests may have done
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://{server}")
        servers |= {"OPENAI_BASE_URL": f"http://{server}/v1", "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLF"}
        homes = {name: str(tmp_path / name.lower()) for name in ("PREFECT_HOME", "POSTTRAIN_CACHE", "HF_HOME")}
        for name, value in {**PLANTED, **servers, **homes}.items():
            monkeypatch.setenv(name, value)
        new_prefect_home(Path(homes["PREFECT_HOME"]))
        for name in ("PREFECT_API_KEY", "PREFECT_SERVER_API_AUTH_STRING"):
            monkeypatch.delenv(name)  # a temporary server needs none, and would ask for it
        (tmp_path / "recipe" / "folder.jsonl").mkdir(parents=True)
        (tmp_path / "recipe" / "leaking.py").write_text(CODE_THAT_LEAKS)
        yield server, told


def _recipe(folder: Path, stages: dict[str, Any]) -> Path:
    path = folder / "recipe" / "leaking.yaml"
    path.write_text(json.dumps({"name": "leaking", "launch": {"threads": 1}, "stages": stages}))
    return path


def _found(folder: Path, texts: dict[str, str]) -> list[str]:
    """Leaks anywhere but in the recipes, where the tests put them."""
    found = leaks(folder, texts, PLANTED) + key_shapes_below(folder)
    found += [f"{name}: {shape}" for name, text in texts.items() for shape in key_shapes(text.encode())]
    return [leak for leak in found if not leak.startswith("recipe/")]


def _allow_core_files() -> None:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


@pytest.mark.slow
def test_stages_that_fail_in_many_ways_tell_no_secret(planted: tuple[str, list[str]], tmp_path: Path) -> None:
    """One run through the command and Prefect, in which every stage fails in its own way; what they read is there."""
    run_here(write_recipe(tmp_path / "recipe", {}), tmp_path / "store")
    interpreter = tmp_path / "recipe" / "python"
    interpreter.write_text(PRINTS_ALL)
    interpreter.chmod(0o755)
    stages = failing_stages(str(interpreter))
    recipe = write_recipe(tmp_path / "recipe", stages)
    command = [sys.executable, "-m", "flows.cli", "run", str(recipe), "--json"]
    done = subprocess.run(
        [*command, "--store", str(tmp_path / "store")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        preexec_fn=_allow_core_files,
    )
    entries = json.loads(done.stdout)["stages"]
    ended = {name: entry["state"] for name, entry in entries.items()}
    assert ended == dict.fromkeys(("rows", "pairs", "base"), "cached") | dict.fromkeys(stages, "failed")
    assert "killed by signal 9" in entries["killed"]["error"] and "signal 6" in entries["aborted"]["error"]
    assert main(["report", "latest", "--store", str(tmp_path / "store"), "-o", str(tmp_path / "report.html")]) == 0
    assert list(tmp_path.rglob("core*")) == []
    assert _found(tmp_path, {"stdout": done.stdout, "stderr": done.stderr}) == []


@pytest.mark.slow
def test_a_run_that_is_cancelled_tells_no_secret(planted: tuple[str, list[str]], tmp_path: Path) -> None:
    """Ctrl-C in the middle of a stage that has printed them."""
    waits = tmp_path / "waits"
    command = [sys.executable, "-m", "flows.cli", "run", str(_recipe(tmp_path, {"waits": from_function("waits")}))]
    with subprocess.Popen(
        [*command, "--store", str(tmp_path / "store")],
        cwd=ROOT,
        env={**os.environ, "WAITS": str(waits)},
        stdout=-1,
        stderr=-1,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        until(waits.exists)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 130
    assert _found(tmp_path, {"stdout": out, "stderr": err}) == []


def _refusals(folder: Path, server: str) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """What is asked, the command, and variables of the environment."""
    secret, other = CANARIES["DATABASE_PASSWORD"], CANARIES["GITHUB_TOKEN"]
    store = ["--store", str(folder / "store")]
    quoted = quote(other, safe="")
    for name, rows in refused_recipes(secret, quoted, server).items():
        path = str(_recipe(folder, {"rows": rows}))
        yield name, ["plan", path, *store], {}
        yield f"{name}, as JSON", ["plan", path, "--json", *store], {}
    path = str(_recipe(folder, {"rows": from_function("all_of_them")}))
    yield "a setting", ["plan", path, "--set", f"rows.limit={secret}", *store], {}
    yield "a setting nobody knows", ["plan", path, "--set", f"{secret}=1", "--json", *store], {}
    yield "a store that refuses", ["ls", "--store", "s3://bucket/store"], {}
    yield "a store with a password", ["ls", "--store", f"s3://me:{quoted}@bucket/x"], {}
    yield "a store of another kind", ["ls", "--store", f"gs://{secret}"], {}
    yield "an artifact named by a secret", ["show", f"@{secret}", *store], {}
    yield "a run named by a secret", ["report", secret, *store], {}
    for api in (
        f"http://me:{quote(other, safe='')}@127.0.0.1:9/api",
        f"http://me:{quote(other, safe='')}@{server}/api",
    ):
        yield f"Prefect at {api}", ["run", path, *store], {"PREFECT_API_URL": api}
        yield f"deployed at {api}", ["deploy", path, "--json", *store], {"PREFECT_API_URL": api}


def test_refused_requests_tell_no_secret(
    planted: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, told = planted
    texts: dict[str, str] = {}
    for name, arguments, variables in _refusals(tmp_path, server):
        with monkeypatch.context() as patch:
            for variable, value in variables.items():
                patch.setenv(variable, value)
            status = main(arguments)
        out, err = capsys.readouterr()
        assert status in (1, 2), f"{name}: {out}"
        assert "unexpected" not in err, f"{name}: {err}"
        texts[name] = out + err
    assert any("Signature=" in answer for answer in told), "no client has sent credentials"
    assert _found(tmp_path, texts) == []


def _sampling_stages(server: str) -> dict[str, Any]:
    """Stages whose reward, judge or environment fails."""
    judge = {"name": "judge", "parameters": {"model": "m", "max_tries": 1}}
    slow = {"name": "leaking.py:slow", "timeout_seconds": 0.2}
    sampled = {"limit": 4, "max_completion_length": 4}
    learning = {**TRAINING, "num_generations": 4, "max_completion_length": 4}
    outside = {"name": "openenv", "url": f"http://{server}", "parameters": {"environment": "echo", "transport": "http"}}
    return {
        "judge": stage("evaluate", "rows", {**sampled, "rewards": [judge]}),
        "slow": stage("evaluate", "rows", {**sampled, "rewards": [slow]}),
        "environment": stage("rl", "rows", {**learning, "environment": outside, "rewards": ["environment"]}),
    }


def test_judges_and_environments_that_fail_tell_no_secret(
    planted: tuple[str, list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server, told = planted
    recipe = write_recipe(tmp_path / "recipe", _sampling_stages(server))
    payload = run_here(recipe, tmp_path / "store")
    messages = failures(payload)
    assert set(messages) == {"judge", "slow", "environment"}, messages
    assert any("Bearer" in answer for answer in told), "the judge was not asked"
    out, err = capfd.readouterr()
    assert _found(tmp_path, {"stdout": out, "stderr": err}) == []
