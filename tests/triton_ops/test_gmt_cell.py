"""The kernels of `gmt_cell` against the definition in fp64: all modes, odd sizes, every dtype."""

from __future__ import annotations

import pytest
import torch

from kernels import dispatch
from kernels.gmt_cell import MAX_SLOTS, gmt_cell
from tests.gmt_tools import cancelling, cast, cell, define, gradients, nearest_distance, run
from tests.tools import TOLERANCE, assert_close

MODES = pytest.mark.parametrize(("log", "norm"), [(False, False), (False, True), (True, False), (True, True)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def _check(size: tuple[int, int, int], dtype: torch.dtype, log: bool, norm: bool, device: torch.device) -> None:
    count = dispatch.counts["gmt_cell", "triton"]
    args = cast(cell(*size, log=log, norm=norm, device=device), dtype)
    exact = cast(args, torch.float64)
    got, want = run(args), define(exact)
    dy = [torch.randn_like(want[0]).to(dtype), *(torch.randn_like(w) for w in want[1:])]
    wide = [g.double() for g in dy]
    grads = gradients(got, dy, args), gradients(want, wide, exact)
    assert dispatch.counts["gmt_cell", "triton"] == count + 1
    assert_close(got[:3], want, "op", dtype)
    if log:
        (mine, theirs), terms = (g.pop() for g in grads), cancelling(wide, exact)
        assert abs(mine.double() - theirs) <= TOLERANCE["op gradient", dtype] * terms
    assert_close(*grads, "op gradient", dtype)
    assert torch.equal(got.nearest, got.source.argmax(1).int())
    assert_close(got.distance, nearest_distance(exact), "op", torch.float32)


@MODES
@pytest.mark.parametrize("size", [(1, 16, 4), (70, 40, 12), (33, 100, 17), (64, 64, 64)], ids=str)
def test_modes_and_sizes(size: tuple[int, int, int], log: bool, norm: bool, device: torch.device):
    _check(size, torch.float32, log, norm, device)


@MODES
@DTYPES
def test_dtypes(dtype: torch.dtype, log: bool, norm: bool, device: torch.device):
    _check((70, 48, 16), dtype, log, norm, device)


def test_as_many_slots_as_it_takes(device: torch.device):
    _check((65, 32, MAX_SLOTS), torch.float16, True, True, device)


def test_no_tokens(device: torch.device):
    args = cast(cell(0, 16, 4, device=device), torch.float32)
    hop = run(args)
    assert hop.y.shape == (0, 16)
    assert not gradients(hop, [hop.y, hop.source, hop.target], args)[1].any()


def test_what_it_cannot_take_is_said(device: torch.device):
    args = cast(cell(3, 16, MAX_SLOTS, device=device), torch.float32)
    with pytest.raises(dispatch.KernelUnavailable, match=r"more than 64 slots in torch\.float32"):
        gmt_cell(**args)  # pyright: ignore[reportArgumentType]
