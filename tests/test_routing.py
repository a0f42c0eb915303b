"""`kernels.routing`: which row is whose, and the two gathers between tokens and rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.routing import Routes, combine, route, spread
from kernels.routing import reference as forms
from tests.tools import assert_close, poisoned_memory, rel_err, same_bytes, segments

pytestmark = pytest.mark.usefixtures("poison")


def choices(B: int, T: int, memories: int, k: int) -> Tensor:
    """[B, T, k], distinct in a token."""
    return torch.rand(B, T, memories).topk(k).indices


def naive(choice: Tensor, memories: int, shared: bool, sequence: Tensor, sequences: int, valid: Tensor) -> list[list]:
    """The (token, slot) pairs of each segment in time order, by the book."""
    B, T, k = choice.shape
    found: list[list] = [[] for _ in range((memories + shared) * sequences)]
    for b in range(B):
        for t in range(T):
            if not valid[b, t] or sequence[b, t] >= sequences:
                continue
            for s in range(k + shared):
                m = int(choice[b, t, s]) if s < k else memories
                found[m * sequences + int(sequence[b, t])].append(((b * T + t), s))
    return found


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("memories", "k"), [(1, 1), (4, 1), (4, 2), (8, 8)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_lie_where_a_loop_puts_them(memories: int, k: int, shared: bool, packed: bool, padded: bool):
    B, T = 3, 11
    choice = choices(B, T, memories, k)
    valid = torch.rand(B, T) < 0.7 if padded else torch.ones(B, T, dtype=torch.bool)
    sequence, R = torch.arange(B)[:, None].expand(B, T), B
    if packed:  # the last sequence is empty; the last token of all belongs to none
        R = 6
        sequence = torch.tensor([0] * 4 + [1] * 7 + [2] * 11 + [4] * 10 + [R]).view(B, T)
    said = {"sequence": sequence, "sequences": R} if packed else {}
    routes = route(choice, memories, shared=shared, valid=valid if padded else None, **said)
    S, bounds = k + shared, routes.cu_seqlens.tolist()
    want = naive(choice, memories, shared, sequence, R, valid)
    assert len(routes.perm) == B * T * S
    assert len(bounds) == len(want) + 1
    for p, rows in enumerate(want):
        assert routes.perm[bounds[p] : bounds[p + 1]].tolist() == [token * S + slot for token, slot in rows]
    assert routes.offsets.tolist() == [*bounds[::R]]
    assert routes.token.tolist() == [n // S for n in routes.perm.tolist()]
    assert same_bytes(routes.perm[routes.inv.flatten()], torch.arange(B * T * S))


def test_sort_is_stable():
    """Guards against `argsort` without stable=True: inside every segment, time rises (n up to 65536)."""
    for n in (31, 32, 1000, 65536 // 2):
        routes = route(choices(1, n, 8, 2), 8)
        bounds = routes.cu_seqlens.tolist()
        for a, b in itertools.pairwise(bounds):
            assert (routes.token[a:b].diff() > 0).all()


def test_every_assignment_is_counted():
    """Guards against counting by weights: the choice alone decides, whatever a weight rounds to."""
    choice = torch.tensor([[[0, 1]] * 5 + [[2, 0]]])
    assert route(choice, 4).offsets.tolist() == [0, 6, 11, 12, 12]
    assert route(choice, 4, shared=True).offsets.tolist() == [0, 6, 11, 12, 12, 18]


def test_nothing_valid_and_a_single_token():
    none = route(choices(2, 3, 4, 2), 4, shared=True, valid=torch.zeros(2, 3, dtype=torch.bool))
    assert none.cu_seqlens.tolist() == [0] * 11
    assert sorted(none.perm.tolist()) == list(range(18))
    one = route(torch.tensor([[[3]]]), 4)
    assert one.cu_seqlens.tolist() == [0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="how many sequences"):
        route(torch.tensor([[[3]]]), 4, sequence=torch.zeros(1, 1, dtype=torch.int64))


def _case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Routes]:
    B, T, width = 2, 7, (3, 2)
    routes = route(choices(B, T, 4, 2), 4, shared=True, valid=torch.rand(B, T) < 0.8)
    x, o = torch.randn(B, T, *width, dtype=dtype), torch.randn(B * T * 3, *width, dtype=dtype)
    return x, o, torch.rand(B, T, 3, dtype=torch.promote_types(dtype, torch.float32)), routes


def test_spread_and_combine_are_indexing():
    x, o, w, routes = _case()
    assert torch.equal(spread(x, routes), x.flatten(0, 1)[routes.token])
    assert_close(combine(o, w, routes), (o[routes.inv] * w[..., None, None]).sum(2))
    assert spread(x[..., :0], routes).shape == (42, 3, 0)
    assert torch.equal(spread(torch.arange(14).view(2, 7), routes), routes.token), "integers move too"


def test_gradients_are_those_of_indexing():
    x, o, w, routes = _case()
    x, o, w = (t.requires_grad_() for t in (x, o, w))
    assert torch.autograd.gradcheck(lambda x: spread(x, routes), x)
    assert torch.autograd.gradcheck(lambda o, w: combine(o, w, routes), (o, w))
    assert torch.autograd.gradcheck(lambda w: combine(o.detach(), w, routes), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype):
    x, o, w, routes = _case(dtype)
    grad = torch.randn_like(x)
    found, want = [], []
    for cast, out in ((dtype, found), (torch.float64, want)):
        leaves = [t.detach().to(cast if t is not w else torch.promote_types(cast, torch.float32)) for t in (x, o, w)]
        a, b, c = (t.requires_grad_() for t in leaves)
        y = combine(b, c, routes)
        rows = spread(a, routes)
        assert y.dtype == rows.dtype == cast
        out += [y, *torch.autograd.grad(y, (b, c), grad.to(cast)), *torch.autograd.grad(rows, a, rows.detach())]
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert all(rel_err(a, b) <= limit for a, b in zip(found, want, strict=True))


def test_the_general_form_equals_the_fast_one():
    """The sum over slots has a fast form for wide dtypes on a CPU, and one for everything else."""
    o, w = torch.randn(12, 5, dtype=torch.float32), torch.rand(4, 3)
    inv = torch.randperm(12).view(4, 3)
    for weight in (None, w):
        fast = forms._bag(o, inv, weight)
        general = forms._bag(o.half(), inv, weight)
        assert rel_err(general, fast) <= 1e-3


def test_a_compiled_graph_is_whole_and_equal():
    x, _, w, _ = _case()
    x, w = x.requires_grad_(), w.requires_grad_()
    choice = choices(2, 7, 4, 2)

    def layer(x: Tensor, w: Tensor) -> Tensor:
        routes = route(choice, 4, shared=True)
        return combine(spread(x, routes).square(), w, routes)

    want = torch.autograd.grad(layer(x, w).square().sum(), (x, w))
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        assert_close(torch.autograd.grad(compiled(x, w).square().sum(), (x, w)), want)


def test_two_backwards_give_the_same_bytes():
    x, o, w, routes = _case(torch.float32)
    x, o, w = (t.requires_grad_() for t in (x, o, w))

    def grads() -> tuple[Tensor, ...]:
        return torch.autograd.grad((combine(o + spread(x, routes), w, routes) ** 2).sum(), (x, o, w))

    assert same_bytes(grads(), grads())


@pytest.mark.cuda
def test_no_host_synchronisation():
    x, o, w = (t.cuda().requires_grad_() for t in _case(torch.float32)[:3])
    choice, valid = choices(2, 7, 4, 2).cuda(), (torch.rand(2, 7) < 0.8).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with dispatch.use("reference"):
            routes = route(choice, 4, shared=True, valid=valid)
            combine(o + spread(x, routes), w, routes).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_packed_sequences_come_from_boundaries():
    """Row ends included, filled up with empty segments, as the loader gives them."""
    from models.types import segment_ids

    cu = segments([[4, 0, 1, 2], [7]], 7, pad_to=9)
    routes = route(choices(2, 7, 2, 2), 2, sequence=segment_ids(cu, 2, 7), sequences=len(cu) - 1)
    assert routes.cu_seqlens.diff().tolist() == [*cu.diff().tolist()] * 2
    with poisoned_memory():
        assert spread(torch.ones(2, 7, 3), routes).isfinite().all()
