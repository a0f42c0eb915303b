"""Where an Engram can be watched and changed from outside: around `Engram.fuse`, which lets looked-up rows into the stream.

A change is a function from a part and its way of fusing to another way, so changes can be stacked, and watching is one that changes
nothing. Parameters, buffers, tables and code of the model are never touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eval.inspection import hooks
from eval.inspection.text import Text, read
from kernels.memory_gate import memory_gate
from models import LM, UserError
from models.errors import nearest
from models.memories.engram import Engram
from models.types import Ctx, State

# x [B, T, M, D], rows [B, T, (N-1) K, row_width], ctx, state -> (what is added, like x; gates [B, T, M]; new state)
Fuse = Callable[[Tensor, Tensor, Ctx, State | None], tuple[Tensor, Tensor, State | None]]
Change = Callable[[Engram, Fuse], Fuse]
ABLATIONS = {
    "no_memory[@LAYER]": "it adds nothing",
    "mean_gate[@LAYER]": "the gate is the same for all tokens of a forward: their mean, branch by branch",
    "shuffled_rows[@LAYER]": "a token gets the rows of another token of the same forward",
    "one_order:N[@LAYER]": "the rows of all n-grams but those of N tokens are zero",
    "one_branch:M[@LAYER]": "it adds to residual branch M alone",
}
SEED = 0  # of the shuffle
ALMOST = 1e-7  # how near a gate comes to shut and open where its score is made from it


def engrams(model: LM) -> dict[int, Engram]:
    """By layer."""
    return {layer: part for layer, _, part in model.parts() if isinstance(part, Engram)}


# -- watching


class Seen(NamedTuple):
    """What one layer did with N tokens in each of its M branches, on the CPU."""

    alpha: Tensor  # the gate [N, M]
    score: Tensor  # s, of which it is a function [N, M]
    added: Tensor  # |y| / |H| [N, M]
    conv: Tensor  # |silu(conv)| / |alpha v| [N, M]; zero without a convolution


@torch.no_grad()
def observe(model: LM, text: Text) -> tuple[dict[int, Seen], Tensor]:
    """-> (what each layer did with the tokens of the text, their losses [N] in nats). The model is only watched."""
    last: dict[int, Seen] = {}
    kept: dict[int, list[Seen]] = {layer: [] for layer in engrams(model)}
    nll = []
    with contextlib.ExitStack() as stack:
        for layer, part in engrams(model).items():
            stack.enter_context(hooks.changed([part], "fuse", _watch(last, layer)))
        for losses, valid in read(model, text):
            nll.append(losses.cpu())
            for layer, seen in last.items():
                kept[layer].append(Seen(*(t[valid].cpu() for t in seen)))
    seen = {layer: Seen(*(torch.cat(t) for t in zip(*parts, strict=True))) for layer, parts in kept.items()}
    return seen, torch.cat(nll)


def _watch(last: dict[int, Seen], layer: int) -> Change:
    def change(part: Engram, fuse: Fuse) -> Fuse:
        def fused(x: Tensor, rows: Tensor, ctx: Ctx, state: State | None) -> tuple[Tensor, Tensor, State | None]:
            found = fuse(x, rows, ctx, state)
            y, alpha, _ = found
            key, value = projected(part, x, rows)
            gated = alpha[..., None] * value[..., None, :]
            ratios = (_norm(y) / _norm(x), _norm(y.to(gated.dtype) - gated) / _norm(gated))
            last[layer] = Seen(alpha, score(part, x, key), *ratios)
            return found

        return fused

    return change


def projected(part: Engram, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """-> (keys like x, value [B, T, D])."""
    M, D = x.shape[2:]
    key, value = part.project(rows.flatten(2).to(x.dtype)).split((M * D, D), dim=-1)
    return key.unflatten(-1, (M, D)), value


def score(part: Engram, x: Tensor, key: Tensor) -> Tensor:
    """s [B, T, M], in at least fp32: how the stream and the key agree."""
    gain = part.query_gain * part.key_gain
    product = _normalised(x, part.cfg.eps) * gain * _normalised(key, part.cfg.eps)
    return product.sum(-1) * x.shape[-1] ** -0.5


def _normalised(x: Tensor, eps: float) -> Tensor:
    x = _wide(x)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _norm(x: Tensor) -> Tensor:
    """Over features; of nothing so small that a ratio with it stays finite."""
    return _wide(x).norm(dim=-1).clamp(min=1e-30)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -- changing


def no_memory(part: Engram, fuse: Fuse) -> Fuse:
    return _after(fuse, torch.zeros_like)


def one_branch(branch: int) -> Change:
    def alone(y: Tensor) -> Tensor:
        kept = torch.zeros_like(y)
        kept[:, :, branch] = y[:, :, branch]
        return kept

    return lambda part, fuse: _after(fuse, alone)


def one_order(order: int) -> Change:
    def change(part: Engram, fuse: Fuse) -> Fuse:
        mine = torch.tensor([n == order for n in part.cfg.orders for _ in range(part.cfg.heads)])
        return _before(fuse, lambda rows, _: rows * mine.to(rows)[:, None])

    return change


def shuffled_rows(part: Engram, fuse: Fuse) -> Fuse:
    def shuffled(rows: Tensor, ctx: Ctx) -> Tensor:
        flat = rows.flatten(0, 1).clone()
        some = torch.ones_like(ctx.tokens, dtype=torch.bool) if ctx.valid is None else ctx.valid
        here = some.flatten().nonzero().squeeze(1)
        order = torch.randperm(len(here), generator=torch.Generator().manual_seed(SEED)).to(here.device)
        flat[here] = flat[here[order]]
        return flat.view_as(rows)

    return _before(fuse, shuffled)


def mean_gate(part: Engram, fuse: Fuse) -> Fuse:
    def fused(x: Tensor, rows: Tensor, ctx: Ctx, state: State | None) -> tuple[Tensor, Tensor, State | None]:
        _, alpha, _ = fuse(x, rows, ctx, state)
        some = alpha.flatten(0, 1) if ctx.valid is None else alpha[ctx.valid]
        return gated(part, x, projected(part, x, rows)[1], some.mean(0), ctx)

    return fused


def gated(part: Engram, x: Tensor, value: Tensor, alpha: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, State | None]:
    """As `Engram.fuse` of whole sequences, with these gates [M] for every token: a plain sigmoid, of streams and keys that agree
    alike everywhere."""
    ones, (M, D), eps = torch.ones_like(x), x.shape[2:], part.cfg.eps
    gain = (alpha.logit(ALMOST) * (1 + eps) * D**-0.5)[:, None].expand(M, D)
    return memory_gate(
        ones,
        ones,
        value,
        gain,
        part.conv_gain,
        part.conv,
        dilation=part.cfg.dilation or part.cfg.orders[-1],
        eps=eps,
        gate="sigmoid",
        valid=ctx.valid,
        segments=ctx.shared.get("segments"),
    )


def _after(fuse: Fuse, what: Callable[[Tensor], Tensor]) -> Fuse:
    """What is added is changed."""

    def fused(x: Tensor, rows: Tensor, ctx: Ctx, state: State | None) -> tuple[Tensor, Tensor, State | None]:
        y, alpha, new = fuse(x, rows, ctx, state)
        return what(y), alpha, new

    return fused


def _before(fuse: Fuse, what: Callable[[Tensor, Ctx], Tensor]) -> Fuse:
    """The rows are changed."""
    return lambda x, rows, ctx, state: fuse(x, what(rows, ctx), ctx, state)


# -- by name


@contextlib.contextmanager
def ablate(model: LM, spec: str) -> Iterator[None]:
    """Inside, the model runs without what ``spec`` names: one of ABLATIONS, or several joined by ``+``. Raises UserError."""
    wanted = [_parse(model, one) for one in spec.split("+")]
    wanted.sort(
        key=lambda found: found[0] is not mean_gate
    )  # made first, it acts last: on rows that the others have changed
    with contextlib.ExitStack() as stack:
        for change, over in wanted:
            stack.enter_context(hooks.changed(over, "fuse", change))
        yield


def check(model: LM, spec: str) -> None:
    """Raise UserError, one line, for what `ablate` would refuse."""
    for one in spec.split("+"):
        _parse(model, one)


def standard(model: LM) -> list[str]:
    """What is tried when nothing is asked for: everything that can be told apart."""
    here = engrams(model)
    orders, branches = _shared(here, lambda part: part.cfg.orders), _shared(here, lambda part: range(part.branches))
    found = ["no_memory", "mean_gate", "shuffled_rows"]
    found += [f"one_order:{n}" for n in orders if len(orders) > 1]
    found += [f"one_branch:{m}" for m in branches if len(branches) > 1]
    return found + [f"no_memory@{layer}" for layer in here if len(here) > 1]


def _parse(model: LM, spec: str) -> tuple[Change, list[Engram]]:
    """-> (a change, the parts it is made to)."""
    here = engrams(model)
    rest, at, where = spec.strip().partition("@")
    name, colon, value = rest.partition(":")
    known = [form.split("[")[0].split(":")[0] for form in ABLATIONS]
    if name not in known:
        raise UserError(f"--ablate {spec}: unknown ablation '{name}'{nearest(name, known)}")
    if bool(colon) != name.startswith("one_"):
        form = next(f for f in ABLATIONS if f.startswith(name))
        raise UserError(f"--ablate {spec}: write it as {form}")
    chosen = {n: part for n, part in here.items() if not at or n == hooks.one_of(spec, "layer", where, here)}
    if name == "one_order":
        valid = _shared(chosen, lambda part: part.cfg.orders)
        return one_order(hooks.one_of(spec, "order", value, valid)), list(chosen.values())
    if name == "one_branch":
        valid = _shared(chosen, lambda part: range(part.branches))
        return one_branch(hooks.one_of(spec, "branch", value, valid)), list(chosen.values())
    plain: dict[str, Change] = {"no_memory": no_memory, "mean_gate": mean_gate, "shuffled_rows": shuffled_rows}
    return plain[name], list(chosen.values())


def _shared(parts: dict[int, Engram], of: Callable[[Engram], Iterable[Any]]) -> Sequence[Any]:
    """What all of the parts have, in order."""
    return sorted(set.intersection(*(set(of(part)) for part in parts.values())))
