"""What all tests share: no network, and GPU tests only where there is a GPU."""

from __future__ import annotations

import os

import pytest

# Read by huggingface_hub when it is imported; an unreachable hub costs 23 s of retries.
os.environ["HF_HUB_OFFLINE"] = "1"

collect_ignore = ["plugin"]  # another distribution: tests/test_plugins.py installs it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where PyTorch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
