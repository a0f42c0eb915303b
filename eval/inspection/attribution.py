"""Which past tokens a prediction comes from: by its gradient, and by taking tokens away one at a time.

The target is log p(y | w_0 .. w_t), y the next token or, of a task, the answer. A past token s of embedding e_s gets

    a_s = (d log p / d e_s) . (e_s - e'),    e' the mean embedding of the fillers,

gradient times input, measured from the fillers: to first order what is lost when s gives way to one of them. Leave-one-out is that
loss itself: log p less the mean of log p with a filler at s. Both in nats; above zero the token speaks for the target. How well they
agree is their rank correlation. A part that reads tokens by their ids (Engram) is seen by leave-one-out alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data.synthetic.task import NO_ANSWER
from eval.inspection.numbers import plain, rank_correlation
from eval.inspection.text import ROWS, Text
from eval.scoring import pad
from models import LM, Batch, UserError

TARGETS = 3  # predictions that are looked at when none is asked for
BLOCKS = 8  # of a window: what is shuffled ends one to two of them before the target
FILLERS = 2  # tokens of the text that stand in for one that is taken away
CHECKED = 96  # past tokens that are taken away, at most: half of them those with the largest attribution
TOKENS = 1 << 14  # in one forward
SEED = 0


def lost_without(one: dict[str, Any]) -> list[float | None]:
    """Of a stored target, for each past token: its leave-one-out, None where that was not tried. Pictures colour by it: where a
    prediction is certain, its gradient is noise."""
    tried = dict(zip(one["checked"], one["left_out"], strict=True))
    return [tried.get(token) for token in range(len(one["tokens"]))]


class Target(NamedTuple):
    window: int
    at: int  # the last token that is read
    gain: float | None = None  # nats that the order of the far context saves, where that was the reason to look


# -- which predictions


@torch.no_grad()
def nll(model: LM, rows: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[Tensor]:
    """-log p of each target, row by row, in nats."""
    device = model.embed.weight.device
    tokens, valid = pad(rows, device)
    h, _, _ = model.features(Batch(tokens, valid=valid))
    found, _ = model.token_nll(h, pad(targets, device)[0])
    return [losses[: len(row)].double().cpu() for losses, row in zip(found, rows, strict=True)]


def gains(model: LM, read: Sequence[int], targets: Sequence[int], generator: torch.Generator) -> Tensor:
    """What the order of its far context saves each prediction of a window [T]: its loss when all but the last one to two eighths of
    the context are shuffled, less its loss; 0 where nothing lies far back, or nothing is asked."""
    read = list(read)
    asked = torch.tensor(targets) != NO_ANSWER
    size = max(1, -(-len(read) // BLOCKS))
    starts = range(2 * size, len(read), size)
    rows = [read]
    for start in starts:
        far = start - size
        rows.append([read[i] for i in torch.randperm(far, generator=generator)] + read[far:])
    found = torch.zeros(len(read), dtype=torch.float64)
    before, *shuffled = nll(model, rows, [[max(t, 0) for t in targets]] * len(rows))
    for start, after in zip(starts, shuffled, strict=True):
        found[start : start + size] = (after - before)[start : start + size]
    return found.where(asked, 0)


def most_helped(model: LM, text: Text, count: int = TARGETS) -> list[Target]:
    """Of the first windows, the predictions that far context helps most, none within an eighth of a window of another."""
    generator = torch.Generator().manual_seed(SEED)
    found: list[Target] = []
    for n, (window, targets) in enumerate(zip(text.windows[:ROWS], text.targets, strict=False)):
        found += [
            Target(n, t, g) for t, g in enumerate(gains(model, window[:-1], targets, generator).tolist()) if g > 0
        ]
    chosen: list[Target] = []
    for one in sorted(found, key=lambda one: (-(one.gain or 0), one.window, one.at)):
        apart = len(text.windows[one.window]) // BLOCKS
        if all(one.window != other.window or abs(one.at - other.at) > apart for other in chosen):
            chosen.append(one)
        if len(chosen) == count:
            break
    return chosen


def target_at(text: Text, number: int) -> Target:
    """The prediction after reading this token of the text. Raises UserError if there is none."""
    left = number
    for n, targets in enumerate(text.targets):
        if 0 <= left < len(targets):
            if targets[left] == NO_ANSWER:
                raise UserError(f"--at {number}: nothing is asked after this token")
            return Target(n, left)
        left -= len(targets)
    raise UserError(f"--at {number}: the text has tokens 0 to {len(text.ids) - 1}")


# -- where they come from


def gradient(model: LM, read: Sequence[int], target: int, fillers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """-> (attribution a_s of each token that is read [T], log p of the target), in fp64. Nothing is collected in the model."""
    leaf: list[Tensor] = []

    def cut(_: Any, __: Any, output: Tensor) -> Tensor:
        leaf.append(output.detach().requires_grad_())
        return leaf[-1]

    weight = model.embed.weight
    tokens = torch.tensor([list(read)], device=weight.device)
    with torch.enable_grad(), contextlib.ExitStack() as stack:
        stack.callback(model.embed.register_forward_hook(cut).remove)
        h, _, _ = model.features(Batch(tokens))
        logits: Any = model.logits(h[:, -1:])
        log_p = logits[0, 0].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)[target]
        (slope,) = torch.autograd.grad(log_p, leaf[0])
    base = weight.detach()[list(fillers)].double().mean(0)
    found = (slope[0].double() * (leaf[0].detach()[0].double() - base)).sum(-1)
    return found.cpu(), log_p.detach().double().cpu()


def left_out(
    model: LM, read: Sequence[int], target: int, fillers: Sequence[int], places: Sequence[int], log_p: float
) -> Tensor:
    """What log p of the target loses, on average over the fillers, when one stands at each of these places [n], in fp64."""
    rows = [[*read[:s], f, *read[s + 1 :]] for s in places for f in fillers]
    size = max(1, TOKENS // len(read))
    starts = tqdm(range(0, len(rows), size), "tokens left out", unit="batch", leave=False, disable=None)
    after = [_log_p(model, rows[i : i + size], target) for i in starts]
    return log_p - torch.cat(after).view(len(places), len(fillers)).mean(1)


@torch.no_grad()
def _log_p(model: LM, rows: Sequence[Sequence[int]], target: int) -> Tensor:
    """log p of the target behind each of equally long rows [n]."""
    tokens = torch.tensor(rows, device=model.embed.weight.device)
    h, _, _ = model.features(Batch(tokens))
    logits: Any = model.logits(h[:, -1])
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)[:, target].double().cpu()


def to_check(attribution: Tensor, most: int = CHECKED) -> list[int]:
    """Which tokens are taken away: all, or those with the largest attribution and as many more, spread evenly over the others."""
    if len(attribution) <= most:
        return list(range(len(attribution)))
    order = attribution.abs().argsort(descending=True, stable=True).tolist()
    large, others = order[: most // 2], sorted(order[most // 2 :])
    count = most - len(large)
    spread = [others[i * (len(others) - 1) // max(1, count - 1)] for i in range(count)]
    return sorted({*large, *spread})


def fillers_of(text: Text, count: int = FILLERS) -> list[int]:
    """Tokens drawn from the text, where it has so many different ones, all different."""
    kinds = torch.tensor(text.ids)
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(SEED))
    return list(dict.fromkeys(kinds[order].tolist()))[:count]


# -- plain numbers


def measure(model: LM, text: Text, at: Sequence[int] = ()) -> dict[str, Any]:
    """``fillers`` as they are shown, ``spaced`` where tokens are numbers, which must not run together, and ``targets``, each with
    its past tokens, their attribution and, of those ``checked``, leave-one-out. ``at``: the predictions to look at, by token;
    default: those that far context helps most."""
    targets = [target_at(text, n) for n in at] or most_helped(model, text)
    fillers = fillers_of(text)
    return {
        "fillers": [text.shown(i) for i in fillers],
        "spaced": text.answers is not None,
        "targets": [_target(model, text, one, fillers) for one in targets],
    }


def _target(model: LM, text: Text, one: Target, fillers: Sequence[int]) -> dict[str, Any]:
    read, target = list(text.windows[one.window][: one.at + 1]), text.targets[one.window][one.at]
    attribution, log_p = gradient(model, read, target, fillers)
    places = to_check(attribution)
    loss = left_out(model, read, target, fillers, places, float(log_p))
    return {
        "at": sum(len(w) - 1 for w in text.windows[: one.window]) + one.at,
        "window": one.window,
        "gain": plain(one.gain),
        "target": text.shown(target),
        "loss": plain(-float(log_p)),
        "tokens": [text.shown(i) for i in read],
        "attribution": plain(attribution),
        "checked": places,
        "left_out": plain(loss),
        "agreement": plain(rank_correlation(attribution[places], loss)),
    }
