"""`prefix_topm`: the scan against the store that takes row after row, ties, documents, stores carried on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.chunks import chunks, slots
from kernels.prefix_topm import prefix_topm, reference
from tests.tools import segments

pytestmark = pytest.mark.usefixtures("poison")


def stream(key: Tensor, size: int, m: int, initial: Tensor | None = None, cu: Tensor | None = None) -> Tensor:
    return reference.streaming(key, torch.zeros(len(key), 0) if initial is None else initial, cu, size, m)


def kept(index: Tensor) -> list[list[int]]:
    return [[i for i in row if i >= 0] for row in index.tolist()]


def test_the_worked_example():
    """Sets of three before chunks of four: 0.60 replaces 0.35 at the second boundary, 0.95 enters at the third."""
    key = torch.tensor([[0.90, 0.20, 0.35, 0.80, 0.10, 0.55, 0.30, 0.60, 0.40, 0.95, 0.25, 0.15, 0.0]])
    assert kept(prefix_topm(key, 4, 3)) == [[], [0, 2, 3], [0, 3, 7], [0, 3, 9]]


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize(("size", "m"), [(1, 1), (1, 5), (3, 2), (4, 3), (4, 4), (5, 13), (8, 1), (50, 3), (7, 60)])
def test_scan_is_the_streaming_rule(size: int, m: int, levels: int):
    """With few levels most keys are equal, so order decides; negative keys, zeros of both signs and no candidates too."""
    for T in (1, 2, size, size + 1, 37):
        key = torch.randint(0, levels, (3, T)).float() - levels // 2
        key[torch.rand(3, T) < 0.1] = -0.0
        key[torch.rand(3, T) < 0.2] = -float("inf")
        found = prefix_topm(key, size, m)
        assert torch.equal(found, stream(key, size, m))
        at = chunks(3, T, None, size)
        for g, rows in enumerate(kept(found)):
            start = int(at.row[g] - at.before[g])
            candidates = int(key.flatten()[start : int(at.row[g])].isfinite().sum())
            assert len(rows) == min(m, candidates)
            assert all(start <= row < at.row[g] for row in rows)


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize(("size", "m"), [(1, 3), (4, 3), (8, 20), (64, 2)])
def test_segments_are_alone(size: int, m: int, levels: int):
    """Empty segments, rows behind the last one, and chunk grids that start anew."""
    lengths = [[5, 0, 1, 12, 6], [24]]
    cu = segments(lengths, 24, pad_to=9)
    key = torch.randint(0, levels, (2, 24)).float()
    found = prefix_topm(key, size, m, cu_seqlens=cu)
    assert len(found) == slots(2, 24, cu, size)
    for s, (start, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        if start == end:
            continue
        alone = prefix_topm(key.flatten()[None, start:end], size, m)
        mine = found[start // size + s :][: len(alone)]
        assert torch.equal(torch.where(mine >= 0, mine - start, mine), alone)
    short = torch.tensor([0, 5, 30], dtype=torch.int32)
    cut = prefix_topm(key, size, m, cu_seqlens=short)
    want = stream(key, size, m, cu=short)
    live = chunks(2, 24, short, size).row < 30
    assert torch.equal(cut[live], want[live])


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize(("size", "m", "at"), [(4, 3, 8), (1, 5, 9), (3, 7, 3), (5, 2, 30)])
def test_a_store_is_carried_on(size: int, m: int, at: int, levels: int):
    """Candidates from before the rows: the set at a boundary, and the rows after it."""
    key = torch.randint(0, levels, (2, 40)).float()
    whole = prefix_topm(key, size, m).view(2, -1, m)
    before = whole[:, at // size]
    there = before >= 0
    initial = key.flatten()[before.clamp(min=0)].masked_fill(~there, -float("inf"))
    rest = key[:, at:]
    found = prefix_topm(rest, size, m, initial_key=initial)
    assert torch.equal(found, stream(rest, size, m, initial))
    rows = torch.cat(((torch.arange(80).view(2, 40)[:, at:]).flatten(), before.flatten()))
    named = torch.where(found >= 0, rows[found.clamp(min=0)], -1).view(2, -1, m)
    assert torch.equal(named, whole[:, at // size :])


def test_a_large_key_of_the_future_pushes_nothing_out():
    key = torch.rand(1, 32)
    calm = prefix_topm(key, 4, 3)
    for j in range(32):
        key_j = key.clone()
        key_j[0, j] = 1e3
        assert torch.equal(prefix_topm(key_j, 4, 3)[: j // 4 + 1], calm[: j // 4 + 1])


def test_of_equals_the_oldest_stay():
    assert kept(prefix_topm(torch.full((1, 12), 0.5), 3, 4))[1:] == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_compiles_whole_and_records_no_gradient():
    key = torch.rand(2, 9, requires_grad=True)
    found = prefix_topm(key, 2, 3)
    assert not found.requires_grad
    compiled = torch.compile(prefix_topm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(key, 2, 3), found)
    cu = segments([[4, 5], [9]], 9, pad_to=5)
    assert torch.equal(compiled(key, 2, 3, cu_seqlens=cu), prefix_topm(key, 2, 3, cu_seqlens=cu))


def test_what_does_not_fit_is_refused():
    for bad in ((torch.rand(3), 2, 1), (torch.rand(1, 3), 0, 1), (torch.rand(1, 3), 1, 0), (torch.rand(1, 0), 1, 1)):
        with pytest.raises(ValueError, match="expected key"):
            prefix_topm(*bad)
    with pytest.raises(ValueError, match="initial_key"):
        prefix_topm(torch.rand(2, 3), 1, 1, initial_key=torch.rand(1, 3))
