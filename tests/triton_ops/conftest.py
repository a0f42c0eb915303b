"""Triton kernels against their references: interpreted on the CPU in a process with TRITON_INTERPRET=1, native where CUDA is.

Everything here is skipped in any other process; `make test` starts one with the variable for this folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from tests.triton_ops import interpreter

    interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETED or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 or a CUDA device")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def poisoned(poison: None):
    """What a kernel does not write is NaN."""


@pytest.fixture(autouse=True)
def by_triton():
    """Every op that has a Triton form runs it here, or says why it cannot."""
    from kernels import dispatch

    with dispatch.use("triton"):
        yield
