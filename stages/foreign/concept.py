"""One thing that a recipe may want, and the names that other tools have for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TRL, TRANSFORMERS, PEFT = "TRL", "transformers", "peft"
AXOLOTL, FACTORY, VERL, COMMON = "Axolotl", "LLaMA-Factory", "verl", "common usage"
VLLM = "vLLM"


@dataclass(frozen=True)
class Concept:
    """One thing that a recipe may want, under the names that it has elsewhere."""

    called: Mapping[str, str]
    """Name elsewhere -> whose it is."""
    fields: tuple[str, ...] = ()
    """Fields, inputs or launch settings that do it here, of which a stage has one; none: `note` says what is done."""
    written: str = ""
    """How a recipe has it, where that is more than the name of the field."""
    note: str = ""
    stage: str = ""
    """The stage that has it, where few others do; said of stages that have not."""


def called(whose: str, *names: str) -> dict[str, str]:
    """Names that one tool has."""
    return dict.fromkeys(names, whose)
