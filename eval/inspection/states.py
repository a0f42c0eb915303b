"""Recurrent memories over time: how large the matrices of a model's state grow along a text, and how many directions they use.

The text is read in pieces, as generation reads it, and the state is looked at between them. A matrix S [K, V] with singular values
s_i has the Frobenius norm sqrt(sum s_i^2) and the effective rank exp(-sum p_i ln p_i), p_i = s_i / sum s (Roy and Vetterli, EUSIPCO
2007): 1 where one outer product is all that it holds, min(K, V) where every direction is used alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from eval.inspection.numbers import plain
from eval.inspection.text import Text
from eval.scoring import pad
from models import LM, Batch
from models.types import Stat, State

PIECES = 24  # that a window is read in: as many places where the state is looked at
SHORTEST = 4  # tokens of a piece, where a window has so many; of single tokens parts report nothing


class Piece(NamedTuple):
    """What is known between two pieces of a batch of windows."""

    end: int  # tokens of a window read so far
    length: Tensor  # int64 [B], tokens of each window
    matrices: dict[str, Tensor]  # [B, M, H, K, V] by full name, e.g. ``layers.3.mixer.ssm.memory``
    stats: dict[str, Stat]  # what the parts said of this piece

    @property
    def whole(self) -> Tensor:
        """bool [B], of which windows the piece is whole."""
        return self.length >= self.end


@torch.no_grad()
def stream(model: LM, text: Text, pieces: int = PIECES) -> Iterator[Piece]:
    """Read all windows in pieces, with the state that generation has."""
    longest = max(len(w) - 1 for w in text.windows)
    pieces = min(pieces, max(1, longest // SHORTEST))
    places = sorted({longest * (i + 1) // pieces for i in range(pieces)} - {0})
    for windows in text.batches():
        tokens, valid = pad([w[:-1] for w in windows], model.embed.weight.device)
        B, T = tokens.shape
        state = model.init_state(B, T)
        length = torch.full((B,), T) if valid is None else valid.sum(1).cpu()
        ends = [*(at for at in places if at < T), T]
        for start, end in pairwise([0, *ends]):
            here = slice(start, end)
            batch = Batch(tokens[:, here], valid=None if valid is None else valid[:, here].contiguous())
            _, state, aux = model.features(batch, state, donate=True)
            assert state is not None
            yield Piece(end, length, dict(matrices(state.layers)), aux.stats)


def matrices(layers: tuple[dict[str, State], ...]) -> Iterator[tuple[str, Tensor]]:
    """Of the states of all layers, what is called ``memory`` and holds matrices (of several memories, of several heads), by full
    name, as [B, M, H, K, V]."""
    for n, slots in enumerate(layers):
        for slot, state in slots.items():
            yield from _matrices(state, f"layers.{n}.{slot}")


def _matrices(state: State, name: str) -> Iterator[tuple[str, Tensor]]:
    for field in getattr(state, "_fields", ()):
        value = getattr(state, field)
        if field == "memory" and isinstance(value, Tensor) and 3 <= value.ndim <= 5:
            yield f"{name}.{field}", value[(slice(None), *[None] * (5 - value.ndim))]
        else:
            yield from _matrices(value, f"{name}.{field}")


def size_and_rank(memory: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K, V] -> (Frobenius norm [...], effective rank [...], 0 for a matrix of zeros), in fp64; NaN where not all is finite."""
    memory = memory.double().cpu()
    finite = memory.isfinite().all(-1).all(-1)
    values = torch.linalg.svdvals(memory.nan_to_num(0, 0, 0)).masked_fill(~finite[..., None], math.nan)
    share = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    rank = torch.special.entr(share).sum(-1).exp()
    return values.norm(dim=-1), torch.where(values[..., 0] == 0, 0, rank)


# -- plain numbers


def measure(model: LM, text: Text, pieces: int = PIECES) -> dict[str, Any]:
    """``states``: of every memory, norm and effective rank after so many tokens, means over the windows that are that long;
    ``said``: by name, what the parts said of each piece (`over_time`)."""
    sums: dict[str, dict[int, list[Tensor]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    said: dict[str, list[tuple[int, Tensor]]] = {}
    for piece in tqdm(stream(model, text, pieces), "states", unit="piece", leave=False, disable=None):
        for name, memory in piece.matrices.items():
            shapes[name] = tuple(memory.shape[1:])
            kept = memory[piece.whole.to(memory.device)]
            if len(kept):
                found = torch.stack([*size_and_rank(kept), torch.ones(kept.shape[:3], dtype=torch.float64)])
                sums.setdefault(name, {}).setdefault(piece.end, []).append(found.sum(1))  # [3, M, H]
        for name, stat in piece.stats.items():
            said.setdefault(name, []).append((piece.end, stat.value.double().cpu()))
    return {
        "states": [_memory(name, shapes[name], by_place) for name, by_place in sums.items()],
        "said": {name: over_time(values) for name, values in said.items()},
    }


def _memory(name: str, shape: tuple[int, ...], by_place: dict[int, list[Tensor]]) -> dict[str, Any]:
    """One memory as JSON: ``norm`` and ``rank`` by place, memory and head."""
    layer, slot = name.split(".")[1:3]
    places = sorted(by_place)
    means = [torch.stack(by_place[at]).sum(0) for at in places]
    return {
        "name": name,
        "layer": int(layer),
        "slot": slot,
        "memories": shape[0],
        "heads": shape[1],
        "shape": list(shape[2:]),
        "tokens": places,
        "norm": plain([(m[0] / m[2]).tolist() for m in means]),
        "rank": plain([(m[1] / m[2]).tolist() for m in means]),
    }


def over_time(values: list[tuple[int, Tensor]]) -> dict[str, Any]:
    """(place, value) of one stat -> ``tokens`` and ``value``, the mean where several batches came by a place."""
    places = sorted({at for at, _ in values})
    means = [torch.stack([v for at, v in values if at == place]).mean(0) for place in places]
    return {"tokens": places, "value": plain([m.tolist() for m in means])}
