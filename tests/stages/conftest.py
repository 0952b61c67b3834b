"""Fixtures that several modules of stages' tests look at."""

from tests.stages.adapter_chain import chain, run_on_chain
from tests.stages.hub_pushes import hub

__all__ = ["chain", "hub", "run_on_chain"]
