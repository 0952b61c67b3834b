"""A plain model from an adapter and its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from stages.stage import Config as StageConfig
from stages.stage import Input, Stage
from stages.training.memory_shape import ModelShape

if TYPE_CHECKING:
    from stages.context import Context


class Config(StageConfig):
    """There is nothing to set."""


def run(context: Context) -> None:
    """Input `adapter` merged into its base in float32: the one it names, or input `base` where it names none."""
    from artifacts.errors import StageError
    from stages.adapters import model_source, source_with
    from stages.training.adapters import load_adapter
    from stages.training.export import write_merged
    from stages.training.model import load_causal_lm
    from stages.training.processes import prepare_process

    prepare_process(context)
    wired = context.has("base")
    source = source_with(context, "adapter", "base") if wired else model_source(context, "adapter")
    if source.adapter is None:
        raise StageError("input adapter is a whole model; there is nothing to merge")
    context.phase("merging")
    adapted = load_adapter(load_causal_lm(source.folder), source.adapter)
    context.counts["adapted_parameters"] = sum(one.numel() for one in adapted.parameters() if one.requires_grad)
    write_merged(adapted.merge_and_unload(), source, context.output("model"))


def shapes(_: Config, models: Mapping[str, ModelShape]) -> dict[str, ModelShape]:
    """That of the base."""
    return {"model": replace(models["adapter"], adapters=None)}


STAGE = Stage(
    name="merge_adapter",
    version=1,
    config=Config,
    inputs={"adapter": Input(("adapter",)), "base": Input(("model",), required=False)},
    outputs={"model": "model"},
    run=run,
    single=True,
    shapes=shapes,
    summary="a plain model from an adapter and the base that it names",
)
