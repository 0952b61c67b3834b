"""These tests load vLLM into their process, which changes it; they run by themselves: `pytest -m vllm`."""

import importlib.util
from pathlib import Path

import pytest

REASON = "vLLM is not installed; `make test-vllm` installs it"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if here in item.path.parents:
            item.add_marker("vllm")
            if missing:
                item.add_marker(pytest.mark.skip(reason=REASON))
