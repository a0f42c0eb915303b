"""`selective_scan` by Triton: outputs, final state and every gradient against the token-by-token definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.selective_scan import reference, selective_scan
from tests.tools import TOLERANCE, Case, assert_close, in_pieces, random_batch, rel_err

# B, T, D, N, lengths of segments (None: whole rows)
Shape = tuple[int, int, int, int, list[int] | None]
SHAPES: dict[str, Shape] = {
    "one": (1, 1, 1, 1, None),
    "odd": (2, 17, 3, 3, None),
    "chunks": (1, 33, 16, 16, None),
    "wide": (1, 9, 5, 33, None),
    "spans": (1, 2, 130, 4, None),
    "ragged": (2, 18, 18, 4, [0, 1, 17, 0, 16, 0]),
}
NAMES = ("u", "delta", "A", "B", "C", "D", "state")


def inputs(shape: Shape, device: torch.device) -> tuple[list[Tensor], Tensor | None]:
    """u, delta, A, B, C, D and the initial state; cu_seqlens. Some channels forget all within a token, some nothing."""
    B, T, D, N, lengths = shape
    cu = None
    if lengths is not None:
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device)

    rates = -3 * random(D, N).abs()
    rates[:, ::3] *= 1e3
    rates[::3] = 0
    segments = B if lengths is None else len(lengths)
    steps = random(B, T, D).abs()
    return [random(B, T, D), steps, rates, random(B, T, N), random(B, T, N), random(D), random(segments, D, N)], cu


def run(dtype: torch.dtype, setting: str, given: list[Tensor], seeds: list[Tensor], cu: Tensor | None):
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(dtype if name in "uBC" else wide).requires_grad_() for name, x in zip(NAMES, given, strict=True)]
    with dispatch.use(setting):
        if setting == "reference":
            y, state = reference.recurrent(*leaves, cu)
        else:
            *args, h0 = leaves
            y, state = selective_scan(*args, initial_state=h0, output_final_state=True, cu_seqlens=cu)
        assert state is not None
        grads = torch.autograd.grad((y, state), leaves, [s.to(x.dtype) for s, x in zip(seeds, (y, state), strict=True)])
    return [y, state], dict(zip(NAMES, grads, strict=True))


def check(got: tuple, want: tuple, dtype: torch.dtype) -> None:
    for a, ref in zip(got[0], want[0], strict=True):
        assert rel_err(a, ref) <= TOLERANCE["op", dtype]
    for name, ref in want[1].items():
        assert got[1][name].isfinite().all(), name
        assert rel_err(got[1][name], ref) <= TOLERANCE["op gradient", dtype], name


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), ("odd", torch.float16), ("chunks", torch.bfloat16)],
    ids=str,
)
def test_equals_the_definition(shape: str, dtype: torch.dtype, device: torch.device):
    given, cu = inputs(SHAPES[shape], device)
    rounded = [x.to(dtype) if name in "uBC" else x for name, x in zip(NAMES, given, strict=True)]
    seeds = [torch.randn_like(given[0]).to(dtype).float(), torch.randn_like(given[6])]
    got = run(dtype, "triton", rounded, seeds, cu)
    exact = [x.double() for x in rounded]
    check(got, run(torch.float64, "reference", exact, [s.double() for s in seeds], cu), dtype)
    assert dispatch.counts["selective_scan", "triton"] > 0
    if cu is not None:
        for x in (got[0][0], *(got[1][name] for name in ("u", "delta", "B", "C"))):
            assert not x.flatten(0, 1)[int(cu[-1]) :].any()


def test_bare_rows(device: torch.device):
    """No skip, no states, nothing kept where no backward follows."""
    given, _ = inputs((2, 18, 3, 4, None), device)
    u, delta, A, B, C, _, _ = given
    y, none = selective_scan(u, delta, A, B, C)
    assert none is None
    want, _ = reference.recurrent(*(x.double() for x in (u, delta, A, B, C)), None, None, None)
    assert rel_err(y, want) <= TOLERANCE["op", torch.float32]
    leaves = [x.requires_grad_() for x in (u, delta, A, B, C)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    got = torch.autograd.grad(selective_scan(*leaves)[0].sum(), leaves)
    ref = torch.autograd.grad(reference.recurrent(*exact, None, None, None)[0].sum(), exact)
    assert all(rel_err(a, b) <= TOLERANCE["op gradient", torch.float32] for a, b in zip(got, ref, strict=True))


def test_inputs_of_any_layout(device: torch.device):
    """B and C out of one projection, transposed rates and states, and u with time last are read as what they are."""
    given, _ = inputs((2, 18, 3, 4, None), device)
    both = torch.cat((given[3], given[4]), -1)
    given[3], given[4] = both.split(4, -1)
    given[0], given[1] = (x.mT.contiguous().mT for x in given[:2])
    given[2], given[6] = given[2].T.contiguous().T, given[6].mT.contiguous().mT
    seeds = [torch.randn(2, 3, 18, device=device).mT, torch.randn(2, 4, 3, device=device).mT]
    want = run(torch.float64, "reference", [x.double() for x in given], [s.double() for s in seeds], None)
    check(run(torch.float32, "triton", given, seeds, None), want, torch.float32)


def test_what_has_no_kernel(device: torch.device):
    for shape, dtype, reason in (
        ((1, 2, 3, 65, None), torch.float32, "N is 65"),
        ((1, 2, 3, 4, None), torch.float64, "u is"),
    ):
        given = [x.to(dtype) for x in inputs(shape, device)[0][:6]]
        with pytest.raises(dispatch.KernelUnavailable, match=reason):
            selective_scan(*given)


@torch.no_grad()
def test_a_mixer_decodes(device: torch.device):
    """Prefill by the scan, tokens by the step, padding among both: outputs and states of the reference forms."""
    model = Case("", "mixer", {"kind": "mamba", "d_state": 4}).build(torch.float32, n_layers=1).to(device)
    tokens = random_batch(2, 7, targets=False).tokens.to(device)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[1, 2], valid[0, 5] = False, False
    said = []
    for setting in ("triton", "reference"):
        with dispatch.use(setting):
            said.append(in_pieces(model, tokens, [5, 1, 1], max_len=8, valid=valid)[:2])
    assert_close((said[0][0][valid], said[0][1]), (said[1][0][valid], said[1][1]), "op", torch.float32)
    assert dispatch.counts["recurrent_step", "triton"] > 0
