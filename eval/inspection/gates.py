"""Gates of recurrent parts along a text: how much of its memory a part keeps at each token, and how strongly it writes.

A part says them itself (`Part.memory_gates`, called with the input that its forward is about to get, so a nested part is found too):

decay      exp(g), the share of a memory that a token leaves there, in [0, 1]; where each key feature has its own, their mean
half-life  ln 2 / mean over tokens of -g, of each head and key feature: tokens after which half is left (None: never)
write      as the part defines it: beta of a delta rule, in [0, 1] or [0, 2], or the step size dt > 0 of a state-space model

All counts over the tokens that go to a memory alone, and a half-life is in those: a mixture of memories sends few to each. "Spread
over heads" is the 10 %, 50 % and 90 % quantile of heads (of channels, where each has a memory of its own).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from eval.inspection.numbers import plain
from eval.inspection.text import Text
from eval.tables import markdown
from models import LM, Batch
from models.types import Gates, Part

PLACES = 128  # along a window, at most; a place is a mean over as many tokens as it takes
TOKENS = 48  # of the first window, that are shown one by one
HEADS = 32  # of a part that are shown there; of more, as many at equal steps in the order of their means
BAND = (0.1, 0.5, 0.9)  # quantiles of heads
BANDED = "10-90% of heads"
HALF = 0.5  # decays below it are counted


class Reading(NamedTuple):
    """What a part's gates were while it read one window of T tokens: fp64 on the CPU."""

    decay: Tensor | None  # [T, H], mean over key features
    rate: Tensor | None  # [H, K], the sum over tokens of -g
    write: Tensor | None  # [T, H]
    memories: int


def reading(gates: Gates) -> Reading:
    """Of a batch of one sequence."""
    decay = rate = None
    if gates.decay is not None:
        g = gates.decay[0] if gates.decay.ndim == 4 else gates.decay[0, ..., None]  # [T, H, K]
        decay = g.exp().mean(-1).double().cpu()
        rate = -torch.where(g.isfinite(), g, 0).sum(0, dtype=torch.float64).cpu()
    write = None if gates.write is None else gates.write[0].double().cpu()
    return Reading(decay, rate, write, gates.memories)


@torch.no_grad()
def readings(model: LM, text: Text) -> Iterator[dict[str, tuple[Part, Reading]]]:
    """Of each window, read alone: every part that has gates, by full name. The model is not changed."""
    found: dict[str, tuple[Part, Reading]] = {}

    def watch(name: str) -> Any:
        def before(part: Part, args: tuple[Any, ...]) -> None:
            gates = part.memory_gates(*args[:2])
            if gates is not None and not (gates.decay is None and gates.write is None):
                found[name] = (part, reading(gates))

        return before

    with contextlib.ExitStack() as stack:
        for name, part in model.named_modules():
            if isinstance(part, Part):
                stack.callback(part.register_forward_pre_hook(watch(name)).remove)
        for window in tqdm(text.windows, "gates", unit="window", leave=False, disable=None):
            model.features(Batch(torch.tensor([window[:-1]], device=model.embed.weight.device)))
            yield found
            found.clear()


@dataclass
class Sums:
    """Of one gate of a part, by place in a window and head."""

    total: Tensor  # [P, H]
    count: Tensor  # [P, H], tokens that go to the memory
    first: Tensor  # [n, H], at the first tokens of the first window
    below: float = 0.0  # pairs of token and head with less than HALF
    rate: Tensor | None = None  # [H, K], of a decay

    @classmethod
    def empty(cls, values: Tensor, places: int) -> Sums:
        zeros = torch.zeros(places, values.shape[1], dtype=torch.float64)
        return cls(zeros, zeros.clone(), values[:TOKENS])

    def add(self, values: Tensor, width: int, rate: Tensor | None) -> None:
        """values [T, H] of one more window, ``width`` tokens to a place."""
        seen = values.isfinite()
        place = torch.arange(len(values)) // width
        self.total.index_add_(0, place, torch.where(seen, values, 0))
        self.count.index_add_(0, place, seen.double())
        self.below += (values < HALF).sum().item()
        if rate is not None:
            self.rate = rate if self.rate is None else self.rate + rate

    def by_head(self) -> Tensor:
        """Means over tokens [H], NaN for a memory that no token goes to."""
        return self.total.sum(0) / self.count.sum(0)


