"""Whole mixers and decode steps on an accelerator: a mixture of memories beside plain passes and beside fla's layer; a step
as a share of the bandwidth of a copy."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.floors import Peaks, best, decode_floor
from bench.gpu_scans import peak_bytes, ratio, rounds
from kernels import dispatch
from kernels.recurrent_step import recurrent_step
from models import LM, Batch, build, model_config
from models.types import Ctx, Part

BATCHES = (1, 4, 16, 64, 256)  # of a decode step
EXACT = 1e-4  # of a layer in fp32 against its plain form: some products and scans in a row


def widths(tiny: bool) -> dict[str, int]:
    """The mixer of the paper's small model (arXiv:2502.13685, section 4.1), on 8 rows of 2048 tokens."""
    if tiny:
        return {"batch": 2, "length": 40, "d_model": 32, "heads": 2, "head_dim": 16}
    return {"batch": 8, "length": 2048, "d_model": 1024, "heads": 4, "head_dim": 256}


def mixers(size: dict[str, int]) -> dict[str, dict[str, Any]]:
    inner = {"kind": "gated_delta", "heads": size["heads"], "head_dim": size["head_dim"], "expand_v": 1.0}
    return {"plain": inner, "mom": {"kind": "mom", "rule": inner, "memories": 4, "top_k": 2, "shared": True}}


def layer(mixer: dict[str, Any], size: dict[str, int], device: str) -> tuple[Part, Ctx]:
    """A mixer inside a model of one layer, with the context of a batch of whole rows."""
    model: LM = build(
        model_config(
            {"d_model": size["d_model"], "n_layers": 1, "vocab_size": 16, "blocks": {"only": {"mixer": mixer}}}
        ),
        device=device,
    )
    tokens = torch.zeros(size["batch"], size["length"], dtype=torch.int64, device=device)
    ctx, _, _ = model.prepare(Batch(tokens), None)
    ((_, _, part),) = model.parts()
    return part, ctx


def train_task(forward: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> Callable[[], object]:
    """Forward and backward in bf16 autocast, gradients of the input and of all parameters."""
    grad = torch.randn_like(x)

    def run() -> object:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = forward(x)
        return torch.autograd.grad(y, [x, *parameters], grad.to(y.dtype), allow_unused=True)

    return run


def measure_mom(device: str, pairs: int, tiny: bool) -> list[dict[str, Any]]:
    """Forward and backward of a mixture of memories: three memories work on every token, so three plain passes are the yardstick."""
    size = widths(tiny)
    x = torch.randn(size["batch"], size["length"], size["d_model"], device=device, requires_grad=True)
    tasks: dict[str, Callable[[], object]] = {}
    for name, mixer in mixers(size).items():
        part, ctx = layer(mixer, size, device)
        check(part, ctx, x)
        tasks[name] = train_task(lambda x, part=part, ctx=ctx: part(x, ctx)[0], x, list(part.parameters()))
    tasks = {"ours": tasks["mom"], "plain": tasks["plain"]}
    theirs = fla_layer(size, device)
    if theirs is not None:
        tasks["fla"] = train_task(lambda x: theirs(hidden_states=x)[0], x, list(theirs.parameters()))
    seconds = rounds(tasks, pairs)
    row: dict[str, Any] = {"layer": "mom, 4 memories, 2 active, 1 shared", "shape": size, "pairs": pairs}
    row["ms"] = {name: statistics.median(s) * 1e3 for name, s in seconds.items()}
    row["over_plain"] = 1 / ratio(seconds, "plain")
    row["fla_ratio"] = ratio(seconds, "fla") if "fla" in seconds else None
    row["peak_bytes"] = {name: peak_bytes(task, device) for name, task in tasks.items()}
    return [row]


@torch.no_grad()
def check(part: Part, ctx: Ctx, x: Tensor) -> None:
    """Raise RuntimeError when the layer in fp32 is not equal to itself on plain kernels."""
    found = part(x, ctx)[0]
    with dispatch.use("reference"):
        expected = part(x, ctx)[0]
    error = ((found - expected).norm() / expected.norm()).item()
    if not error <= EXACT:
        raise RuntimeError(f"{part.cfg.kind} differs from its plain form by {error:.1e}: no speed is reported")


def fla_layer(size: dict[str, int], device: str) -> Any:
    """fla's layer of the same shape, None where flash-linear-attention is not installed."""
    try:
        module: Any = importlib.import_module("fla.layers.mom")
    except Exception:  # it probes devices and compilers while it is imported
        return None
    shape = {"hidden_size": size["d_model"], "num_heads": size["heads"], "head_dim": size["head_dim"], "expand_v": 1}
    return module.MomAttention(**shape, num_memories=4, topk=2, shared_mem=True, layer_idx=0).to(device).train()


def measure_decode(limits: Peaks, device: str, tiny: bool) -> list[dict[str, Any]]:
    """One token of the gated delta rule with an fp32 state changed in place: bytes that must move, over what a copy moves."""
    heads, width, memories = (2, 16, 5) if tiny else (16, 128, 5)
    rows = []
    for batch in (1, 2) if tiny else BATCHES:
        for name, slots, held in (("gated_delta", 1, 1), ("mom, 2 of 4 and 1 shared", 3, memories)):
            lead = (batch, slots, heads)
            q, k, v = (torch.randn(*lead, width, device=device, dtype=torch.bfloat16) for _ in range(3))
            g, beta = -torch.rand(lead, device=device), torch.rand(lead, device=device)
            state = torch.zeros(batch, held, heads, width, width, device=device)
            index = None if held == 1 else torch.tensor([0, 2, 4], device=device).expand(batch, -1).contiguous()

            def step(q=q, k=k, v=v, state=state, g=g, beta=beta, index=index) -> object:
                return recurrent_step(q, k, v, state, g, beta, index=index, qk_l2norm=True, donate=True)

            with torch.inference_mode():
                seconds = best(step, device, inner=2 if tiny else 50)
            moved = decode_floor(width, width).bytes * batch * slots * heads
            row = {"step": name, "batch": batch, "microseconds": seconds * 1e6, "state_bytes": state.nbytes}
            rows.append(row | {"of_copy": moved / seconds / limits.bandwidth})
    return rows


def run(limits: Peaks, device: str, pairs: int, tiny: bool) -> tuple[list[dict[str, Any]], str]:
    layers, steps = measure_mom(device, pairs, tiny), measure_decode(limits, device, tiny)
    return [*layers, *steps], f"{mom_table(layers)}\n\n{decode_table(steps)}"


def mom_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| layer, forward + backward | ms | one plain pass, ms | times a plain pass | fla ms | speed ours / fla | peak MiB, fla's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        ms, peak = r["ms"], {name: "-" if b is None else f"{b / 2**20:.0f}" for name, b in r["peak_bytes"].items()}
        theirs = (f"{ms['fla']:.3f}", f"{r['fla_ratio']:.2f}") if "fla" in ms else ("-", "-")
        lines.append(
            f"| {r['layer']} | {ms['ours']:.3f} | {ms['plain']:.3f} | {r['over_plain']:.2f} | {theirs[0]} | {theirs[1]} "
            f"| {peak['ours']}, {peak.get('fla', '-')} |"
        )
    return "\n".join(lines)


def decode_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| decode step | batch | microseconds | of copy bandwidth | state bytes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        share, size = f"{r['of_copy']:.0%}", f"{r['state_bytes']:,}"
        lines.append(f"| {r['step']} | {r['batch']} | {r['microseconds']:.1f} | {share} | {size} |")
    return "\n".join(lines)
