"""Fixtures that several modules of stages' tests look at."""

import sys

import pytest

from tests.stages.adapter_chain import chain, run_on_chain
from tests.stages.hub_pushes import hub

__all__ = ["chain", "hub", "run_on_chain"]


@pytest.fixture(autouse=True)
def _fresh_process() -> None:
    """As far as accelerate knows, which is only loaded where a stage needs it."""
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