# -- plain numbers


def measure(model: LM, text: Text) -> dict[str, Any]:
    """``tokens``: the first ones of the text; ``places``: where in a window each place ends; ``parts``: of each that has gates,
    ``decay`` and ``write`` (None where it has none): mean, spread over heads, along a window and at the first tokens."""
    longest = max(len(w) - 1 for w in text.windows)
    width = -(-longest // PLACES)
    places = [*range(width, longest, width), longest]
    sums: dict[str, dict[str, Sums]] = {}
    parts: dict[str, tuple[Part, Reading]] = {}
    for found in readings(model, text):
        for name, (part, read) in found.items():
            parts.setdefault(name, (part, read))
            for gate, values in (("decay", read.decay), ("write", read.write)):
                if values is not None:
                    some = sums.setdefault(name, {}).setdefault(gate, Sums.empty(values, len(places)))
                    some.add(values, width, read.rate if gate == "decay" else None)
    tokens = sum(len(w) - 1 for w in text.windows)
    return {
        "tokens": [text.shown(i) for i in text.windows[0][:-1][:TOKENS]],
        "places": places,
        "parts": [_part(name, *parts[name], sums[name], tokens) for name in parts],
    }


def _part(name: str, part: Part, read: Reading, sums: dict[str, Sums], tokens: int) -> dict[str, Any]:
    some = sums.get("decay") or sums["write"]
    shown = _shown(some.by_head())
    heads = some.total.shape[1] // read.memories
    return {
        "name": name,
        "layer": part.site.layer,
        "kind": part.cfg.kind,
        "memories": read.memories,
        "heads": heads,
        "features": 1 if read.rate is None else read.rate.shape[1],
        "seen": plain(some.count.sum().item() / (tokens * some.total.shape[1])),
        "shown": [f"{n // heads}.{n % heads}" if read.memories > 1 else str(n) for n in shown],
        **{gate: _gate(sums[gate], shown) if gate in sums else None for gate in ("decay", "write")},
    }


def _gate(sums: Sums, shown: Sequence[int]) -> dict[str, Any]:
    total, count = sums.total.sum().item(), sums.count.sum().item()
    found = {
        "mean": plain(total / count if count else math.nan),
        "heads": plain(_band(sums.by_head())),
        "along": plain(sums.total.sum(1) / sums.count.sum(1)),
        "band": plain(torch.nanquantile(sums.total / sums.count, torch.tensor(BAND).double(), dim=1)),
        "first": plain(sums.first[:, [*shown]]),
    }
    if sums.rate is not None:
        rate = sums.rate / sums.count.sum(0)[:, None]
        found["below_half"] = plain(sums.below / count if count else math.nan)
        found["half_life"] = plain(math.log(2) / _band(rate).flip(0))
    return found


def _band(values: Tensor) -> Tensor:
    return torch.nanquantile(values.flatten(), torch.tensor(BAND).double())


def _shown(means: Tensor) -> list[int]:
    """Of heads with these means [H], those that are shown one by one."""
    if len(means) <= HEADS:
        return [*range(len(means))]
    return means.argsort()[torch.linspace(0, len(means) - 1, HEADS).round().long()].tolist()


def table(found: dict[str, Any]) -> str:
    """A row for each part, in Markdown."""
    rows = []
    for one in found["parts"]:
        decay, write = (one[gate] or {} for gate in ("decay", "write"))
        rows.append(
            (
                one["name"],
                one["kind"],
                f"{one['memories']} x {one['heads']}",
                one["seen"],
                decay.get("mean"),
                _range(decay.get("heads")),
                decay.get("below_half"),
                (decay.get("half_life") or [None] * 3)[1],
                _range(decay.get("half_life")),
                write.get("mean"),
                _range(write.get("heads")),
            )
        )
    headers = ("gates", "part", "memories, heads", "of tokens", "decay", BANDED, "below 0.5")
    return markdown((*headers, "half-life (tokens)", "10-90%", "write strength", BANDED), rows)


def _range(band: Sequence[float | None] | None) -> str:
    """The outer two of three quantiles."""
    return "" if band is None else " to ".join("-" if v is None else f"{v:.3g}" for v in (band[0], band[2]))
