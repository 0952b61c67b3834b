"""`launch:` of a recipe: how the process of a stage is started. None of it is part of what the result is."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from artifacts.errors import Problem, StageError
from flows.command import launcher_settings
from flows.document import Document, Place
from flows.fields import found
from flows.validate import validate
from stages.names import nearest

LAUNCHERS = ("cpu", "ddp", "fsdp2", "zero2", "zero3")

_INTERPRETERS = ("python", "vllm_python")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)


class Launch(BaseModel):
    """How a stage's process is started."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    processes: int = Field(1, ge=1)
    """Processes that work on the stage together."""
    config: str | None = None
    """cpu, ddp, fsdp2, zero2, zero3, or an accelerate configuration file; null: ddp where there are several."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of each process; null: the machine's cores divided by the processes."""
    python: str | None = None
    """The Python interpreter to run the stage with; null: the one that runs the flow."""
    vllm_python: str | None = None
    """The Python interpreter that has vLLM, for stages that start a server of it; null: the stage's own."""
    slots: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Slots of Prefect's global concurrency limits that the stage holds while it works: {gpu: 2}."""
    retries: int = Field(2, ge=0)
    """How often to try again where storage, a port or another machine failed; other failures are final."""
    retry_delay_seconds: float = Field(30.0, ge=0)
    """Before the first retry; each later one waits twice as long."""
    env: dict[str, str] = {}
    """Environment variables of the stage's processes. Credentials belong into the environment, not here."""


def read_launch(
    values: Mapping[str, Any], document: Document, place: Place, base: Path
) -> tuple[dict[str, Any], list[Problem]]:
    """The settings written at one place, with files made absolute, and what is wrong with them."""
    launch, problems = validate(Launch, values, document, place, {})
    if launch is None:
        return {}, problems
    written = {name: getattr(launch, name) for name in launch.model_fields_set}
    wrong = dict(_wrong(launch, base))
    if launch.config and launch.config not in LAUNCHERS and "config" not in wrong:
        written["config"] = str(_file(launch.config, base))
    for name in _INTERPRETERS:
        given = getattr(launch, name)
        if given and "/" in given and name not in wrong:
            written[name] = str(_file(given, base))
    return written, [document.problem((*place, *name.split(".")), what) for name, what in wrong.items()]


def common_launch(document: Document, base: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The settings for every stage, and what is wrong with them."""
    values = document.data.get("launch")
    if values is None:
        return {}, []
    if not isinstance(values, Mapping):
        return {}, [document.problem(("launch",), f"expected a mapping, found {found(values)}")]
    return read_launch(values, document, ("launch",), base)


def merge_launch(common: Mapping[str, Any], own: Mapping[str, Any], single: bool = False) -> Launch:
    """A stage's settings over those for every stage; environments and slots are joined. `single`: how many processes
    every stage has, and how they work together, is not for this one."""
    if single:
        common = {name: value for name, value in common.items() if name not in ("processes", "config")}
    joined = {name: {**common.get(name, {}), **own.get(name, {})} for name in ("env", "slots")}
    return Launch.model_validate({**common, **own, **joined})


def _file(text: str, base: Path) -> Path:
    path = Path(os.path.expanduser(text))
    return path if path.is_absolute() else base / path


def _wrong(launch: Launch, base: Path) -> Iterator[tuple[str, str]]:
    config = launch.config
    if config is not None and config not in LAUNCHERS and (wrong := _wrong_file(config, base)):
        yield "config", wrong
    for name in _INTERPRETERS:
        python = getattr(launch, name)
        if python is not None and not _is_interpreter(python, base):
            yield name, f"no such Python interpreter: {python!r}; give its path"
    for name in launch.env:
        if _SECRET.search(name):
            # a recipe is copied into run records and reports; the environment is not
            yield (
                f"env.{name}",
                "looks like a credential; set it in the environment and leave it out of the recipe",
            )


def _is_interpreter(python: str, base: Path) -> bool:
    return os.path.isfile(_file(python, base)) if "/" in python else shutil.which(python) is not None


def _wrong_file(config: str, base: Path) -> str | None:
    if not os.path.isfile(_file(config, base)):
        return (
            f"{config!r} is neither one of {', '.join(LAUNCHERS)} nor an accelerate configuration file "
            f"(looked for {_file(config, base)}){nearest(config, LAUNCHERS)}"
        )
    try:
        launcher_settings(str(_file(config, base)))
    except StageError as error:
        return str(error)
    return None
