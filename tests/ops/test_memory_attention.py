"""`memory_attention`: the tiled form against one mask over all keys, gradients included; documents, pools, edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.chunks import chunks, slots
from kernels.memory_attention import FADING, branches, memory_attention, peers, reference
from kernels.prefix_topm import prefix_topm
from tests.tools import assert_close, same_bytes, segments

pytestmark = pytest.mark.usefixtures("poison")

KINDS = pytest.mark.parametrize("fading", [None, *FADING])


def arguments(
    B: int = 2,
    T: int = 20,
    window: int = 4,
    fading: str | None = "chunk",
    *,
    heads: tuple[int, int] = (4, 2),
    width: int = 3,
    m: int = 3,
    cu: Tensor | None = None,
    dedup: bool = True,
    two_queries: bool = False,
    pool: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Random tensors that record gradients, and the rows that random keys select."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()

    H, kv = heads
    lead = (slots(B, T, cu, window), 2) if fading == "chunk" else (B, T)
    args: dict[str, Any] = {"window": window, "cu_seqlens": cu}
    args |= {"q": leaf(B, T, H, width), "k": leaf(B, T, kv, width), "v": leaf(B, T, kv, width)}
    if fading is not None:
        args |= {"fading": fading, "fading_k": leaf(*lead, kv, width), "fading_v": leaf(*lead, kv, width)}
    if two_queries:
        args["memory_q"] = leaf(B, T, H, width)
    if m:
        index, at = prefix_topm(torch.rand(B, T), window, m, cu_seqlens=cu), chunks(B, T, cu, window)
        args["index"] = index
        args["since"] = (window - (at.row[:, None] - index)).clamp(min=0) if dedup else None
    if pool:
        args["pool"] = (leaf(pool, kv, width), leaf(pool, kv, width))
        args["index"] = torch.where(args["index"] < 0, -1, torch.randint_like(args["index"], pool))
    return args


def run(args: Any) -> Tensor:
    return memory_attention(**args)


def leaves(args: dict[str, Any]) -> list[Tensor]:
    return [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_floating_point()]


def dense(args: dict[str, Any]) -> Tensor:
    names = ("q", "k", "v", "pool_k", "pool_v", "fading_k", "fading_v", "memory_q", "index", "since", "cu_seqlens")
    pool = args.get("pool") or (None, None)
    given = {**args, "pool_k": pool[0], "pool_v": pool[1]}
    options = (args["window"], FADING.index(args.get("fading", "chunk")), args["q"].shape[3] ** -0.5)
    return reference.dense([given.get(name) for name in names], options)


def grads(o: Tensor, do: Tensor, args: dict[str, Any]) -> tuple[Tensor, ...]:
    """Of every float, zeros for those that nothing reads."""
    return torch.autograd.grad((o * do).sum(), leaves(args), allow_unused=True, materialize_grads=True)


def check(args: dict[str, Any], dtype: torch.dtype = torch.float64) -> None:
    o, want = run(args), dense(args)
    assert_close(o, want, "forms", dtype)
    do = torch.randn_like(o)
    found, wanted = grads(o, do, args), grads(want, do, args)
    assert_close(found, wanted, "gradient" if dtype == torch.float64 else "op gradient", dtype)


# -- against the definition


@KINDS
@pytest.mark.parametrize("ragged", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("window", [1, 3, 4, 50])
def test_equals_the_definition(window: int, ragged: bool, fading: str | None):
    """T no multiple of the window; documents of one token, of none, shorter and longer than it; rows that belong to none."""
    cu = torch.tensor([0, 5, 5, 6, 20, 37, 37], dtype=torch.int32) if ragged else None
    for two, m, heads in ((False, 3, (4, 2)), (True, 30, (2, 2)), (True, 0, (3, 1))):
        args = arguments(window=window, fading=fading, cu=cu, two_queries=two, m=m, heads=heads)
        check(args)
        if ragged:
            assert not run(args).flatten(0, 1)[37:].any()


@KINDS
def test_without_a_look_at_the_segments(monkeypatch: pytest.MonkeyPatch, fading: str | None):
    """The form for devices whose numbers the host should not wait for: every slot is computed, those without a chunk too."""
    monkeypatch.setattr(branches, "host_may_look", lambda _: False)
    for ends in ([0, 5, 5, 6, 20, 37, 37], [0, 0, 0], [0, 17, 40, 40, 40]):
        check(arguments(window=4, fading=fading, cu=torch.tensor(ends, dtype=torch.int32), two_queries=True))


@KINDS
def test_many_tiles(fading: str | None):
    """Chunks longer than a tile, and no multiple of it; fp32 too."""
    for dtype in (torch.float64, torch.float32):
        args = arguments(1, 700, 300, fading, m=5, width=4, dtype=dtype)
        check(args, dtype)


def test_rows_of_a_pool():
    """Rows gathered from elsewhere; several chunks use one, and its gradient is the sum."""
    check(arguments(pool=7, m=5))
    check(arguments(pool=2, m=4, dedup=False, fading=None, two_queries=True))


@KINDS
def test_gradcheck(fading: str | None):
    args = arguments(1, 9, 3, fading, width=2, m=2, two_queries=True)
    names = [name for name, t in args.items() if isinstance(t, Tensor) and t.is_floating_point()]

    def outputs(*tensors: Tensor) -> Tensor:
        return run(args | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(outputs, [args[name] for name in names])


def test_half_precision_sums_in_fp32():
    for dtype in (torch.bfloat16, torch.float16):
        args = arguments(2, 40, 8, "band", m=6, width=16, dtype=dtype)
        exact = {
            name: t.detach().double() if isinstance(t, Tensor) and t.is_floating_point() else t
            for name, t in args.items()
        }
        out = run(args)
        assert out.dtype == dtype
        assert_close(out, dense(exact), "op", dtype)


# -- against torch's own attention, where a mask of another make says which key is seen


@KINDS
@pytest.mark.parametrize("ragged", [False, True], ids=["rows", "documents"])
def test_equals_attention_of_torch(ragged: bool, fading: str | None):
    """Kept rows seen from an offset on or from the start, rows of a pool, grouped heads, a query of its own for the memory."""
    cu = torch.tensor([0, 5, 5, 6, 20, 37, 37], dtype=torch.int32) if ragged else None
    kinds: list[dict[str, Any]] = [{"heads": (3, 1)}, {"dedup": False, "two_queries": True}, {"m": 0}, {"pool": 7}]
    for options in kinds:
        args = arguments(window=4, fading=fading, cu=cu, **options)
        o, want = run(args), peers.sdpa(**args)
        assert_close(o, want, "forms")
        do = torch.randn_like(o)
        assert_close(grads(o, do, args), grads(want, do, args), "gradient")


@KINDS
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_equals_flex_attention(fading: str | None):
    """Without gradients, which flex_attention has on GPUs only; blocks with nothing to see, with all, and at a ragged end."""
    for window, cu in ((40, None), (300, torch.tensor([0, 5, 290, 290, 650], dtype=torch.int32))):
        args = arguments(1, 700, window, fading, cu=cu, m=5, width=4, two_queries=cu is not None)
        with torch.no_grad():
            assert_close(run(args), peers.flex(**args), "forms")


@KINDS
def test_blocks_of_flex_attention_are_those_of_the_mask(fading: str | None):
    for window in (1, 40, 300):
        args = arguments(1, 700, window, fading, m=5)
        mask, (first, last) = peers.block_mask(**args), peers.spans(**args)
        row, size = torch.arange(700)[:, None], peers.BLOCK
        dense = F.pad((first <= row) & (row < last), (0, -len(first) % size))
        blocks = [block.unflatten(1, (-1, size)).sum((0, 2)) for block in dense.split(size)]
        seen, pairs = (
            torch.stack(blocks),
            torch.tensor([min(size, 700 - start) for start in range(0, 700, size)]) * size,
        )
        full = torch.zeros_like(seen, dtype=torch.bool)
        touched = full.clone()
        for found, number, index in (
            (touched, mask.kv_num_blocks, mask.kv_indices),
            (full, mask.full_kv_num_blocks, mask.full_kv_indices),
        ):
            assert number is not None
            assert index is not None
            for i, n in enumerate(number[0, 0].tolist()):
                found[i, index[0, 0, i, :n].long()] = True
        assert torch.equal(full, seen == pairs[:, None])
        assert torch.equal(touched, (seen > 0) & ~full)


# -- what it contains


@pytest.mark.parametrize("window", [1, 5, 16, 40])
def test_without_memory_it_is_a_sliding_window(window: int):
    args = arguments(2, 33, window, None, m=0)
    q, k, v = (args[name].transpose(1, 2) for name in ("q", "k", "v"))
    age = torch.arange(33)[:, None] - torch.arange(33)
    mask = (age >= 0) & (age < window)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    assert_close(run(args), want, "forms")


@pytest.mark.parametrize("window", [1, 7, 16])
def test_with_room_for_every_row_it_is_causal_attention(window: int):
    args = arguments(2, 33, window, None, m=33)
    q, k, v = (args[name].transpose(1, 2) for name in ("q", "k", "v"))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert_close(run(args), want, "forms")
    doubled = run(args | {"since": None})
    assert window == 1 or (doubled - want).norm() / want.norm() > 1e-2, "rows in the window count twice without a mask"


@pytest.mark.parametrize("window", [2, 4, 8])
def test_interleaved_is_the_same(window: int):
    """The paper's form: memory tokens stand before each chunk, and a window of W + m over that longer sequence sees, at any
    query, its own W rows and the chunk's m."""
    T, n, m, width = 32, 2, 3, 5
    args = arguments(1, T, window, "chunk", heads=(1, 1), width=width, m=m, dedup=False)
    G = T // window
    blank = torch.zeros(width, dtype=torch.float64)
    rows: list[tuple[Tensor, Tensor, bool, int]] = []  # key, value, is there, the query's row or -1
    for c in range(G):
        for i in range(n):
            rows.append((args["fading_k"][c, i, 0], args["fading_v"][c, i, 0], c > 0, -1))
        for row in args["index"][c].tolist():
            k, v = (args[name][0, row, 0] if row >= 0 else blank for name in ("k", "v"))
            rows.append((k, v, row >= 0, -1))
        for t in range(c * window, (c + 1) * window):
            rows.append((args["k"][0, t, 0], args["v"][0, t, 0], True, t))
    keys, values = (torch.stack([row[i] for row in rows]) for i in (0, 1))  # pyright: ignore[reportArgumentType]
    there = torch.tensor([row[2] for row in rows])
    want = torch.zeros(T, width, dtype=torch.float64)
    for place, (*_, t) in enumerate(rows):
        if t >= 0:
            seen = slice(max(place - window - n - m + 1, 0), place + 1)
            scores = (keys[seen] @ args["q"][0, t, 0] / width**0.5).masked_fill(~there[seen], -float("inf"))
            want[t] = scores.softmax(0) @ values[seen]
    assert_close(run(args)[0, :, 0], want, "forms")


