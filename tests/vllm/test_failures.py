"""Servers of vLLM that never serve: what a stage says of them, in vLLM's own words, and that nothing of them stays."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from artifacts.errors import StageError
from stages.rollouts.engine_settings import EngineConfig
from stages.rollouts.vllm_own_servers import OwnServers
from tests.vllm.models import save_model, served
from tests.vllm.test_stage import processes_of

MESSAGES = {
    "out of memory": r"(?s)^the vLLM server did not start: it ended with status 1, for want of memory \(give it less: "
    r"kv_cache_gib, .*\n  ValueError: Available memory .* is less than requested.*\(all of it: .*vllm.log\)$",
    "never healthy": r"(?s)^the vLLM server did not answer within 2 s; raise rollouts.start_timeout_seconds",
    "a model it does not take": r"(?s)^the vLLM server did not start: .*Error.*\(all of it: .*vllm.log\)$",
}


def test_they_are_said_to_be_what_they_are(tmp_path: Path) -> None:
    """Memory for a cache of a petabyte, two seconds to start in, and a kind of model that does not exist; all three at
    once, for each takes as long as an import."""
    save_model(tmp_path / "model", 1)
    save_model(tmp_path / "strange", 1)
    config = tmp_path / "strange" / "config.json"
    strange = {**json.loads(config.read_text()), "architectures": ["NobodysForCausalLM"], "model_type": "nobodys"}
    config.write_text(json.dumps(strange))

    def told(name: str, model: str = "model", **settings: float) -> str:
        logs = tmp_path / name
        logs.mkdir()
        given = EngineConfig(engine="vllm_server", **{"kv_cache_gib": 0.05, **settings})
        with pytest.raises(StageError) as found:
            OwnServers(served(tmp_path / model), given, logs, print)
        return str(found.value)

    with ThreadPoolExecutor(3) as pool:
        waiting = {
            "out of memory": pool.submit(told, "out of memory", kv_cache_gib=2**20),
            "never healthy": pool.submit(told, "never healthy", start_timeout_seconds=2.0),
            "a model it does not take": pool.submit(told, "a model it does not take", model="strange"),
        }
    found = {name: one.result() for name, one in waiting.items()}
    for name, message in MESSAGES.items():
        assert re.search(message, found[name]), found[name]
    assert not processes_of(tmp_path)
