"""What only a GPU can show: `python -m pytest tests/gpu`. Everything here is skipped where there is none."""

from __future__ import annotations

import os

import pytest
import torch

from flows.command import stage_variables

# before the first product: cuBLAS reads it once
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", stage_variables(1)["CUBLAS_WORKSPACE_CONFIG"])


@pytest.fixture(autouse=True)
def on_a_gpu() -> None:
    """As stages compute there."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    torch.use_deterministic_algorithms(True)
