"""`posttrain plan --memory`: what each stage will need at most, whether it fits, and the smallest change that does.

Imports no torch: sizes of models come from their config.json, or from the settings of the stage that makes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from artifacts import Artifact, Store
from artifacts.contents import PAYLOAD
from artifacts.errors import StageError, StoreError
from flows.command import launched_sharding
from flows.inputs import HUB_KINDS, Reference, ResolvedInput, StageOutput
from flows.machine import Machine
from flows.memory_advice import Change, smallest_change
from flows.plan import Plan
from flows.recipe import RecipeStage
from stages.adapters import CONFIG, Base, read_adapter_config
from stages.training.memory_adapters import Adapters
from stages.training.memory_allocator import Device
from stages.training.memory_phase import PARTS, Phase
from stages.training.memory_phase import worst as worst_of
from stages.training.memory_request import Request
from stages.training.memory_shape import ModelShape, UnknownShapeError, read_shape
from stages.training.memory_training import Setup

_MODEL_KINDS = (*HUB_KINDS, "adapter", "teacher_states")


@dataclass(frozen=True)
class Prediction:
    """What one stage will need. Bytes; `unknown` says why there are none."""

    processes: int
    device: str
    phases: tuple[Phase, ...] = ()
    limit: int | None = None
    """What one process may have."""
    unknown: str | None = None
    change: Change | None = None
    """What makes it fit, where it does not; None: nothing does, or nothing has to."""

    @property
    def worst(self) -> Phase:
        """The phase that decides."""
        assert self.limit is not None
        return worst_of(self.phases, self.limit)

    @property
    def fits(self) -> bool | None:
        """None: not known."""
        return None if self.unknown is not None or self.limit is None else self.worst.filling(self.limit) <= 1

    def to_json(self) -> dict[str, Any]:
        """For `posttrain plan --memory --json`."""
        where = {"processes": self.processes, "device": self.device}
        if self.unknown is not None:
            return {**where, "unknown": self.unknown}
        parts = {part: round(self.worst.parts[part]) for part in PARTS if part in self.worst.parts}
        return {
            **where,
            "peak_bytes": round(self.worst.total),
            "phase": self.worst.name,
            "parts": parts,
            "phases": {phase.name: round(phase.total) for phase in self.phases},
            "limit_bytes": self.limit if self.worst.room is None else round(self.worst.room),
            "fits": self.fits,
            "change": None if self.change is None else self.change.to_json(),
        }


def predict(plan: Plan, machine: Machine) -> dict[str, Prediction]:
    """Every stage of the plan that says what memory it takes -> its prediction."""
    shapes = Shapes(plan)
    found = {}
    for name, stage in plan.recipe.stages.items():
        models = shapes.of_inputs(name)
        shapes.add_outputs(name, models)
        if stage.uses.memory is not None and plan.decisions[name].state != "skipped":
            found[name] = _prediction(stage, models, machine)
    return found


def _prediction(stage: RecipeStage, models: Mapping[str, ModelShape | str], machine: Machine) -> Prediction:
    setup = _setup(stage, machine)
    limit = machine.for_each(setup)
    blank = Prediction(setup.processes, setup.device, limit=limit)
    if reasons := [f"input {name}: {shape}" for name, shape in models.items() if isinstance(shape, str)]:
        return replace(blank, unknown="; ".join(reasons))
    known = {name: shape for name, shape in models.items() if isinstance(shape, ModelShape)}
    request = Request(stage.config, known, frozenset(stage.inputs), setup)
    memory = stage.uses.memory
    assert memory is not None
    prediction = replace(blank, phases=tuple(memory(request)))
    if prediction.fits:
        return prediction
    return replace(prediction, change=smallest_change(memory, request, machine))


def _setup(stage: RecipeStage, machine: Machine) -> Setup:
    launch = stage.launch
    device: Device = "cpu" if launch.config == "cpu" or machine.gpu_bytes is None else "cuda"
    return Setup(launch.processes, launched_sharding(launch), device, machine.gpu_bytes)


@dataclass
class Shapes:
    """The shapes of all models that the plan's stages read or write; in place of one, the reason why it is unknown."""

    plan: Plan
    made: dict[tuple[str, str], ModelShape | str] = field(default_factory=dict)
    """(stage, output) -> the model in it."""

    def of_inputs(self, name: str) -> dict[str, ModelShape | str]:
        """Input -> the model behind it, for inputs that take some; of a list `name.1` is the second one's."""
        stage = self.plan.recipe.stages[name]
        return {
            f"{input_name}.{number}" if number else input_name: self._of(reference)
            for input_name, references in stage.inputs.items()
            if set(stage.uses.inputs[input_name].kinds) & set(_MODEL_KINDS)
            for number, reference in enumerate(references)
        }

    def _of(self, reference: Reference) -> ModelShape | str:
        if isinstance(reference, StageOutput):
            return self.made.get((reference.stage, reference.output), f"{reference} is not known")
        resolved = self.plan.externals.get(reference)  # None: of a stage that is not selected
        return f"{reference} was not looked up" if resolved is None else _outside(resolved, self.plan.store)

    def add_outputs(self, name: str, models: Mapping[str, ModelShape | str]) -> None:
        """The models that a stage writes: as they are in the store, or as its inputs and settings say."""
        stage, decision = self.plan.recipe.stages[name], self.plan.decisions[name]
        for output, kind in stage.uses.outputs_of(stage.config).items():
            if kind in _MODEL_KINDS:
                stored = decision.outputs.get(output)
                self.made[name, output] = (
                    _in_store(stored, self.plan.store) if stored else self._planned(stage, output, models)
                )

    def _planned(self, stage: RecipeStage, output: str, models: Mapping[str, ModelShape | str]) -> ModelShape | str:
        if unknown := next((shape for shape in models.values() if isinstance(shape, str)), None):
            return unknown
        if stage.uses.shapes is None:
            return f"stage {stage.uses.name} does not say what model it makes"
        known = {name: shape for name, shape in models.items() if isinstance(shape, ModelShape)}
        return stage.uses.shapes(stage.config, known)[output]


