"""A training whose second server is killed amid rollouts: `python -m tests.vllm.disturbed FOLDER MODEL DATASET`.

It says `trained` when it has its outputs, and waits, servers and all, to be killed itself. FOLDER then has what servers
of somebody else would be asked, answered by one of its own (`asked.json`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages.context import local_context
from stages.rollouts import vllm_given_servers as given
from stages.rollouts.vllm_connection import Address, Connection
from stages.rollouts.vllm_own_servers import OwnServers
from tests.vllm.models import served
from tests.vllm.test_stage import settings_of
from tests.waiting import LIMIT_SECONDS


class Disturbance:
    """The second server stops when it has taken weights for the second time, and is killed when it is asked then."""

    def __init__(self) -> None:
        self.loads, self.server, self.folder = 0, psutil.Process(), Path()

    def begin(self, patch: pytest.MonkeyPatch) -> None:
        load, choices = OwnServers.load, Connection.choices

        def load_and_stop(servers: OwnServers, weights: Any) -> None:
            load(servers, weights)
            self.loads += 1
            self.folder = servers.folder
            if self.loads == 2:
                (self.server,) = [one for one in psutil.Process().children(recursive=True) if _is_second(one)]
                self.server.suspend()

        async def choose(connection: Connection, *asked: Any) -> Any:
            socket = connection.address.socket
            if self.loads == 2 and socket is not None and socket.parent.name == "1":
                os.kill(self.server.pid, signal.SIGKILL)
            return await choices(connection, *asked)

        patch.setattr(OwnServers, "load", load_and_stop)
        patch.setattr(Connection, "choices", choose)


def _is_second(process: psutil.Process) -> bool:
    line = process.cmdline()
    return any(part.endswith("/1/unready") for part in line) and "server_guard.py" not in " ".join(line)


def ask_as_given(socket: Path, model: Path) -> dict[str, Any]:
    """What is asked of somebody else's server."""
    address = given._looked_at(
        Address("", socket=socket), served(model), LIMIT_SECONDS, time.monotonic() + LIMIT_SECONDS
    )
    connection = Connection(address, LIMIT_SECONDS)
    before = given._version_of(connection)
    connection.post("/update_weight_version", {"new_version": "run-000000007"}, "keep the version of its weights")
    return {"name": address.name, "before": before, "after": given._version_of(connection)}


def main(folder: Path, model: Path, dataset: Path) -> None:
    disturbance = Disturbance()
    engine = {"engine": "vllm_server", "servers": 2}
    context = local_context("rl", settings_of("rl", engine), folder=folder, inputs={"model": model, "dataset": dataset})
    with context.resources, pytest.MonkeyPatch.context() as patch:
        disturbance.begin(patch)
        context.stage.run(context)
        asked = ask_as_given(disturbance.folder / "0" / "socket", model)
        (folder / "asked.json").write_text(json.dumps({"folder": str(disturbance.folder), **asked}))
        print("trained", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
