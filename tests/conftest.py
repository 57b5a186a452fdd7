"""Without a card, the Triton kernels run under Triton's interpreter, chosen before they are imported."""

from __future__ import annotations

import os

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()

if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA card")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
