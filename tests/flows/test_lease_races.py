"""Eight flows, each a process, race for the same and for different stages on one store: each fingerprint is worked on
once, and once more when its holder is killed or stands still for longer than its lease lives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from artifacts import Lease
from tests.flows.pipeline_stages import World, install
from tests.waiting import LIMIT_SECONDS, until

HERE = Path(__file__).parent
FLOWS = 8
TTL_SECONDS = 600.0
"""Of a lease: no machine is so busy that who lives does not renew it in time."""
STAGES = ["one", "two", "three", "beside"]


class Race:
    """The flows of one test, on one store."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("stages.stage.STAGES", ())
        install()
        self.world = World(folder)
        self.flows: dict[str, subprocess.Popen[str]] = {}

    def start(self, *overrides: Callable[[int], str]) -> None:
        env = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
        for number in range(FLOWS):
            run_id = f"flow-{number}"
            command = [sys.executable, str(HERE / "racing_flow.py"), str(self.world.folder), run_id, str(TTL_SECONDS)]
            self.flows[run_id] = subprocess.Popen(
                [*command, *(override(number) for override in overrides)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )

    def results(self, *without: str) -> list[dict]:
        """What the flows but for those say of their stages."""
        found = []
        for run_id, flow in self.flows.items():
            if run_id not in without:
                out, err = flow.communicate(timeout=LIMIT_SECONDS)
                assert flow.returncode == 0, err
                found.append(json.loads(out))
        return found

    def holder(self, stage: str) -> str:
        """The run that works on a stage, once its process has begun."""
        fingerprint = self.world.plan().decisions[stage].fingerprint
        assert fingerprint is not None
        until(lambda: (self.world.folder / "log").exists())
        return str(until(Lease(self.world.store.files, fingerprint, "").holder)["owner"])

    def grow_old(self, stage: str) -> None:
        """The lease of a stage was renewed longer ago than it lives."""
        fingerprint = self.world.plan().decisions[stage].fingerprint
        os.utime(self.world.store.files.path(f"work/{fingerprint}/lease.json"), (time.time() - 2 * TTL_SECONDS,) * 2)

    def tree(self, run_id: str) -> list[psutil.Process]:
        flow = psutil.Process(self.flows[run_id].pid)
        return [flow, *flow.children(recursive=True)]

    def all_wait(self, holder: str) -> None:
        """Every other flow is past its plan, so it wants what the holder has."""
        until(lambda: len(list((self.world.folder / "ready").iterdir())) == FLOWS)


@pytest.fixture
def race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Race]:
    found = Race(tmp_path, monkeypatch)
    yield found
    for flow in found.flows.values():
        for process in psutil.Process(flow.pid).children(recursive=True) if flow.poll() is None else []:
            process.kill()
        flow.kill()
        flow.communicate()


def outputs(results: list[dict], stage: str) -> set[str]:
    return {found[stage][1]["dataset"]["id"] for found in results}


def test_each_fingerprint_is_worked_on_once(race: Race) -> None:
    """Three stages are the same for all; of the one beside there are four, each for two flows."""
    race.start(lambda number: f"beside.text=b{number % 4}")
    results = race.results()
    states = {stage: Counter(found[stage][0] for found in results) for stage in STAGES}
    same = Counter(cached=FLOWS - 1, ran=1)
    assert states == {"one": same, "two": same, "three": same, "beside": Counter(cached=FLOWS - 4, ran=4)}
    assert Counter(race.world.ran()) == Counter(one=1, two=1, three=1, beside=4)
    assert [len(outputs(results, stage)) for stage in STAGES] == [1, 1, 1, 4]
    assert race.world.store.files.tree("claims") == {}


@pytest.mark.parametrize("what", ["killed", "stopped"])
def test_once_more_when_the_holder_is_gone(race: Race, what: str) -> None:
    gate = race.world.folder / "gate"
    race.start(lambda number: f"one.until={gate}")
    holder = race.holder("one")
    race.all_wait(holder)
    tree = race.tree(holder)
    if what == "killed":
        os.kill(race.flows[holder].pid, signal.SIGKILL)
        race.flows[holder].wait()
    else:
        # a killed one is known to be dead, whatever its lease says; a stopped one has to be waited for
        for process in tree:
            process.suspend()
        until(lambda: all(process.status() == psutil.STATUS_STOPPED for process in tree))
        race.grow_old("one")
    until(lambda: (race.world.folder / "log").read_text().split().count("one") == 2)
    assert race.holder("one") != holder
    gate.touch()
    results = race.results(holder)
    assert Counter(found["one"][0] for found in results) == Counter(cached=FLOWS - 2, ran=1)
    records = race.world.store.stage_records("make")
    if what == "stopped":
        for process in reversed(tree):
            process.resume()
        results += race.results(*(run_id for run_id in race.flows if run_id != holder))
        # it had begun, so it ends; its result is as good, and its record stands beside the other
        assert results[-1]["one"][0] == "ran"
        records = race.world.store.stage_records("make")
    ran = Counter(race.world.ran())
    assert ran == Counter(one=2, two=1, three=1, beside=1)
    assert all(len(outputs(results, stage)) == 1 for stage in STAGES)
    fingerprint = race.world.plan().decisions["one"].fingerprint
    ours = [record for record in records if record.fingerprint == fingerprint]
    assert len(ours) == (2 if what == "stopped" else 1)
    assert {record.outputs["dataset"] for record in ours} == {ours[0].outputs["dataset"]}
    for artifact in race.world.store.artifacts():
        assert race.world.store.verify(artifact) == []
