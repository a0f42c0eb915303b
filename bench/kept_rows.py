"""Attention over a window and a few kept rows (arXiv:2407.06324), and which rows those are: against one mask over all keys and one
top-k per chunk, and on an accelerator beside compiled flex_attention, which skips the same blocks, and causal attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from bench.floors import Peaks, memory_attention_floor
from bench.gpu_scans import peak_bytes, ratio, rounds
from bench.kernels import Case
from kernels import dispatch
from kernels.chunks import chunks
from kernels.memory_attention import memory_attention, peers
from kernels.prefix_topm import prefix_topm

TOKENS, CHECKED = 32768, 2048  # of one run; of the run that is compared before anything is timed
TOLERANCES = (5e-3, *(8e-3,) * 5)  # of bf16 against fp32, ||difference|| / ||result||: output, then gradients
WANTED_RATIO, WANTED_SHARE = 1.3, 0.5  # speed over flex_attention's, share of the physical limit


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int  # K
    window: int  # W
    kept: int  # eidetic rows of a chunk
    fading: int

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.batch}x{self.length}x{heads}, K={self.width}, W={self.window}, {self.kept}+{self.fading} kept"


class Inputs(NamedTuple):
    leaves: tuple[Tensor, ...]  # q, k, v, fading k and v
    options: dict[str, Any]  # of `memory_attention`: those without a gradient


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Rows kept by random keys, seen once they have left the window."""
    b, t, h, kv, width, window = shape[:6]
    index = prefix_topm(torch.rand(b, t, device=device), window, shape.kept)
    at = chunks(b, t, None, window, device)

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, width, device=device, dtype=dtype).requires_grad_()

    qkv = (leaf(b, t, h), leaf(b, t, kv), leaf(b, t, kv))
    since = (window - (at.row[:, None] - index)).clamp(min=0)
    fading = [leaf(len(index), shape.fading, kv) for _ in range(2)]
    return Inputs((*qkv, *fading), {"window": window, "index": index, "since": since})


