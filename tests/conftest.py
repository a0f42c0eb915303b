"""What every test gets: one thread, a seed of its own, memory that is NaN until it is written, foreign parts allowed."""

from __future__ import annotations

import zlib

import pytest
import torch

from models import zoo
from tests.tools import poisoned_memory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest):
    """The seed depends on the name of the test only, so a test alone sees what it sees in the whole suite."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def foreign_parts(monkeypatch: pytest.MonkeyPatch):
    """The toys of `tests.toys` stand outside the zoo."""
    monkeypatch.setattr(zoo, "_foreign", True)


@pytest.fixture
def poison():
    with poisoned_memory():
        yield
