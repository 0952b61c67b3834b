"""Fixtures that several modules of stages' tests look at."""

from tests.stages.adapter_chain import chain, run_on_chain

__all__ = ["chain", "run_on_chain"]
