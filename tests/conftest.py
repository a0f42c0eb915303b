"""What tests get: one thread, a seed of their own, foreign parts; on request, poisoned memory and the contract cases."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch

from models import LM, zoo
from tests.cases import ALL
from tests.tools import Case, poisoned_memory


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


@pytest.fixture(params=ALL, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def model(case: Case) -> LM:
    return case.build().eval()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`ablate.py` starts this instead of `train.py`. -> the folder that `write_question` writes to."""
    from eval import ablation_queue, ablation_report
    from tests.stand_in import PLOTS, STAND_IN

    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(ablation_queue, "TRAIN", script)
    for name in PLOTS:
        monkeypatch.setattr(ablation_report, name, lambda *_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path
