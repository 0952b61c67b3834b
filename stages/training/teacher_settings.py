"""Settings of distillation's teachers: where they compute, and which of several teaches a row. Imports no torch."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from stages.rollouts.engine_problems import engine_problems
from stages.rollouts.engine_settings import EngineChoice, EngineConfig
from stages.stage import Config


class TeachersConfig(Config):
    """Where teachers compute, and what tells several apart."""

    teacher_engine: EngineConfig = EngineConfig()
    """What computes input teacher, in the terms of `rollouts`: by default the stage itself; `{engine: vllm_server}`:
    servers of vLLM, which send the `loss_top_k` likeliest tokens, or what `loss_type` asks of the sampled one. Of
    several teachers each has servers of its own."""
    teacher_engines: tuple[EngineConfig, ...] = ()
    """Of several teachers each one's own, in the order of input teacher, in the place of teacher_engine."""
    teacher_column: str | None = Field(None, min_length=1)
    """Of several teachers (a list as input teacher), the dataset's column that says which one teaches a row: by
    `teacher_names`, or by number, the first being 0. null: there is one."""
    teacher_names: tuple[str, ...] = ()
    """What that column calls the teachers, in the order of input teacher."""

    def engine_of(self, number: int) -> EngineConfig:
        """What computes the teacher of this number."""
        return self.teacher_engines[number] if self.teacher_engines else self.teacher_engine

    @property
    def is_taught_apart(self) -> bool:
        """Whether some teacher is computed elsewhere."""
        return any(engine.is_apart for engine in self.teacher_engines or (self.teacher_engine,))


def teacher_problems(config: Any, wired: frozenset[str]) -> list[str]:
    """What does not go together in a distillation's settings of its teachers."""
    problems = _several_problems(config, wired)
    apart = {
        name: engine
        for name, engine in (
            ("teacher_engine", config.teacher_engine),
            *((f"teacher_engines.{number}", engine) for number, engine in enumerate(config.teacher_engines)),
        )
        if engine.is_apart
    }
    for name, engine in apart.items():
        problems += _engine_problems(engine, name)
    if not apart:
        return problems
    name = next(iter(apart)).partition(".")[0]
    if "teacher" not in wired:
        problems.append(f"{name} computes input teacher, which is not wired in")
    if config.loss_top_k is None and config.sampled_loss is None:
        problems.append(f"{name} is a server, which sends likely tokens and not all: give loss_top_k")
    if config.temperature != 1:
        problems.append(
            f"temperature is {config.temperature}, but a server sends a teacher's distributions as they are; use 1"
        )
    return problems


def _engine_problems(engine: EngineConfig, name: str) -> list[str]:
    if engine.engine != "vllm_server":
        return [f"{name}.engine is {engine.engine}; what computes a teacher elsewhere is vllm_server"]
    found = engine_problems(EngineChoice(rollouts=engine), None)
    return [problem.replace("rollouts.", f"{name}.") for problem in found] + [
        f"{name}.{field} is of what is trained; a teacher stays as it is, leave it out"
        for field in ("lora_sync", "proof_interval")
        if getattr(engine, field) != EngineConfig.model_fields[field].default
    ]


def _several_problems(config: Any, wired: frozenset[str]) -> list[str]:
    problems = []
    if config.teacher_column is None:
        return [
            f"{name} is of several teachers, which a column of the dataset tells apart: give teacher_column, or leave "
            "it out"
            for name in ("teacher_names", "teacher_engines")
            if getattr(config, name)
        ]
    if "teacher_states" in wired:
        problems.append(
            "teacher_column is of several teachers, and teacher_states are of one: wire the teachers themselves, or "
            "distill from one at a time"
        )
    elif "teacher" not in wired:
        problems.append("teacher_column says which of several teachers teaches a row, and input teacher is not wired")
    if config.sampled_loss is not None:
        problems.append(
            f"loss_type {config.loss_type} learns from one teacher: leave teacher_column out, or take divergence"
        )
    if config.cross_tokenizer is not None:
        problems.append("cross_tokenizer is of one teacher with another tokenizer: leave teacher_column out")
    if config.teacher_engines and config.teacher_engine != EngineConfig():
        problems.append("teacher_engine and teacher_engines exclude each other; give one of them")
    if len(set(config.teacher_names)) < len(config.teacher_names):
        problems.append("teacher_names has a name twice")
    urls = [url for engine in config.teacher_engines for url in engine.urls]
    if len(set(urls)) < len(urls):
        problems.append("teacher_engines name a server twice; each teacher's weights need servers of their own")
    return problems


def number_problems(config: Any, teachers: int) -> list[str]:
    """What does not go with so many teachers."""
    if not teachers:
        return []
    if teachers == 1 and config.teacher_column is not None:
        return ["teacher_column says which of several teachers teaches a row, and input teacher is one: leave it out"]
    if teachers > 1 and config.teacher_column is None:
        return [f"input teacher is a list of {teachers}; give teacher_column, which says which one teaches a row"]
    problems = [
        f"{name} has {len(given)} entries for {teachers} teachers"
        for name in ("teacher_names", "teacher_engines")
        if (given := getattr(config, name)) and len(given) != teachers
    ]
    for name in ("urls", "devices"):
        if teachers > 1 and getattr(config.teacher_engine, name):
            problems.append(
                f"teacher_engine.{name} is of one teacher's servers, and here are {teachers} teachers: give "
                "teacher_engines, one for each"
            )
    return problems
