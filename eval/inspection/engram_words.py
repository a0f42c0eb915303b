"""What an Engram's addresses spell: canonical tokens and n-grams for the eye, how often they come, what is lost on rare ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import Corpus
from eval import frequency
from eval.inspection.engram_hooks import Seen
from eval.inspection.engram_rows import lookbacks
from eval.inspection.text import Text
from models import Batch, UserError
from models.memories.engram_addressing import EngramAddressing

NOTHING = "·"  # in an n-gram: out of reach
LARGEST, MEMBERS = 12, 24  # classes that are told of, and members of each
HEAD = 10  # the least count of a rank that a Zipf exponent is fitted to
STEEPEST = 10.0  # exponent that is looked for
POINTS = 60  # of a curve of counts by rank


# -- n-grams for the eye


def ngrams(addressing: EngramAddressing, text: Text) -> dict[str, list[str]]:
    """By order: the n-gram of each token of the text, oldest token first, each canonical token as one that it stands for."""
    members: defaultdict[int, list[int]] = defaultdict(list)
    for token, c in enumerate(addressing.canonical.tolist()):
        members[c].append(token)

    def word(c: int) -> str:
        return NOTHING if c < 0 else spelled([text.shown(token) for token in members[c]])

    back = torch.cat([lookbacks(addressing, Batch(torch.tensor([w[:-1]])), -1)[:, 0] for w in text.windows], dim=1)
    known = {c: word(c) for c in back.unique().tolist()}
    words = [[known[c] for c in ids] for ids in back.flip(0).tolist()]
    orders = range(2, addressing.max_order + 1)
    return {str(n): [" ".join(gram) for gram in zip(*words[-n:], strict=True)] for n in orders}


def spelled(members: Sequence[str]) -> str:
    """The one that says best what all are: the first without capitals, if there is one."""
    return next((word for word in members if word == word.lower()), members[0])


def compression(addressing: EngramAddressing, counted: Tensor, shown: Callable[[int], str]) -> dict[str, Any]:
    """How tokens fold onto canonical ids. ``counted``: canonical ids of a text, of which ``merged`` is the share whose class has
    other tokens too."""
    canonical = addressing.canonical.cpu().long()
    canonical = canonical[canonical >= 0]
    number = torch.bincount(canonical, minlength=addressing.classes)
    largest = torch.argsort(number, descending=True, stable=True)[:LARGEST].tolist()
    classes = [
        {"size": int(number[c]), "tokens": [shown(t) for t in (canonical == c).nonzero()[:MEMBERS, 0].tolist()]}
        for c in largest
        if number[c] > 1
    ]
    return {
        "kind": addressing.kind,
        "tokens": len(canonical),
        "classes": addressing.classes,
        "reduction": 1 - addressing.classes / len(canonical),
        "merged": (number[counted] > 1).double().mean().item(),
        "largest": classes,
    }


# -- how often they come


def zipf(counts: np.ndarray) -> dict[str, Any]:
    """Counts of distinct things -> the exponent s of p(rank) ~ rank^-s, most likely given the ranks with at least HEAD counts (None:
    there are fewer than two), and a curve of ranks and counts."""
    ranked = -np.sort(-counts)
    head = ranked[ranked >= HEAD]
    places = np.unique(np.geomspace(1, len(ranked), POINTS).astype(np.int64))
    return {
        "exponent": _exponent(head) if len(head) > 1 else None,
        "ranks": len(head),
        "curve": [places.tolist(), ranked[places - 1].tolist()],
    }


def _exponent(ranked: np.ndarray) -> float:
    """Where the mean of log rank under p is that of the counts; it falls as s grows, so halving finds it."""
    logs = np.log(np.arange(1, len(ranked) + 1))
    target = (ranked * logs).sum() / ranked.sum()
    low, high = 0.0, STEEPEST
    for _ in range(60):
        s = (low + high) / 2
        weight = np.exp(-s * logs)
        if (weight * logs).sum() / weight.sum() > target:
            low = s
        else:
            high = s
    return (low + high) / 2


def types(back: Tensor) -> Tensor:
    """ids [n, tokens] -> a number for each distinct column [tokens], exact whatever the size of the vocabulary."""
    kind = torch.zeros_like(back[0])
    for ids in back:
        kind = torch.unique(kind * (int(ids.max()) + 1) + ids, return_inverse=True)[1]
    return kind


# -- what is lost on them


def buckets(
    corpus: Corpus, limit: int, order: int, text: Text, losses: Mapping[str, Tensor], seen: Mapping[int, Seen]
) -> dict[str, Any] | None:
    """Tokens of the text by how often their n-gram was seen in training (`eval.frequency`; of tokens as they are, not canonical):
    by bucket the number of tokens, the mean of each loss [N] where something is asked (NaN where nothing is), and of each layer's
    gate. None where n-grams have no code."""
    try:
        counts = frequency.count(corpus, order, limit)
    except UserError:
        return None
    windows = (Batch(torch.tensor([w[:-1]])) for w in text.windows)
    times = torch.cat([frequency.seen_in_training(batch, counts)[0] for batch in windows])
    edges = [-1, *frequency.EDGES]
    bucket = torch.bucketize(times, torch.tensor(edges), right=True) - 1
    chosen = [(i, bucket == i) for i in range(len(edges)) if bool((bucket == i).any())]
    asked = text.asked
    return {
        "tokens_counted": counts.tokens,
        "names": [bucket_names()[i] for i, _ in chosen],
        "tokens": [int(mask.sum()) for _, mask in chosen],
        "losses": {name: [loss[mask & asked].mean().item() for _, mask in chosen] for name, loss in losses.items()},
        "gates": {
            str(layer): [s.alpha[mask].double().mean().item() for _, mask in chosen] for layer, s in seen.items()
        },
    }


def bucket_names() -> Sequence[str]:
    edges = frequency.EDGES
    return ["window begins", "never", *(f"{a}-{b - 1}" for a, b in pairwise(edges[1:])), f"{edges[-1]}+"]
