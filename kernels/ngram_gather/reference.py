"""Plain forms of hashed n-gram lookup. ``recurrent`` is the definition; ``rows`` and ``gather`` are fast."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DEAD = -1  # a lookback that is not there: before the document, or not a token


class Line(NamedTuple):
    """What the lookbacks of a sequence may meet, in order."""

    ids: Tensor  # int64 [B, N-1+T]: the history, the valid tokens, then the others
    segments: Tensor | None  # of these, -1 for the history
    place: (
        Tensor | None
    )  # int64 [B, T], where each token stands on the line, -1 for an invalid one; None: token t at N-1+t


def recurrent(
    ids: Tensor, history: Tensor, multipliers: Tensor, primes: Tensor, offsets: Tensor, classes: int, pad: int,
    segments: Tensor | None = None, valid: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Token by token, in integers without end. Arguments as of `ngram_rows`, for one layer -> rows [B, T, (N-1) K]."""
    order, rows = len(multipliers), []
    for b, sequence in enumerate(ids.tolist()):
        seen: list[tuple[int, int]] = [(v, -1) for v in history[b].tolist()]
        for t, token in enumerate(sequence):
            own = 0 if segments is None else int(segments[b, t])
            window = [DEAD] * order
            if valid is None or valid[b, t]:
                seen.append((token, own))
                window = [v if segments is None or home == own else DEAD for v, home in seen[: -order - 1 : -1]]
            mix, reached, found = 0, True, []
            for n in range(order):
                reached = reached and 0 <= window[n] < classes
                mix ^= (window[n] if reached else pad) * int(multipliers[n])
                if n:
                    sizes = zip(primes[n - 1].tolist(), offsets[n - 1].tolist(), strict=True)
                    found += [mix % p + offset for p, offset in sizes]
            rows.append(found)
    return torch.tensor(rows, dtype=torch.int64, device=ids.device).view(*ids.shape, primes.numel())


def align(ids: Tensor, history: Tensor, segments: Tensor | None, valid: Tensor | None) -> tuple[Line, Tensor]:
    """ids [B, T], history [B, N-1] -> (the line, the last N-1 of history and valid tokens)."""
    back, length = history.shape[1], ids.shape[1]
    if segments is not None:
        segments = torch.cat((torch.full_like(history, -1), segments.long()), dim=1)
    if valid is None:
        line = torch.cat((history, ids), dim=1)
        return Line(line, segments, None), line[:, length:].clone()
    order = torch.argsort(~valid, dim=1, stable=True) + back
    order = torch.cat((torch.arange(back, device=ids.device).expand(len(ids), -1), order), dim=1)
    line = torch.cat((history, ids), dim=1).gather(1, order)
    rank = valid.long().cumsum(dim=1)
    last = rank[:, length - 1 :] + torch.arange(back, device=ids.device)
    segments = None if segments is None else segments.gather(1, order)
    return Line(line, segments, torch.where(valid, rank + (back - 1), -1)), line.gather(1, last)


def lookbacks(line: Line, order: int, classes: int, pad: int) -> list[Tensor]:
    """-> the ids that stand 0, 1, ..., N-1 back of each token, [B, T] each; PAD from the first one on that is out of reach."""
    length = line.ids.shape[1] - order + 1

    def behind(x: Tensor, i: int) -> Tensor:
        if line.place is None:
            return x[:, order - 1 - i :][:, :length]
        return x.gather(1, (line.place - i).clamp(min=0))

    found: list[Tensor] = []
    reached = None if line.place is None else line.place >= 0
    for i in range(order):
        value = behind(line.ids, i)
        here = (value >= 0) & (value < classes)
        if line.segments is not None and i:
            here &= behind(line.segments, i) == behind(line.segments, 0)
        reached = here if reached is None else reached & here
        found.append(torch.where(reached, value, pad))
    return found


def rows(line: Line, multipliers: Tensor, primes: Tensor, offsets: Tensor, classes: int, pad: int) -> Tensor:
    """multipliers [L, N], primes and offsets [L, N-1, K] -> rows [L, B, T, (N-1) K]."""
    values = lookbacks(line, multipliers.shape[1], classes, pad)
    found = values[0].new_empty(len(multipliers), *values[0].shape, *primes.shape[1:])
    for out, ms, ps in zip(found, multipliers, primes, strict=True):  # layer by layer, so that products stay in a cache
        mix = values[0] * ms[0]
        for n, p in enumerate(ps, start=1):
            mix = mix ^ (values[n] * ms[n])
            _remainder(mix[..., None], p, out[:, :, n - 1])
    return found.add_(offsets[:, None, None]).flatten(3)


def _remainder(x: Tensor, divisor: Tensor, out: Tensor) -> None:
    """out <- x mod divisor; without a copy where the compiler, which cannot write into a view, does not look."""
    if torch.compiler.is_compiling():
        out.copy_(x % divisor)
    else:
        torch.remainder(x, divisor, out=out)


def gather(table: Tensor, rows: Tensor) -> Tensor:
    """table [R, W], rows [...] -> [..., W] where the rows are."""
    found = table.index_select(0, rows.flatten().to(table.device))  # four times as fast as an index on a CPU
    return found.view(*rows.shape, table.shape[1]).to(rows.device)
