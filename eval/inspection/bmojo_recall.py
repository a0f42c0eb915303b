"""Does the eidetic memory hold what is asked for? Of runs on associative recall, whose pairs of key and value stand where one knows.

A question is for a pair. The key's row knows the key alone; the value's row knows the value, and through a token shift of R taps the
rows 0 to R - 2 behind it carry key and value both: attention to one of these is an answer. Only questions whose pair lies outside of
the window, with all rows that carry it, tell anything about the memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.synthetic.task import Rows
from eval.inspection.bmojo_hooks import mixers
from eval.inspection.bmojo_watch import Kept, observe
from eval.inspection.numbers import plain
from eval.inspection.text import ROWS, Text, rows_of_task, text_of_rows
from eval.run import LoadedRun
from models import LM, Batch
from models.mixers.bmojo import BMojo

JUDGED = 128  # validation rows


class Questions(NamedTuple):
    """Of Q questions, all rows of T tokens."""

    at: Tensor  # int64 [Q], the token that asks, numbered row by row
    key: Tensor  # int64 [Q], where the key of the pair stands; its value is the token behind it
    right: Tensor  # bool [Q]
    length: int  # T


def recall(run: LoadedRun) -> dict[str, Any] | None:
    """By layer, how often a needed token was kept, and how often the answer was right then and otherwise. None where it is not known
    where the needed tokens stand: on other tasks than ``mqar``, and on text."""
    if run.task != "mqar" or not any(part.cfg.m_e for part in mixers(run.model).values()):
        return None
    rows = rows_of_task(run, JUDGED)
    text = text_of_rows(run, rows)
    seen, _ = observe(run.model, text, attention=False)
    asked = questions(run.model, text, rows)
    layers = {n: part for n, part in mixers(run.model).items() if part.cfg.m_e}
    return {
        "rows": len(rows.tokens),
        "questions": len(asked.at),
        "right": plain(asked.right.double().mean().item()),
        "layers": [plain({"layer": n, **hits(part, seen[n].kept, asked)}) for n, part in layers.items()],
    }


@torch.no_grad()
def questions(model: LM, text: Text, rows: Rows) -> Questions:
    """What is asked in the rows, and what the model says."""
    device = model.embed.weight.device
    tokens, mask = torch.from_numpy(rows.tokens), torch.from_numpy(rows.loss_mask)
    right = []
    for x, target in zip(tokens.split(ROWS), torch.from_numpy(rows.targets).split(ROWS), strict=True):
        h, _, _ = model.features(Batch(x.to(device)))
        right.append(model.token_nll(h, target.to(device))[1].cpu())
    row, place = mask.nonzero().T
    first = (tokens[row] == tokens[row, place][:, None]).int().argmax(1)  # a key is seen for the first time in its pair
    T = tokens.shape[1]
    return Questions(row * T + place, row * T + first, torch.cat(right)[mask], T)


def hits(part: BMojo, kept: Kept, asked: Questions) -> dict[str, Any]:
    """Of one layer: the shares of its questions for which the key's row, the value's row, and one that carries the pair were kept
    for the query's chunk; what as many tokens drawn from all before that chunk would give; right answers where one that carries
    the pair was kept, and where none was. Also which share of what is kept are tokens of pairs, over all chunks."""
    reach = max(part.cfg.token_shift - 1, 1)  # rows that carry the pair, from the value's on
    chunk = kept.chunk[asked.at]
    outside = asked.at - (asked.key + reach) >= part.cfg.window
    near = asked.at - (asked.key + 1) < part.cfg.window
    key, right, chunk = (x[outside] for x in (asked.key, asked.right, chunk))
    inside = kept.token[chunk]  # [q, m]

    def has(token: Tensor) -> Tensor:
        return (inside == token[:, None]).any(1)

    carried = torch.stack([has(key + 1 + n) for n in range(reach)]).any(0)
    size, before = (inside >= 0).sum(1), kept.before[chunk]
    by_chance = 1 - _missed(size, before, reach)
    of_pair, pairs = _precision(kept, asked)
    return {
        "carrying_rows": reach,
        "questions": int(outside.sum()),
        "key": has(key).double().mean().item(),
        "value": has(key + 1).double().mean().item(),
        "carried": carried.double().mean().item(),
        "one_by_chance": (size / before).double().mean().item(),
        "carried_by_chance": by_chance.mean().item(),
        "hits": int(carried.sum()),
        "right": right.double().mean().item(),
        "right_if_kept": right[carried].double().mean().item(),
        "right_if_not": right[~carried].double().mean().item(),
        "in_window": int(near.sum()),
        "right_in_window": asked.right[near].double().mean().item(),
        "kept_of_pairs": of_pair,
        "pairs_of_past": pairs,
    }


def _missed(size: Tensor, before: Tensor, rows: int) -> Tensor:
    """The probability that none of so many given rows is among ``size`` [q] drawn from ``before`` [q] rows."""
    found = torch.ones(len(size), dtype=torch.float64)
    for n in range(rows):
        found *= ((before - size - n) / (before - n)).clamp(min=0)
    return found


def _precision(kept: Kept, asked: Questions) -> tuple[float, float]:
    """-> (share of kept tokens that are a key or value of a pair that the row asks for, share of all tokens before the chunks)."""
    needed = torch.zeros(int(kept.count.sum()))
    needed[asked.key] = needed[asked.key + 1] = 1
    there = kept.token >= 0
    total = torch.cat((torch.zeros(1), needed.cumsum(0)))
    past = total[kept.start] - total[kept.start - kept.before]
    share = needed[kept.token.clamp(min=0)][there].double().mean().item()
    return share, (past.sum() / kept.before.sum()).item()