def _applied(form: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda q, k, v, fading_k, fading_v: form(q, k, v, fading_k=fading_k, fading_v=fading_v, **options)


def cases(device: str, tiny: bool = False) -> list[Case]:
    """At T = 2048: where the peer's mask of all rows and keys still is 5 MB."""
    found, t = [], 128 if tiny else 2048
    for window, kept in ((16, 4),) if tiny else ((32, 8), (128, 16)):
        shape = Shape(1, t, 2 if tiny else 4, 2 if tiny else 4, 16 if tiny else 64, window, kept, 1)
        leaves, options = inputs(shape, torch.float32, device)
        ours, peer = (_applied(form, options) for form in (memory_attention, peers.sdpa))
        found.append(Case("memory_attention", str(shape), ours, peer, leaves, peer_name="SDPA, one mask"))
    for window, kept in ((16, 4),) if tiny else ((32, 8), (128, 16)):
        key, text = torch.rand(1, 4 * t, device=device), f"1x{4 * t}, {kept} before each {window}"
        ours, peer = (partial(_numbers, form, size=window, m=kept) for form in (prefix_topm, each_by_itself))
        found.append(Case("prefix_topm", text, ours, peer, (key,), peer_name="a top-k per chunk"))
    return found


def _numbers(form: Callable[..., Tensor], key: Tensor, size: int, m: int) -> Tensor:
    return form(key, size, m).double()


def each_by_itself(key: Tensor, size: int, m: int) -> Tensor:
    """As `prefix_topm`, of keys [1, T] that are all different: before each chunk the m largest of all that went before."""
    row, start = torch.arange(key.shape[1], device=key.device), torch.arange(0, key.shape[1], size, device=key.device)
    value, index = key.masked_fill(row >= start[:, None], -float("inf")).topk(m, dim=1)
    none = value == -float("inf")
    index = index.masked_fill(none, key.shape[1]).sort(dim=1).values
    return index.masked_fill(index == key.shape[1], -1)


# -- on an accelerator


def shapes(tiny: bool) -> list[Shape]:
    """The paper's largest model has 32 heads of 64; fewer of them fill a GPU as well, and 4 key heads of 128 are usual today."""
    if tiny:
        return [Shape(2, 70, 4, 2, 16, 16, 4, 1)]
    heads = ((16, 16, 64), (16, 4, 128))
    return [Shape(TOKENS // t, t, *h, 512, 64, 1) for h in heads for t in (8192, 32768)]


def measure(
    shape: Shape, limits: Peaks, device: str, pairs: int, dtype: torch.dtype = torch.bfloat16
) -> list[dict[str, Any]]:
    """Rows of the table: forward alone, then with backward. Raises RuntimeError where ours is not equal to its plain form; of
    flex_attention that is not, the error is told in place of a time."""
    small, attend = shape._replace(batch=1, length=min(shape.length, CHECKED)), attention_of(device)
    mistakes = {"ours": compare(memory_attention, small, dtype, device, True)}
    mistakes["flex"] = compare(partial(peers.flex, attend=attend), small, dtype, device, device != "cpu")
    wrong = {name: max(e) for name, e in mistakes.items() if any(a > b for a, b in zip(e, TOLERANCES, strict=False))}
    if "ours" in wrong:
        raise RuntimeError(
            f"memory_attention {shape} differs from its plain form by {wrong['ours']:.1e}: no speed is reported"
        )
    leaves, options = inputs(shape, dtype, device)
    forms = {"ours": _applied(memory_attention, options), "causal": causal}
    if "flex" not in wrong:  # what a model's layers could share is made before
        mask = peers.block_mask(leaves[0], fading_k=leaves[3], **options)
        forms["flex"] = _applied(partial(peers.flex, attend=attend, mask=mask), options)
    first, last = peers.spans(leaves[0], fading_k=leaves[3], **options)
    queries = shape.batch * shape.length
    seen = (last - first).clamp(min=0).sum().item() / queries
    forward, backward = memory_attention_floor(shape.width, seen, shape.kv_heads / shape.heads)
    rows = []
    for what, floor in (("forward", forward), ("forward + backward", forward + backward)):
        back = what != "forward"
        some = {n: f for n, f in forms.items() if not (back and device == "cpu" and n == "flex")}  # no gradient there
        tasks = {name: _task(form, leaves, back) for name, form in some.items()}
        seconds = rounds(tasks, pairs)
        units, spent = queries * shape.heads, statistics.median(seconds["ours"])
        row: dict[str, Any] = {"op": "memory_attention", "shape": str(shape), "pass": what, "pairs": pairs}
        row |= {"wrong": wrong, "keys": seen, "floor": floor.seconds(limits) * units / spent}
        row["ns"] = {name: statistics.median(s) / units * 1e9 for name, s in seconds.items()}
        row["ratio"] = {name: ratio(seconds, name) for name in seconds if name != "ours"}
        row["teraflops"] = floor.flops * units / spent / 1e12
        rows.append(row | {"peak_bytes": {name: peak_bytes(task, device) for name, task in tasks.items()}})
    return rows


def attention_of(device: str) -> Callable[..., Any]:
    """flex_attention as one uses it; to compile it for a CPU takes longer than all that is measured there. A new one for each shape:
    after some recompilations the compiler gives up, and what runs then is not fused."""
    if device == "cpu":
        return flex_attention
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False)


def causal(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """Attention to everything before."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = k.shape[1] < q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def compare(form: Callable[..., Tensor], shape: Shape, dtype: torch.dtype, device: str, backward: bool) -> list[float]:
    """Relative errors of the output and, if asked for, of all gradients, against our plain form on the same numbers in fp32."""
    leaves, options = inputs(shape, dtype, device)
    exact = tuple(x.detach().float().requires_grad_() for x in leaves)
    do = torch.randn(leaves[0].shape, device=device, dtype=dtype)
    with dispatch.use("reference"):
        expected = _all(_applied(memory_attention, options), exact, do.float(), backward)
    found = _all(_applied(form, options), leaves, do, backward)
    return [((a.float() - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(found, expected, strict=True)]


def _all(form: Callable[..., Tensor], leaves: tuple[Tensor, ...], do: Tensor, backward: bool) -> list[Tensor]:
    with torch.set_grad_enabled(backward):
        o = form(*leaves)
    return [o.detach(), *(torch.autograd.grad(o, leaves, do) if backward else ())]


def _task(form: Callable[..., Tensor], leaves: tuple[Tensor, ...], backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(lambda: form(*leaves))
    do = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(
        form(*leaves), leaves, do, allow_unused=True
    )  # causal attention has no fading rows


def run(limits: Peaks, device: str, pairs: int, tiny: bool) -> tuple[list[dict[str, Any]], str]:
    rows = [row for shape in shapes(tiny) for row in measure(shape, limits, device, pairs)]
    return rows, f"{table(rows)}\n\n{verdict(rows)}"


def verdict(rows: list[dict[str, Any]]) -> str:
    """What is wanted of every row, and how many have it."""
    beside = [r["ratio"]["flex"] for r in rows if "flex" in r["ratio"]]
    fast, close = sum(x >= WANTED_RATIO for x in beside), sum(r["floor"] >= WANTED_SHARE for r in rows)
    return (
        f"wanted: {WANTED_RATIO} times the speed of flex_attention, met in {fast} of {len(beside)} rows; at most "
        f"{1 / WANTED_SHARE:g} times the physical limit, met in {close} of {len(rows)}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| op | B x T x H | pass | keys of a query | ns per token and head | TFLOP/s | of the physical limit | flex ns "
        "| speed ours / flex | causal attention ns | speed ours / causal | peak MiB, causal's, flex's |",
        "| --- " * 12 + "|",
    ]
    for r in rows:
        ns, error = r["ns"], r["wrong"].get("flex")
        theirs = [f"{ns['flex']:.3f}", f"{r['ratio']['flex']:.2f}"] if "flex" in ns else ["-", "-"]
        if error is not None:
            theirs[0] = f"wrong by {error:.1e}"
        peak = ", ".join("-" if b is None else f"{b / 2**20:.0f}" for b in r["peak_bytes"].values())
        cells = [r["op"], r["shape"], r["pass"], f"{r['keys']:.1f}", f"{ns['ours']:.3f}", f"{r['teraflops']:.3g}"]
        cells += [f"{r['floor']:.0%}", *theirs, f"{ns['causal']:.3f}", f"{r['ratio']['causal']:.2f}", peak]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
