"""The patched interpreter computes with bf16 what the hardware does, and refuses what it cannot."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def _arithmetic(x, y, out, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.bfloat16)
    at = tl.arange(0, BLOCK)
    for i in range(n):
        total = total + tl.load(x + at) * tl.load(y + at) * i
    total = tl.where(at > 3, -total, total)
    tl.store(out + at, total)


@triton.jit
def _product(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at), input_precision="ieee"))


@triton.jit
def _sum(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK)), 0))


def test_arithmetic_and_rounding(device: torch.device):
    x, y = (torch.randn(64, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(x)
    _arithmetic[(1,)](x, y, out, 3, BLOCK=64)
    want = torch.zeros_like(x)
    for i in range(3):
        want = want + x * y * i
    want[4:] = -want[4:]
    if device.type == "cpu":
        assert torch.equal(out, want)
    else:  # a GPU may fuse product and sum
        torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_and_casts(dtype: torch.dtype, device: torch.device):
    x, y = (torch.randn(32, 32, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(x)
    _product[(1,)](x, y, out, N=32)
    torch.testing.assert_close(out, (x.double() @ y.double()).to(dtype))


def test_reductions_of_bf16_are_refused(device: torch.device):
    if device.type != "cpu":
        pytest.skip("only the interpreter has them wrong")
    with pytest.raises(Exception, match="widen to fp32"):
        _sum[(1,)](torch.ones(8, dtype=torch.bfloat16), torch.empty(1), BLOCK=8)
