"""The scans over time: the fast forms equal the token-by-token definitions, outputs, final states and gradients, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.decay_linear_attention import decay_linear_attention
from kernels.decay_linear_attention import reference as decay_reference
from kernels.gated_delta_rule import gated_delta_rule
from kernels.gated_delta_rule import reference as delta_reference
from kernels.gla import gla
from kernels.gla import reference as gla_reference
from tests.tools import assert_close

pytestmark = pytest.mark.usefixtures("poison")


@dataclass(frozen=True)
class Scan:
    op: Callable[..., Any]
    recurrent: Callable[..., Any]  # (q, k, v, *gates, scale, initial_state, cu_seqlens)
    gates: str  # letters: d decay per head, c constant decay, x decay per key feature, b writing strength


def _delta(norm: bool, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    *gates, scale, initial, cu = rest
    g, beta = gates if len(gates) == 2 else (None, *gates)
    return delta_reference.recurrent(q, k, v, g, beta, scale, initial, cu, norm)


def _delta_op(norm: bool, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, **how: Any) -> Any:
    g, beta = gates if len(gates) == 2 else (None, *gates)
    return gated_delta_rule(q, k, v, g, beta, qk_l2norm=norm, **how)


def _plain(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    return decay_reference.recurrent(q, k, v, None, *rest)


SCANS = {
    "gated delta": Scan(partial(_delta_op, True), partial(_delta, True), "db"),
    "delta": Scan(partial(_delta_op, True), partial(_delta, True), "b"),
    "decay": Scan(decay_linear_attention, decay_reference.recurrent, "d"),
    "constant decay": Scan(decay_linear_attention, decay_reference.recurrent, "c"),
    "no decay": Scan(decay_linear_attention, _plain, ""),
    "vector decay": Scan(gla, gla_reference.recurrent, "x"),
}


@pytest.fixture(params=SCANS.values(), ids=SCANS)
def scan(request: pytest.FixtureRequest) -> Scan:
    return request.param


def inputs(
    scan: Scan, B: int, T: int, H: int, HV: int, K: int, V: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v and the gates."""
    gates = {
        "d": lambda: -torch.rand(B, T, HV, dtype=dtype),
        "c": lambda: -torch.rand(HV, dtype=dtype),
        "x": lambda: -torch.rand(B, T, H, K, dtype=dtype),
        "b": lambda: torch.rand(B, T, HV, dtype=dtype),
    }
    qkv = [torch.randn(B, T, n, width, dtype=dtype) for n, width in ((H, K), (H, K), (HV, V))]
    return qkv + [gates[letter]() for letter in scan.gates]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def both(
    scan: Scan, given: list[Tensor], initial: Tensor | None, cu: Tensor | None, dtype: torch.dtype
) -> tuple[Any, Any]:
    """-> what the op says in ``dtype`` and what the definition says in fp64: outputs, final state, gradients."""
    said = []
    for kind in (dtype, torch.float64):
        leaves = [x.to(kind).requires_grad_() for x in given]
        state = None if initial is None else initial.to(kind).requires_grad_()
        if kind == dtype and not said:
            o, final = scan.op(*leaves, initial_state=state, output_final_state=True, cu_seqlens=cu)
        else:
            o, final = scan.recurrent(*leaves, leaves[0].shape[-1] ** -0.5, state, cu)
        weights = [torch.cos(torch.arange(x.numel(), dtype=kind)).view_as(x) for x in (o, final)]
        wanted = [*leaves, *([] if state is None else [state])]
        said.append((o, final, torch.autograd.grad((o, final), wanted, weights)))
    return said[0], said[1]


@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 1, 1, 4, 4),
        (1, 2, 1, 2, 3, 5),
        (2, 17, 2, 2, 16, 8),
        (1, 64, 1, 3, 8, 16),
        (1, 65, 2, 4, 16, 32),
        (1, 200, 1, 1, 60, 100),
    ],
    ids=str,
)
@pytest.mark.parametrize("carry", [True, False], ids=["carried", "fresh"])
def test_chunks_equal_tokens(scan: Scan, shape: tuple[int, ...], carry: bool):
    B, _, _, HV, K, V = shape
    given = inputs(scan, *shape)
    initial = torch.randn(B, HV, K, V, dtype=torch.float64) if carry else None
    got, want = both(scan, given, initial, None, torch.float64)
    assert_close(got, want, "forms")


def test_fp32(scan: Scan):
    got, want = both(scan, inputs(scan, 1, 130, 1, 2, 32, 16), torch.randn(1, 2, 32, 16), None, torch.float32)
    assert_close(got, want, "forms", torch.float32)


@pytest.mark.parametrize("lengths", [[63, 64, 65], [0, 0, 1, 15, 0, 130, 2, 0]], ids=str)
def test_segments_with_slack(scan: Scan, lengths: list[int]):
    """Ragged, empty ones among them, over two rows of a batch; rows past the end give zeros everywhere."""
    T = (sum(lengths) + 8) // 2
    given = inputs(scan, 2, T, 1, 2, 8, 6)
    initial = torch.randn(len(lengths), 2, 8, 6, dtype=torch.float64)
    cu = offsets(lengths)
    got, want = both(scan, given, initial, cu, torch.float64)
    assert_close(got, want, "forms")
    end = int(cu[-1])
    assert not got[0].flatten(0, 1)[end:].any()
    assert not any(g.flatten(0, 1)[end:].any() for g in got[2][:3])
    for i, n in enumerate(lengths):
        if n == 0:
            assert torch.equal(got[1][i], initial[i])


