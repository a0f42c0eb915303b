"""Geometry of a path-star in embeddings: known shapes by construction, random ones by chance, and a whole run."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from data.synthetic.path_star import PathStar
from eval import geometry
from models.folder import load_model
from tests.runs import PLAIN, train, write_config

DEGREE, LENGTH = 9, 5
NODES = DEGREE * (LENGTH - 1) + 1


def test_the_laplacian_by_hand():
    """Edges as the task has them; rows sum to zero; one component."""
    task = PathStar(degree=DEGREE, length=LENGTH)
    paths = task.paths
    order = [int(paths[0, 0]), *paths[:, 1:].flatten().tolist()]
    found = geometry.laplacian(DEGREE, LENGTH)
    expected = torch.zeros(NODES, NODES, dtype=torch.float64)
    for path in paths.tolist():
        for a, b in pairwise(path):
            i, j = order.index(a), order.index(b)
            expected[i, j] = expected[j, i] = -1.0
    expected -= expected.sum(dim=1).diag()
    assert torch.equal(found, expected)
    values = torch.linalg.eigvalsh(found)
    assert values[0].abs() < 1e-12
    assert values[1] > 0.01
    assert (values[1:DEGREE] - values[1]).abs().max() < 1e-12  # the low eigenvectors are one space
    assert values[DEGREE] > values[1] + 0.01


def test_a_perfect_geometry():
    """Vectors made of the low eigenvectors, turned, scaled and moved anywhere."""
    low = torch.linalg.eigh(geometry.laplacian(DEGREE, LENGTH)).eigenvectors[:, 1:DEGREE]
    turned = 3.0 * low @ torch.linalg.qr(torch.randn(DEGREE - 1, DEGREE - 1, dtype=torch.float64)).Q + 5.0
    found = geometry.geometry(turned, DEGREE, LENGTH)
    assert found["energy"] == pytest.approx(1.0, abs=1e-9)
    assert found["overlap"] == pytest.approx(1.0, abs=1e-9)
    assert found["within"] == pytest.approx(1.0, abs=1e-9)
    assert found["across"] == pytest.approx(-1 / (DEGREE - 1), abs=1e-9)
    assert found["nearest"] == 1.0


def test_arms_alone():
    """One direction for each arm: all cosines are known, and the space is near to that of the Laplacian, but not it."""
    x = torch.cat([torch.zeros(1, DEGREE), torch.eye(DEGREE).repeat_interleave(LENGTH - 1, dim=0)])
    found = geometry.geometry(x, DEGREE, LENGTH)
    assert found["within"] == pytest.approx(1.0, abs=1e-4)
    assert found["across"] == pytest.approx(-1 / (DEGREE - 1), abs=0.01)
    assert found["nearest"] == 1.0
    assert 0.8 < found["energy"] < 0.999
    assert 0.8 < found["overlap"] < 0.999


@pytest.mark.parametrize("width", [16, DEGREE - 1, 3], ids=["wide", "as modes", "narrow"])
def test_random_vectors_are_at_chance(width: int):
    """Also where they have fewer features than the low eigenvectors span."""
    torch.manual_seed(0)
    draws = [geometry.geometry(torch.randn(NODES, width), DEGREE, LENGTH) for _ in range(200)]
    for name, expected in geometry.chance(DEGREE, LENGTH, width).items():
        mean = sum(draw[name] for draw in draws) / len(draws)
        assert mean == pytest.approx(expected, abs=0.015), name


def test_wrong_arms_are_seen():
    """The perfect vectors given to the nodes in another order are no geometry."""
    low = torch.linalg.eigh(geometry.laplacian(DEGREE, LENGTH)).eigenvectors[:, 1:DEGREE]
    found = geometry.geometry(low[torch.randperm(NODES, generator=torch.Generator().manual_seed(0))], DEGREE, LENGTH)
    assert found["energy"] < 0.5
    assert found["nearest"] < 0.5


# -- a run


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "head"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_config(tmp_path_factory.mktemp("star"), {**PLAIN, "tied": request.param})
    raw = yaml.safe_load(path.read_text())
    raw["data"] = {"synthetic": {"kind": "path_star"}, "seq_len": 7}
    raw["train"] |= {"val_tokens": 140, "keep": 9}
    path.write_text(yaml.safe_dump(raw))
    result = train(path)
    assert result.code == 0, result.err
    return result.run


def test_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]):
    """Of the task's nodes in the saved weights; an older checkpoint has a file of its own."""
    assert geometry.main([str(run)]) == 0
    printed = capsys.readouterr().out
    stored = json.loads((run / "eval" / "geometry_12.json").read_text())
    model, _ = load_model(run)
    assert stored["geometry"].keys() == ({"embedding"} if model.cfg.tied else {"embedding", "head"})
    paths = torch.from_numpy(PathStar().paths)
    order = torch.cat([paths[:1, 0], paths[:, 1:].reshape(-1)])
    weights = {"embedding": model.embed.weight, "head": model.head_weight}
    for name, found in stored["geometry"].items():
        assert found == pytest.approx(geometry.geometry(weights[name].detach()[order], 12, 5))
        assert f"| {name}" in printed
    assert "| random" in printed
    assert stored["chance"] == geometry.chance(12, 5, model.cfg.d_model)
    assert geometry.evaluate(run, step=3)["config"]["step"] == 3
    assert (run / "eval" / "geometry_3.json").is_file()


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_config(tmp_path)
    raw = yaml.safe_load(path.read_text())
    raw["data"] = {"synthetic": {"kind": "flip_flop"}, "seq_len": 8}
    raw["train"] |= {"val_tokens": 80, "steps": 1}
    path.write_text(yaml.safe_dump(raw))
    result = train(path)
    assert result.code == 0, result.err
    assert geometry.main([str(result.run)]) == 2
    assert "not trained on the task path_star" in capsys.readouterr().err
    assert geometry.main([str(tmp_path / "none")]) == 2