def _outside(resolved: ResolvedInput, store: Store) -> ModelShape | str:
    if resolved.artifact is not None:
        return _in_store(resolved.artifact, store)
    if resolved.kind == "adapter":
        content = (Path(str(resolved.path)) / CONFIG).read_bytes()
        return _with_base(content, resolved.label, store)
    if resolved.path is not None:
        return _read((resolved.path / "config.json").read_bytes())
    return _on_hub(str(resolved.hub), str(resolved.revision))


def _on_hub(name: str, revision: str) -> ModelShape | str:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(path, str):
        return (
            f"{name} is not in the local cache yet, so its sizes are unknown; fetch its config.json with "
            f"`hf download {name} config.json`"
        )
    with open(path, "rb") as file:
        return _read(file.read())


def _in_store(artifact: Artifact, store: Store) -> ModelShape | str:
    adapter = artifact.kind == "adapter"
    name = CONFIG if adapter else "config.json"
    try:
        content = store.files.read(f"{artifact.key}/{PAYLOAD}/{name}")
    except (StoreError, FileNotFoundError) as error:
        return f"the {name} of {artifact.id} cannot be read: {error}"
    return _with_base(content, artifact.id, store) if adapter else _read(content)


def _with_base(content: bytes, where: str, store: Store) -> ModelShape | str:
    """The shape of an adapter's base, with the adapter."""
    try:
        values = read_adapter_config(content, where)
        base, adapters = Base.read(values, where), Adapters.read(values)
    except (StageError, KeyError, TypeError, ValueError) as error:
        return str(error)
    shape = _on_hub(base.name, str(base.revision)) if base.artifact is None else _in_store(base.artifact, store)
    return shape if isinstance(shape, str) else replace(shape, adapters=adapters)


def _read(content: bytes) -> ModelShape | str:
    try:
        return read_shape(json.loads(content))
    except (ValueError, TypeError, AttributeError) as error:
        return f"its config.json is not a model's configuration: {error}"
    except UnknownShapeError as error:
        return str(error)