@KINDS
def test_documents_are_alone(fading: str | None):
    lengths, T = [[3, 9, 0, 1, 11], [24]], 24
    cu = segments(lengths, T, pad_to=9)
    args = arguments(2, T, 4, fading, cu=cu)
    together, at = run(args).flatten(0, 1), chunks(2, T, cu, 4)
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        if start == end:
            continue
        mine = slice(int(at.slot[start]), int(at.slot[end - 1]) + 1)
        own = {name: args[name].flatten(0, 1)[None, start:end] for name in ("q", "k", "v")}
        for name in ("fading_k", "fading_v"):
            if fading is not None:
                own[name] = args[name][mine] if fading == "chunk" else args[name].flatten(0, 1)[None, start:end]
        index = torch.where(args["index"][mine] >= 0, args["index"][mine] - start, -1)
        own |= {"index": index, "since": args["since"][mine], "window": 4, "fading": fading or "chunk"}
        assert_close(together[start:end], run(own)[0])


# -- how it is computed


class Largest(TorchDispatchMode):
    """The most numbers that one tensor held."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


def test_nothing_is_as_large_as_a_square_of_the_length():
    T, window = 2048, 16
    args = arguments(1, T, window, "band", heads=(1, 1), m=4, width=2)
    with Largest() as largest:
        run(args).sum().backward()
    assert largest.most <= 2 * window * T


@KINDS
def test_the_same_bytes_every_time(fading: str | None):
    args = arguments(2, 40, 8, fading, m=6, dtype=torch.float32)
    said = []
    for _ in range(2):
        o = run(args)
        said.append((o, torch.autograd.grad(o.square().sum(), leaves(args))))
    assert same_bytes(said[0], said[1])


@pytest.mark.parametrize("T", [1, 3, 4])
def test_chunks_without_memory_are_finite(T: int):
    """No row is kept before the first chunk, and no fading row stands there: an empty branch is no NaN, in gradients neither."""
    for fading in FADING:
        args = arguments(1, T, 4, fading, m=2)
        o = run(args)
        assert o.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), leaves(args)))
        nobody = torch.zeros(3, dtype=torch.int32)
        nothing = arguments(1, T, 4, fading, m=2, cu=nobody)
        assert not run(nothing).any()


@KINDS
def test_compiles_whole(fading: str | None):
    for cu in (None, segments([[4, 5], [9]], 9, pad_to=5)):
        args = arguments(2, 9, 2, fading, cu=cu, two_queries=True)
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        out, want = compiled(args), run(args)
        assert_close(out, want)
        do = torch.randn_like(want)
        assert_close(grads(out, do, args), grads(want, do, args))


def test_what_does_not_fit_is_refused():
    args = arguments()
    for change, message in (
        ({"q": torch.randn(2, 20, 3, 3)}, "3 query heads on 2"),
        ({"k": torch.randn(2, 20, 2, 4)}, "expected q"),
        ({"window": 0}, "window 0"),
        ({"fading": "all"}, "unknown fading 'all'"),
        ({"fading_v": None}, "half of a pair"),
        ({"index": args["index"][:3]}, "index must be"),
        ({"since": args["since"][:, :1]}, "since must be"),
        ({"fading_k": torch.randn(2, 2, 2, 3)}, "fading_k and fading_v must be"),
        ({"pool": (torch.randn(5, 2, 3), torch.randn(5, 2, 4))}, "a pool must be"),
        ({"memory_q": torch.randn(2, 20, 2, 3)}, "memory_q must be"),
    ):
        with pytest.raises(ValueError, match=message):
            run(args | change)
