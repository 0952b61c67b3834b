"""Some hundred spoiled texts, in a process of their own; in full: `python -m tests.campaigns mutations`."""

import subprocess
import sys
from pathlib import Path

from tests.campaigns import mutations

ROOT = Path(__file__).resolve().parents[2]


def test_spoiled_texts_are_taken_or_refused_in_our_words() -> None:
    command = [sys.executable, "-m", "tests.campaigns", "mutations", "--mutations", "450", "--seed", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "50 spoiled: recipe" in done.stdout and " 0 anomalies, seed 4" in done.stdout


def test_other_errors_and_endless_work_are_anomalies(monkeypatch) -> None:
    def loop(text, folder):
        while True:
            pass

    monkeypatch.setattr(mutations, "SLOWEST_SECONDS", 0.05)
    for read, anomaly in ((lambda text, folder: {}[text], "KeyError: b'a'"), (loop, "more than 0.05 s")):
        assert mutations._try(mutations.Subject("planted", (b"a",), read), b"a") == anomaly
