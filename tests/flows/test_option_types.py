"""What options accept, and what is said of what they do not: never in Python's words."""

from __future__ import annotations

import argparse
import os
import re
import socket
from pathlib import Path

import pytest

from artifacts.errors import RequestError
from flows import cli
from flows.option_types import duration
from flows.ports import listen


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("6h", 21600), ("1d", 86400), ("1.5 H", 5400)]
)
def test_intervals(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["5min", "-3", "h", "", "1e3", "nan", "9999d", "1h30m"])
def test_what_is_no_interval(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected a number of seconds, or one with its unit: 90s, "):
        duration(text)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gc --keep-days x", "argument --keep-days: expected a whole number of at least 0, found 'x'"),
        ("gc --grace-hours -1", "argument --grace-hours: expected a number of 0 or more, found '-1'"),
        ("plan quickstart --memory-gb nan", "argument --memory-gb: expected a number above 0, found 'nan'"),
        ("trace @x --limit ²", "argument --limit: expected a whole number of at least 0, found '²'"),
        ("ui --port 80x", "argument --port: expected the number of a port, 0 to 65535 (0: a free one), found '80x'"),
        (
            "ui --port 70000",
            "argument --port: expected the number of a port, 0 to 65535 (0: a free one), found '70000'",
        ),
        (
            "schedule pase x",
            "argument action: expected list, pause, resume, remove; found 'pase'; did you mean 'pause'?",
        ),
        ("lss", "there is no command 'lss'; did you mean 'ls'?; there are: run, sweep, plan, "),
    ],
)
def test_what_is_wrong_with_an_option_is_said_in_its_own_words(
    capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(line.split())
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_a_port_in_use_names_the_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = rf"port {port} of 127.0.0.1 is taken by process {os.getpid()} \(\S+\); give another --port"
        with pytest.raises(RequestError, match=words):
            listen(port)


def test_cancel_goes_with_remove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schedule", "pause", "x", "--cancel", "--store", str(tmp_path)]) == 2
    assert re.search(r"--cancel goes with `posttrain schedule remove NAME`", capsys.readouterr().err)
