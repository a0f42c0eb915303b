"""The scans against fla-core's naive functions: the same outputs, states and gradients in fp64 and fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decay_linear_attention import decay_linear_attention
from kernels.decay_linear_attention import reference as decay_reference
from kernels.gated_delta_rule import gated_delta_rule
from kernels.gated_delta_rule import reference as delta_reference
from kernels.gla import gla
from kernels.gla import reference as gla_reference
from tests.fla_oracle import fla_module, in_fp64
from tests.tools import assert_close

fla_module("ops")

B, H, K, V = 2, 2, 12, 20
LENGTHS = (1, 17, 63, 65, 130)
SCALE = K**-0.5
Scan = Callable[..., tuple[Tensor, Tensor | None]]


def _mine(name: str) -> tuple[Scan, Scan]:
    """(the recurrence, the public op) as functions of (q, k, v, g, beta, state)."""
    if name == "gated_delta_rule":
        return (
            lambda q, k, v, g, beta, state: delta_reference.recurrent(q, k, v, g, beta, SCALE, state, None, False),
            lambda q, k, v, g, beta, state: gated_delta_rule(
                q, k, v, g, beta, initial_state=state, output_final_state=True
            ),
        )
    reference, op = {
        "decay_linear_attention": (decay_reference, decay_linear_attention),
        "gla": (gla_reference, gla),
    }[name]
    return (
        lambda q, k, v, g, beta, state: reference.recurrent(q, k, v, g, SCALE, state, None),
        lambda q, k, v, g, beta, state: op(q, k, v, g, initial_state=state, output_final_state=True),
    )


def _theirs(oracle: Any, name: str) -> Scan:
    """A naive function as a function of (q, k, v, g, beta, state); each has its own order and layout."""
    f = getattr(oracle, name)
    keep = {"output_final_state": True}
    calls: dict[str, Scan] = {
        "naive_recurrent_gated_delta_rule": lambda q, k, v, g, beta, s: f(q, k, v, beta, g, initial_state=s, **keep),
        "naive_chunk_gated_delta_rule": lambda q, k, v, g, beta, s: f(q, k, v, g, beta, initial_state=s, **keep),
        "delta_rule_recurrence": lambda q, k, v, g, beta, s: _first(_swap, *f(*map(_swap, (q, k, v, beta)), s)),
        "naive_recurrent_simple_gla": lambda q, k, v, g, beta, s: f(q, k, v, g, initial_state=s, **keep),
        "naive_chunk_simple_gla": lambda q, k, v, g, beta, s: f(q, k, v, g, initial_state=s, **keep),
        "naive_recurrent_gla": lambda q, k, v, g, beta, s: f(q, k, v, g, initial_state=s, **keep),
        "naive_recurrent_linear_attn": lambda q, k, v, g, beta, s: f(q, k, v, initial_state=s, **keep),
        "naive_retention": lambda q, k, v, g, beta, s: (_swap(f(*map(_swap, (q, k, v)))), None),
    }
    return calls[name]


def _first(change: Callable[[Any], Any], o: Tensor, state: Any) -> tuple[Tensor, Any]:
    return change(o), state


def _swap(x: Any) -> Any:
    """[B, T, H, ...] <-> [B, H, T, ...]."""
    return x.transpose(1, 2)


PAIRS = {  # our op: fla's module, its function, and whether the decay is none (0), per head (1), per channel (2), constant (3)
    "delta": ("gated_delta_rule", "delta_rule", "delta_rule_recurrence", 0),
    "gated_delta": ("gated_delta_rule", "gated_delta_rule", "naive_recurrent_gated_delta_rule", 1),
    "gated_delta_chunks": ("gated_delta_rule", "gated_delta_rule", "naive_chunk_gated_delta_rule", 1),
    "simple_gla": ("decay_linear_attention", "simple_gla", "naive_recurrent_simple_gla", 1),
    "simple_gla_chunks": ("decay_linear_attention", "simple_gla", "naive_chunk_simple_gla", 1),
    "linear_attention": ("decay_linear_attention", "linear_attn", "naive_recurrent_linear_attn", 0),
    "retention": ("decay_linear_attention", "retention", "naive_retention", 3),
    "gla": ("gla", "gla", "naive_recurrent_gla", 2),
}


def _inputs(length: int, decay: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Unit keys and queries, as the delta rules need; decays from almost none to e^-5 a step."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {
        "q": F.normalize(normal(B, length, H, K), dim=-1),
        "k": F.normalize(normal(B, length, H, K), dim=-1),
        "v": normal(B, length, H, V),
        "beta": normal(B, length, H).sigmoid(),
        "state": normal(B, H, K, V),
    }
    if decay in (1, 2):
        made["g"] = -F.softplus(2 * normal(*((B, length, H), (B, length, H, K))[decay - 1]))
    if decay == 3:
        made["g"] = torch.log1p(-torch.exp2(-5 - torch.arange(H, dtype=torch.float64)))
    return {name: x.to(dtype).requires_grad_(name != "g" or decay != 3) for name, x in made.items()}


def _run(f: Scan, leaves: dict[str, Tensor], with_state: bool) -> dict[str, Tensor]:
    """Outputs, and the gradients of one fixed scalar of them."""
    o, state = f(*(leaves.get(name) for name in ("q", "k", "v", "g", "beta")), leaves["state"] if with_state else None)
    found = {"o": o, "final state": state} if with_state and state is not None else {"o": o}
    weights = torch.Generator().manual_seed(7)
    scalar = sum(
        (x.double() * torch.randn(x.shape, generator=weights, dtype=torch.float64)).sum() for x in found.values()
    )
    taken = {name: x for name, x in leaves.items() if x.requires_grad and (with_state or name != "state")}
    grads = torch.autograd.grad(scalar, list(taken.values()), allow_unused=True)
    return found | {f"d{name}": grad for name, grad in zip(taken, grads, strict=True) if grad is not None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", PAIRS)
def test_equals_naive(name: str, dtype: torch.dtype):
    ours, folder, function, decay = PAIRS[name]
    oracle = fla_module(f"ops.{folder}.naive")
    theirs = _theirs(oracle, function)
    with_state = function != "naive_retention"
    for length in LENGTHS:
        leaves = _inputs(length, decay, dtype)
        with in_fp64(oracle) if dtype == torch.float64 else contextlib.nullcontext():
            want = _run(theirs, leaves, with_state)
        assert all(x.dtype == dtype for x in want.values()), "the oracle left the precision it was asked for"
        for form, f in zip(("recurrent", "op"), _mine(ours), strict=True):
            got = _run(f, leaves, with_state)
            assert_close({key: got[key] for key in want}, want, "forms", dtype, f"{form} at T={length}")


@pytest.mark.parametrize("name", ["gated_delta", "simple_gla", "gla"])
def test_grouped_values_are_repeated_queries(name: str):
    """With two value heads to a query and key head: as if each had a copy of its own."""
    ours, folder, function, decay = PAIRS[name]
    oracle = fla_module(f"ops.{folder}.naive")
    leaves = {key: x.detach() for key, x in _inputs(70, decay, torch.float64).items()}
    narrow = {key: leaves[key][:, :, :1] for key in ("q", "k", "g") if decay == 2 or key != "g"}
    whole = leaves | {key: x.expand(-1, -1, H, -1) for key, x in narrow.items()}
    order = ("q", "k", "v", "g", "beta", "state")
    with in_fp64(oracle):
        want = _theirs(oracle, function)(*(whole[key] for key in order))
    for f in _mine(ours):
        assert_close(f(*((leaves | narrow)[key] for key in order)), want, "forms")
