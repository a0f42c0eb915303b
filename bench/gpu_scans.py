"""Scans on an accelerator: nanoseconds per token and head, share of the floor, memory, beside fla-core's kernels and attention.

Nothing is timed before it was compared with our plain form in fp32; a peer that differs gets no time but its error.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.floors import Peaks
from bench.pairs import timed
from bench.scans import SCANS, Scan, Selective, Shape, fla_form
from kernels import dispatch

LENGTHS, WIDTHS = (2048, 8192, 32768), (64, 128, 256)
TOKENS, FEATURES = 32768, 2048  # of one run: B = TOKENS / T and H = FEATURES / K, so that a GPU is full at every T
CHECKED = 2048  # tokens that are compared before anything is timed
# Of bf16 results against fp32 ones, ||difference|| / ||result||: outputs, gradients of q, k and v, of the gates.
TOLERANCES = (5e-3, 8e-3, 8e-3, 8e-3, 2e-2, 2e-2)


def shapes(tiny: bool) -> list[Shape]:
    if tiny:
        return [Shape(2, 70, 2, 16)]
    return [Shape(TOKENS // t, t, FEATURES // width, width) for width in WIDTHS for t in LENGTHS]


def measure(
    scan: Scan, shape: Shape, limits: Peaks, device: str, pairs: int, dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, Any]]:
    """Rows of the table: forward alone, then with backward. Raises RuntimeError when our own op is not equal to its plain form."""
    peers: dict[str, Callable[..., Tensor] | None] = {"fla": fla_form(scan)}
    if not isinstance(scan, Selective):  # its q and k are those of all heads, and narrow
        peers["sdpa"] = attention
    wrong = {}
    small = Shape(1, min(shape.length, CHECKED), min(shape.heads, 4), shape.width)
    errors = compare(scan, scan.ours, small, dtype, device)
    if any(e > limit for e, limit in zip(errors, TOLERANCES, strict=False)):
        raise RuntimeError(
            f"{scan.op} {scan.title(shape)} differs from its plain form by {max(errors):.1e}: no speed is reported"
        )
    if peers["fla"] is not None:
        found = compare(scan, peers["fla"], small, dtype, device)
        if any(e > limit for e, limit in zip(found, TOLERANCES, strict=False)):
            wrong["fla"], peers["fla"] = max(found), None
    runs = {"ours": scan.ours, **{name: f for name, f in peers.items() if f is not None}}
    inputs = scan.inputs(shape, dtype, device)
    forward, backward = scan.floor(shape.width, shape.width, 64 if shape.width <= 128 else 32)
    rows = []
    for what, floor in (("forward", forward), ("forward + backward", forward + backward)):
        tasks = {name: _task(f, inputs, what != "forward") for name, f in runs.items()}
        seconds = rounds(tasks, pairs)
        row: dict[str, Any] = {"op": scan.op, "shape": scan.title(shape), "pass": what, "pairs": pairs, "wrong": wrong}
        row["ns"] = {name: statistics.median(s) / shape.units * 1e9 for name, s in seconds.items()}
        row["ratio"] = {name: ratio(seconds, name) for name in seconds if name != "ours"}
        row["floor"] = floor.seconds(limits) * shape.units / statistics.median(seconds["ours"])
        row["peak_bytes"] = {name: peak_bytes(task, device) for name, task in tasks.items()}
        rows.append(row)
    return rows


def attention(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> Tensor:
    """Causal softmax attention on the same q, k and v: what a mixer of the same width would otherwise cost."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def compare(scan: Scan, form: Callable[..., Tensor], shape: Shape, dtype: torch.dtype, device: str) -> list[float]:
    """Relative errors of the output and of all gradients, against our plain form on the same numbers in fp32."""
    inputs = scan.inputs(shape, dtype, device)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    grad = torch.randn(inputs[2].shape, device=device)
    with dispatch.use("reference"), _exact_products():
        expected = _all(scan.ours, exact, grad)
    found = _all(form, inputs, grad.to(dtype))
    return [((a.float() - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(found, expected, strict=True)]


def _all(form: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    o = form(*inputs)
    return [o.detach(), *torch.autograd.grad(o, inputs, grad)]


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """No TF32 in what others are compared with."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _task(form: Callable[..., Tensor], inputs: Sequence[Tensor], backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(lambda: form(*inputs))
    grad = torch.randn_like(inputs[2])

    def run() -> object:
        o = form(*inputs)
        return torch.autograd.grad(o, list(inputs), grad, allow_unused=True)  # attention has no gates

    return run


def rounds(tasks: dict[str, Callable[[], object]], pairs: int) -> dict[str, list[float]]:
    """Seconds of each task in each of ``pairs`` rounds, in turn and in changing order, after two rounds that warm up."""
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for i in range(pairs + 2):
        for name in list(tasks)[:: 1 if i % 2 else -1]:
            seconds = timed(tasks[name])
            if i >= 2:
                found[name].append(seconds)
    return found


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    """A peer's time over ours, the median over rounds: above 1, ours is faster."""
    return statistics.median(b / a for a, b in zip(seconds["ours"], seconds[name], strict=True))


def peak_bytes(task: Callable[[], object], device: str) -> int | None:
    """What one run allocates at most, above what is held before; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    task()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def lift_guard() -> str:
    """A sentence about fla. On Hopper it refuses some backward passes beside Triton 3.4.0 to 3.7.0, because one of its tiles is
    miscompiled; for a comparison the refusal is lifted, and what comes out wrong is not timed."""
    try:
        version = metadata.version("fla-core")
        module = importlib.import_module("fla.ops.common.chunk_o")
    except Exception as error:  # it probes devices and compilers while it is imported
        return f"fla-core is not here ({type(error).__name__})"
    if getattr(module, "TRITON_ABOVE_3_7_1", True):
        return f"fla-core {version}"
    module.TRITON_ABOVE_3_7_1 = True  # pyright: ignore[reportAttributeAccessIssue]
    return f"fla-core {version}, its guard against Triton before 3.7.1 lifted"


def run(limits: Peaks, device: str, pairs: int, tiny: bool) -> tuple[list[dict[str, Any]], str]:
    note = lift_guard()
    wanted = [(scan, shape) for scan in SCANS for shape in shapes(tiny) if tiny or shape.width in scan.widths]
    rows = [row for scan, shape in wanted for row in measure(scan, shape, limits, device, pairs)]
    return rows, f"{table(rows)}\n\n{note}"


def table(rows: list[dict[str, Any]]) -> str:
    names = ("fla", "sdpa")
    lines = [
        "| op | B x T x H | pass | ns per token and head | of the floor | peak MiB | "
        + " | ".join(f"{n} ns | speed ours / {n} | {n} peak MiB" for n in names)
        + " |",
        "| --- " * (6 + 3 * len(names)) + "|",
    ]
    for r in rows:
        cells = [r["op"], r["shape"], r["pass"], f"{r['ns']['ours']:.3f}", f"{r['floor']:.0%}"]
        cells.append(_mib(r["peak_bytes"]["ours"]))
        for name in names:
            if name in r["ns"]:
                cells += [f"{r['ns'][name]:.3f}", f"{r['ratio'][name]:.2f}", _mib(r["peak_bytes"][name])]
            elif name in r["wrong"]:
                cells += [f"wrong by {r['wrong'][name]:.1e}", "-", "-"]
            else:
                cells += ["-", "-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"
