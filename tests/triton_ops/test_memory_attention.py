"""The kernels of `memory_attention` against the definition in fp64: gradients, every kind of memory, documents, lengths, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from kernels import dispatch
from kernels.memory_attention import MAX_WIDTH_FP32, memory_attention
from tests.ops.test_memory_attention import KINDS, arguments, dense, grads, run
from tests.tools import assert_close, same_bytes

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def _arguments(device: torch.device, *size: Any, **how: Any) -> dict[str, Any]:
    """Of one key head and two query heads unless ``how`` says otherwise."""
    args = arguments(*size, **{"heads": (2, 1), "width": 16, "dtype": torch.float32, **how})
    return tree_map(
        lambda t: t.detach().to(device).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t, args
    )


def _wide(args: dict[str, Any]) -> dict[str, Any]:
    def wide(t: Any) -> Any:
        return t.detach().double().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t

    return tree_map(wide, args)


def _check(args: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """-> (o, gradients)."""
    count, exact = dispatch.counts["memory_attention", "triton"], _wide(args)
    o, want = run(args), dense(exact)
    assert dispatch.counts["memory_attention", "triton"] == count + 1
    assert o.dtype == dtype
    assert_close(o, want, "op", dtype)
    do = torch.randn_like(o)
    found = grads(o, do, args)
    assert_close(found, grads(want, do.double(), exact), "op gradient", dtype)
    return o, *found


@KINDS
@pytest.mark.parametrize("T", [1, 63, 65])
def test_lengths(T: int, fading: str | None, device: torch.device):
    """Shorter than the window, and around the tiles of one."""
    _check(_arguments(device, 1, T, 40, fading, m=5, two_queries=T == 63))


@pytest.mark.parametrize("fading", ["chunk", "band"])
def test_many_tiles(fading: str, device: torch.device):
    """A window of several tiles, of which those in the middle need no mask."""
    _check(_arguments(device, 1, 500, 192, fading, m=70))


@KINDS
def test_documents(fading: str | None, device: torch.device):
    """Of one token, of none, shorter and longer than the window; rows that belong to none get zeros, in gradients too."""
    cu = torch.tensor([0, 5, 5, 6, 27, 39, 39], dtype=torch.int32)
    o, q, k, v, *_ = _check(_arguments(device, 2, 21, 8, fading, heads=(3, 1), m=3, cu=cu))
    assert not any(x.flatten(0, 1)[39:].any() for x in (o, q, k, v))


def test_nobody(device: torch.device):
    """Not one row belongs to a document."""
    args = _arguments(device, 1, 9, 4, "chunk", m=2, cu=torch.zeros(3, dtype=torch.int32))
    o = run(args)
    assert not o.any()
    assert not any(g.any() for g in grads(o, torch.randn_like(o), args))


@DTYPES
def test_dtypes(dtype: torch.dtype, device: torch.device):
    for fading in ("chunk", "point"):
        _check(_arguments(device, 1, 40, 16, fading, m=6, width=24, two_queries=True, dtype=dtype), dtype)


def test_wide_heads(device: torch.device):
    """Of other tiles, and narrower than theirs."""
    _check(_arguments(device, 1, 40, 32, "chunk", m=4, width=96, dtype=torch.bfloat16), torch.bfloat16)


def test_heads(device: torch.device):
    """As many key heads as query heads, and fewer."""
    for heads in ((2, 2), (4, 2)):
        _check(_arguments(device, 2, 20, 16, "self", m=4, heads=heads))


def test_memory_comes_in_any_count(device: torch.device):
    """More rows than a tile holds, none of one kind or of both; rows that the window shows too."""
    for fading, m, dedup in (("chunk", 40, False), ("chunk", 0, True), (None, 1, False)):
        _check(_arguments(device, 1, 40, 16, fading, m=m, dedup=dedup))
    args = _arguments(device, 1, 40, 16, None, m=3)
    args["index"], args["since"] = args["index"][:, :0], args["since"][:, :0]
    _check(args)


def test_rows_of_a_pool(device: torch.device):
    """Several chunks use one row; its gradient is their sum. Rows that nobody uses get zeros."""
    _check(_arguments(device, 1, 40, 8, "chunk", pool=37, m=5))
    _check(_arguments(device, 1, 40, 8, None, pool=2, m=4, dedup=False, two_queries=True))


def test_columns_of_one_product(device: torch.device):
    """Read where they are."""
    wide = torch.randn(2, 20, 4, 16, device=device, requires_grad=True)

    def both(*rows: Tensor) -> list[Tensor]:
        o = memory_attention(*rows, window=16)
        return [o, torch.autograd.grad(o.square().sum(), wide)[0]]

    rows = wide.split((2, 1, 1), 2)
    assert same_bytes(both(*rows), both(*(x.contiguous() for x in rows)))


def test_repeats_to_the_bit(device: torch.device):
    args = _arguments(device, 1, 65, 8, "chunk", m=6)
    do, said = torch.randn(1, 65, 2, 16, device=device), []
    for _ in range(2):
        o = run(args)
        said.append((o, *grads(o, do, args)))
    assert same_bytes(said[0], said[1])


def test_what_it_cannot_take_is_said(device: torch.device):
    args = _arguments(device, 1, 5, 4, None, m=0, width=MAX_WIDTH_FP32 + 1)
    with pytest.raises(dispatch.KernelUnavailable, match="heads of 65, wider than 64"):
        run(args)
    with pytest.raises(dispatch.KernelUnavailable, match=r"there is torch\.float32, torch\.float64"):
        run(
            _arguments(device, 1, 5, 4, None, m=0) | {"q": torch.zeros(1, 5, 2, 16, dtype=torch.float64, device=device)}
        )
