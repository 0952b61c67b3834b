"""The command and environment of one stage process: plain Python, or `accelerate launch` for several."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from artifacts.errors import StageError
from stages.names import nearest
from stages.rollouts.engine_settings import PYTHON_VARIABLE
from stages.sharding import Sharding, Whole, Zero, sharding_of

LAUNCHERS = Path(__file__).parent / "launchers"


class LaunchSettings(Protocol):
    """What a recipe's `launch` says about one stage."""

    @property
    def processes(self) -> int: ...
    @property
    def config(self) -> str | None:
        """One of `flows/launchers` by name, or an accelerate configuration file."""

    @property
    def python(self) -> str | None:
        """The interpreter that has torch; None: this one."""

    @property
    def vllm_python(self) -> str | None:
        """The interpreter that has vLLM; None: that of the stage."""

    @property
    def env(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Command:
    """What is executed. `variables`: the settings that a person needs to repeat it by hand, the recipe's too."""

    arguments: list[str]
    variables: dict[str, str]

    def shell(self) -> str:
        """One line for a shell. It holds nothing of the caller's environment, so no credentials."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join(["env", *settings, shlex.join(self.arguments)])


def stage_command(launch: LaunchSettings, job: Path, *, threads: int) -> Command:
    """The command that runs `job/spec.json`. Raises StageError for a launcher that cannot work."""
    python = launch.python or sys.executable
    spec = str(job / "spec.json")
    variables = stage_variables(threads) | dict(launch.env)
    if launch.vllm_python is not None:
        variables[PYTHON_VARIABLE] = launch.vllm_python
    if launch.processes == 1 and launch.config is None:
        return Command([python, "-m", "stages", spec], variables)
    settings = launcher_settings(launch.config or "ddp")
    variables = _device_variables(settings, python, launch) | variables
    path = job / "accelerate.yaml"
    path.write_text(yaml.safe_dump(settings | {"num_processes": launch.processes, "num_machines": 1}))
    options = {
        "--config_file": str(path),
        "--num_processes": str(launch.processes),
        "--num_machines": "1",
        "--mixed_precision": "no",  # the stage's own `bf16` decides
        "--dynamo_backend": "no",
        "--main_process_port": "0",  # a free one
    }
    launcher = [
        python,
        "-m",
        "accelerate.commands.launch",
        *(part for pair in options.items() for part in pair),
    ]
    return Command([*launcher, "-m", "stages", spec], variables)


def default_threads(processes: int, parallel: int) -> int:
    """CPU threads for each process when `parallel` stages of so many processes share this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes // parallel)


def stage_environment(command: Command) -> dict[str, str]:
    """The caller's environment (the store's credentials are there) and the command's settings."""
    return {**os.environ, **command.variables}


def launcher_settings(config: str) -> dict[str, Any]:
    """An accelerate configuration: a shipped one by name, or a file. Raises StageError for one that is not, or that
    asks for what the stages do not do."""
    shipped = {path.stem: path for path in LAUNCHERS.glob("*.yaml")}
    path = shipped.get(config, Path(config))
    if not path.is_file():
        names = ", ".join(sorted(shipped))
        raise StageError(f"launch.config {config!r} is neither one of {names} nor a file{nearest(config, shipped)}")
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise StageError(f"{path} is not an accelerate configuration: it has no distributed_type")
    _find_beside(path, settings)
    try:
        sharding_of(settings)
    except StageError as error:
        raise StageError(f"launch.config {config!r}: {error}") from error
    return settings


def launched_sharding(launch: LaunchSettings) -> Sharding:
    """How its stage spreads models over processes. Raises StageError as `launcher_settings`."""
    return Whole() if launch.config is None else sharding_of(launcher_settings(launch.config))


def _find_beside(path: Path, settings: dict[str, Any]) -> None:
    """The DeepSpeed file of a configuration lies beside it; the job has a copy of the configuration only."""
    deepspeed = settings.get("deepspeed_config") or {}
    if (name := deepspeed.get("deepspeed_config_file")) and str(name) != "none":
        deepspeed["deepspeed_config_file"] = str(path.parent.resolve() / str(name))


def stage_variables(threads: int) -> dict[str, str]:
    """What every stage process finds in its environment."""
    variables = {
        "OMP_NUM_THREADS": str(threads),  # a fixed number: results differ in the last bit between thread counts
        # A waiting thread spins for some 20 microseconds. Sleeping at once makes small operations a fifth slower;
        # spinning for long, as is the default, makes stages side by side on the same cores seven times slower.
        "GOMP_SPINCOUNT": "10000",
        # Fresh pages from the system take as long to fill as numbers to multiply. So freed memory stays with the
        # process, and what is too large for that (it would leave holes) comes in huge pages where the kernel has them.
        # 16 MiB would take a sixth less memory, but make fresh pages of the gradient of a middling vocabulary.
        "MALLOC_TRIM_THRESHOLD_": str(2**46),
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        # oneDNN keeps a way to compute for every shape it has met, with the memory that it needs: 1024 of them, as is
        # the default, come to some 200 MiB where every pass has another number of tokens.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONHASHSEED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return variables | python_path()


def python_path() -> dict[str, str]:
    """What processes that start in other folders need to find a checkout of ours."""
    root = Path(__file__).resolve().parent.parent
    if root.name in ("site-packages", "dist-packages"):
        return {}
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), *(path for path in given if path != str(root))]))}


def _device_variables(settings: Mapping[str, Any], python: str, launch: LaunchSettings) -> dict[str, str]:
    """What makes accelerate and DeepSpeed use gloo on CPUs. Raises StageError for an interpreter without them."""
    has_accelerator, has_deepspeed = _abilities(python, tuple(sorted(launch.env.items())))
    is_zero = isinstance(sharding_of(settings), Zero)
    if is_zero and not has_deepspeed:
        raise StageError(
            f"launch.config {launch.config!r} needs DeepSpeed, which {python} does not have; "
            "pip install 'posttrain[deepspeed]', or use fsdp2"
        )
    if launch.config != "cpu" and has_accelerator:
        return {}
    return {"ACCELERATE_USE_CPU": "true", **({"DS_ACCELERATOR": "cpu"} if is_zero else {})}


@functools.cache
def _abilities(python: str, env: Sequence[tuple[str, str]]) -> tuple[bool, bool]:
    """(an accelerator is there, DeepSpeed is installed), asked of the interpreter that will run the stage; this process
    and its environment need no torch."""
    code = (
        "import importlib.util as util, torch; "
        "print(torch.accelerator.is_available(), util.find_spec('deepspeed') is not None)"
    )
    try:
        answer = subprocess.run(
            [python, "-P", "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, **dict(env)},
            timeout=600,  # to import torch takes many seconds, and minutes from a slow disk
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StageError(f"launch.python {python!r} cannot be started: {error}") from error
    if answer.returncode != 0:
        reason = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        raise StageError(f"{python} cannot import torch: {reason}; set launch.python to one that has posttrain")
    has_accelerator, has_deepspeed = answer.stdout.split()[-2:]
    return has_accelerator == "True", has_deepspeed == "True"
