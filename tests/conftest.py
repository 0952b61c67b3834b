"""What tests of several folders use."""

from __future__ import annotations

import pytest


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product in float32 is oneDNN's, however small, whatever the processor."""
    import torch

    from stages.losses import products

    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "LEAST_WORK", 0)
    monkeypatch.setattr(products, "_has_faster_kernels", lambda: True)