def test_nothing_but_empty_segments(scan: Scan):
    given = [x.requires_grad_() for x in inputs(scan, 1, 3, 1, 1, 4, 4)]
    state = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    o, final = scan.op(*given, initial_state=state, output_final_state=True, cu_seqlens=offsets([0, 0]))
    assert not o.any()
    assert torch.equal(final, state)
    *grads, dstate = torch.autograd.grad((o.sum() + final.sum()), (*given, state))
    assert not any(g.any() for g in grads)
    assert (dstate == 1).all()


def test_gradcheck(scan: Scan):
    given = [x.requires_grad_() for x in inputs(scan, 1, 9, 1, 2, 3, 2)]
    state = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    run = partial(scan.op, output_final_state=True, cu_seqlens=offsets([4, 3]))
    assert torch.autograd.gradcheck(lambda *x: run(*x[:-1], initial_state=x[-1]), (*given, state))


@pytest.mark.parametrize("cuts", [[0, 1, 7, 70], [0, 64, 65, 70]], ids=str)
def test_any_split_is_the_whole(scan: Scan, cuts: list[int]):
    given = [x.requires_grad_() for x in inputs(scan, 2, 70, 1, 1, 8, 4)]
    whole, last = scan.op(*given, output_final_state=True)
    outs, state = [], None
    for start, end in pairwise(cuts):
        piece = [x if x.ndim == 1 else x[:, start:end] for x in given]
        o, state = scan.op(*piece, initial_state=state, output_final_state=True)
        outs.append(o)
    assert_close((torch.cat(outs, 1), state), (whole, last), "forms")
    grads = [
        torch.autograd.grad(o.square().sum() + s.square().sum(), given)
        for o, s in ((torch.cat(outs, 1), state), (whole, last))
    ]
    assert_close(grads[0], grads[1], "forms")


@pytest.mark.parametrize("decay", [-50.0, -1e4, 0.0])
def test_extreme_decays(scan: Scan, decay: float):
    if not set(scan.gates) & set("dcx"):
        pytest.skip("no decay")
    given = inputs(scan, 1, 70, 1, 1, 8, 4)
    given[3] = (
        torch.where(torch.rand_like(given[3]) < 0.5, decay, given[3] * 0.1)
        if given[3].ndim > 1
        else torch.full_like(given[3], decay)
    )
    got, want = both(scan, given, torch.randn(1, 1, 8, 4, dtype=torch.float64), None, torch.float64)
    assert all(x.isfinite().all() for x in (got[0], got[1], *got[2]))
    assert_close(got[:2], want[:2], "forms")
    got32, _ = both(scan, given, torch.randn(1, 1, 8, 4, dtype=torch.float64), None, torch.float32)
    assert all(x.isfinite().all() for x in (got32[0], got32[1], *got32[2]))


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("keys", ["random", "zero", "one"])
def test_extreme_writes(beta: float, keys: str):
    scan = SCANS["gated delta"]
    given = inputs(scan, 1, 70, 1, 1, 8, 4)
    given[4] = torch.full_like(given[4], beta)
    if keys == "zero":
        given[0][:, ::3], given[1][:, ::2] = 0, 0
    elif keys == "one":
        given[1][:] = given[1][:, :1]
    given[2] *= 1e4
    got, want = both(scan, given, None, None, torch.float64)
    assert_close(got[:2], want[:2], "forms")
    assert all(x.isfinite().all() for x in got[2])


def test_identities():
    """No decay of the gated delta rule is the delta rule; equal decays of all key features are one decay; a decay that never
    changes is a constant."""
    q, k, v, g, beta = inputs(SCANS["gated delta"], 2, 70, 1, 2, 8, 4)
    assert_close(gated_delta_rule(q, k, v, torch.zeros_like(g), beta), gated_delta_rule(q, k, v, None, beta), "forms")
    one = g[:, :, :1]
    vector = gla(q, k, v, one[..., None].expand(-1, -1, -1, 8), output_final_state=True)
    assert_close(vector, decay_linear_attention(q, k, v, one.expand_as(g), output_final_state=True), "forms")
    constant = g[0, 0]
    assert_close(
        decay_linear_attention(q, k, v, constant.expand_as(g)), decay_linear_attention(q, k, v, constant), "forms"
    )
    t = torch.arange(70)
    dense = (q.repeat_interleave(2, 2).transpose(1, 2) @ k.repeat_interleave(2, 2).permute(0, 2, 3, 1)) * 8**-0.5
    dense = dense * torch.exp((t[:, None] - t).clamp(min=0) * constant[:, None, None]).tril()
    assert_close((dense @ v.transpose(1, 2)).transpose(1, 2), decay_linear_attention(q, k, v, constant)[0], "forms")


def test_integers_are_no_scale(scan: Scan):
    with pytest.raises(TypeError, match="scale"):
        scan.op(*inputs(scan, 1, 3, 1, 1, 4, 4), scale=1)
