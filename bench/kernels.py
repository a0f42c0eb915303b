"""Ops against the plain form that the same machine would otherwise run; refused for an op that is not equal to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.pairs import alternate
from kernels.cross_entropy import linear_cross_entropy
from kernels.cross_entropy import reference as cross_entropy_reference
from kernels.rms_norm import reference as rms_norm_reference
from kernels.rms_norm import rms_norm
from kernels.rope import reference as rope_reference
from kernels.rope import split_rotate
from kernels.swiglu import reference as swiglu_reference
from kernels.swiglu import swiglu


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    ours: Callable[..., Any]
    peer: Callable[..., Any]
    inputs: tuple[Tensor, ...]  # those that require a gradient get one in every run
    extra: tuple[Any, ...] = ()
    peer_name: str = "plain PyTorch"
    most_pairs: int | None = None
    truth: Callable[..., Any] | None = None  # what ours has to equal, where that is not the peer
    error: float = 1e-5  # by which results may differ, relative


def cases(device: str) -> list[Case]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).requires_grad_()

    found = []
    for rows, width, vocab in ((4096, 128, 257), (2048, 256, 8192)):
        targets = torch.randint(vocab, (rows,), device=device)
        found.append(
            Case(
                "linear_cross_entropy",
                f"{rows}x{width}, V={vocab}",
                linear_cross_entropy,
                cross_entropy_reference.whole,
                (leaf(rows, width), leaf(vocab, width)),
                (targets,),
            )
        )
    for rows, width in ((4096, 128), (2048, 512)):
        x = (leaf(rows, width), leaf(width))
        found.append(Case("rms_norm", f"{rows}x{width}", rms_norm, rms_norm_reference.whole, x, (1e-5,)))
        found.append(Case("swiglu", f"{rows}x{6 * width}", swiglu, swiglu_reference.whole, (leaf(rows, 6 * width),)))
        angle = torch.rand(1, rows, 1, 16, device=device)
        heads = width // 32
        qkv = leaf(1, rows, 3 * heads, 32)
        extra = (angle.cos(), angle.sin(), heads, heads)
        found.append(Case("split_rotate", f"{rows}x{3 * heads}x32", split_rotate, rope_reference.whole, (qkv,), extra))
    return found


def _run(fn: Callable[..., Any], case: Case, above: list[Tensor] | None = None) -> list[Tensor]:
    """Forward, and backward from the gradients that arrive from ``above``, if there are any; -> outputs and gradients."""
    out = fn(*case.inputs, *case.extra)
    outs = list(out) if isinstance(out, tuple) else [out]
    if not above:
        return outs
    learned = [o for o in outs if o.requires_grad]
    grads = torch.autograd.grad(learned, case.inputs, above, allow_unused=True, materialize_grads=True)
    return [*outs, *grads]


def measure(case: Case, pairs: int) -> dict[str, Any]:
    """The plain form's time over ours, forward and backward together. Raises RuntimeError when the results differ."""
    draw = torch.Generator(case.inputs[0].device).manual_seed(0)
    above = [
        torch.empty_like(o).normal_(generator=draw) for o in _run(case.truth or case.peer, case) if o.requires_grad
    ]
    results = zip(_run(case.ours, case, above), _run(case.truth or case.peer, case, above), strict=True)
    for a, b in results:
        error = ((a - b).norm() / b.norm().clamp(min=1e-12)).item()
        if error > case.error:
            raise RuntimeError(
                f"{case.op} {case.shape} differs from its definition by {error:.1e}: no speed is reported"
            )
    pairs = min(pairs, case.most_pairs or pairs)
    warmup = 1 if case.most_pairs else 2
    ratio = alternate(
        lambda: _run(case.ours, case, above),
        lambda: _run(case.peer, case, above),
        pairs,
        f"{case.op} {case.shape}",
        warmup,
    )
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "peer": case.peer_name, "pairs": pairs}
    return row | {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| op | shape | peer | speed ours / peer, forward + backward (95 % interval) | pairs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r['op']} | {r['shape']} | {r['peer']} "
            f"| {r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}] | {r['pairs']} |"
        )
    return "\n".join(lines)
