"""How much memory a stage's process needs at most, and what for: arithmetic on sizes, without torch.

A stage passes through phases (a training step, a pass of its reference, sampling); its peak is that of the largest.
All numbers are bytes of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from stages.sharding import Whole
from stages.training.memory_activations import (
    Layers,
    attention_gradient_bytes,
    passing_bytes,
    saved_bytes,
    stream_bytes,
)
from stages.training.memory_adapters import Adapters
from stages.training.memory_allocator import ALLOCATOR_SHARE, Device, room_for, slack
from stages.training.memory_head import HeadUse, held_tensors, scoring_bytes
from stages.training.memory_phase import Phase, phase
from stages.training.memory_request import Passes, Request, frozen_bytes
from stages.training.memory_shape import ModelShape
from stages.training.memory_training import Setup, Training

_FLOAT = 4


def training_step(training: Training, work: Passes, use: HeadUse, *, reference: float = 0) -> Phase:
    """A step, once the optimizer has its state. `reference`: other models that stay.

    The worst moment is one of five: in the head, with the activations of all layers; in the backward pass of the last
    attention; at the end of it, with all gradients; in the update; on a CPU, where a quantized model is written.
    """
    state = training.state()
    moments = _moments(training, work, use, state)
    worst = max(moments, key=lambda parts: sum({**state, **parts}.values()))
    parts = {**state, **worst, "checkpoint": _copied_bytes(training), "reference": reference}
    return phase("training step", parts, training.setup)


def _moments(
    training: Training, work: Passes, use: HeadUse, state: Mapping[str, float]
) -> Iterator[Mapping[str, float]]:
    """What each of the moments of a step holds that is not, or not as much, in the state between steps.

    What is whole adds the head's gradient to its own in place; with slices there is a second one in every later pass of
    a step, until its end.
    """
    shape, setup, layers = training.shape, training.setup, training.layers
    whole, several = isinstance(setup.sharding, Whole), work.count > 1
    held = held_tensors(
        shape,
        use,
        work.read,
        device=setup.device,
        compute=training.weight,
        frozen=not training.trains_head,
        in_place=whole and several and not training.bf16 and (use.together or setup.device == "cpu"),
    )
    saved = saved_bytes(layers, work.tokens, work.read, work.longest)
    inside = _activation_slack(shape, setup.device, work.tokens)
    streams = stream_bytes(layers, work.tokens)
    unpacked = training.dequantized
    before = state["gradients"] if several else 0.0
    embedding = shape.embedding_parameters * _FLOAT if layers.all_trained else 0
    yield {
        "gradients": before,
        "activations": inside * (saved + streams) + unpacked,
        "head": room_for(held, setup.device) + training.widened_head,
    }
    attention = attention_gradient_bytes(layers, work.tokens, work.read)
    yield {
        "gradients": before,
        "activations": inside * (saved + streams + attention) + unpacked,
        "head": 0 if shape.classifier or (whole and several) else slack(embedding, setup.device) * embedding,
    }
    yield {
        "gradients": state["gradients"] + (embedding if several and not whole else 0),
        "activations": inside * streams + unpacked,
    }
    yield {"gradients": state["gradients"], "optimizer": state["optimizer"] + training.optimizer.update}
    if setup.device == "cpu" and training.exported:
        yield {"gradients": 0.0, "weights": state["weights"] + training.exported}


def _copied_bytes(training: Training) -> float:
    """Of copies of trained weights on a CPU: of slices to be written (what is whole is written as it is), and of the
    best so far."""
    setup = training.setup
    if setup.device != "cpu":
        return 0
    whole = isinstance(setup.sharding, Whole)
    gathered = 0 if whole else (training.trained * training.updated + training.optimizer.state) / setup.processes
    return gathered + (training.trained * training.updated if training.keeps_best else 0)


def _activation_slack(shape: ModelShape, device: Device, tokens: int) -> float:
    """What is held of activations over what is in use: by the size of the largest."""
    return slack(_FLOAT * tokens * shape.intermediate, device)


def scoring(
    shape: ModelShape,
    setup: Setup,
    work: Passes,
    *,
    resident: Mapping[str, float] | None = None,
    own: str | None = "weights",
    bf16: bool = False,
) -> Phase:
    """A pass without gradients beside what is `resident`. `own`: the part that the model's own weights go to; None:
    they are among what is resident."""
    layers = Layers(shape, 2 if bf16 else _FLOAT, setup.device)
    beside = 1 + ALLOCATOR_SHARE[setup.device]
    held = dict(resident or {})
    if own is not None:
        held[own] = held.get(own, 0) + frozen_bytes(shape, setup.device, bf16=bf16)
    inside = _activation_slack(shape, setup.device, work.tokens) * passing_bytes(layers, work.tokens)
    # the head comes after the layers, with their last states still there
    states = beside * layers.compute * shape.hidden * (work.tokens + work.read)
    head = beside * scoring_bytes(shape, work.read, device=setup.device)
    if setup.device == "cpu":
        # A heap keeps what it has had, and later passes cut up the room of the head: measured, it is taken four times.
        most = {"activations": inside, "head": 4 * head}
    else:
        most = {"activations": inside} if inside >= states + head else {"activations": states, "head": head}
    return phase("scoring", {**held, **most}, setup)


def reference_scoring(request: Request) -> list[Phase]:
    """The pass of the reference over pairs, which may share no token; none where it was made before."""
    if "reference_logprobs" in request.wired:
        return []
    scored = request.passes(row=2 * request.longest, rows=request.config.shard_rows)
    weights = {"weights": request.training.state()["weights"]}
    own = None if request.reference_is_policy else "reference"
    reference = request.models.get("reference", request.model)
    return [scoring(reference, request.setup, scored, resident=weights, own=own, bf16=request.config.bf16)]


def same_shape(config: Any, models: Mapping[str, ModelShape]) -> dict[str, ModelShape]:
    """`Stage.shapes` of a stage that trains: its model has the shape of input `model`, its adapter is on that."""
    model = models["model"]
    return {
        "model": replace(model, adapters=None),
        "adapter": replace(model, adapters=Adapters.written(config) or model.adapters),
    }
