"""What the memory cells of a model do with a text (arXiv:2604.23862): which slots are used, where tokens go, what it is good for.

Everything is made plain numbers first, as they are stored in ``inspect.json``; pictures and tables are made from those alone.
Entropies, influences and losses are in nats, lengths are L2 norms in the residual stream, cosines are those of the slots as stored.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.inspection import gmt_hooks
from eval.inspection.beside import Beside
from eval.inspection.curves import curves
from eval.inspection.gmt_hooks import Hopper, ablate, cells, changed, check, standard
from eval.inspection.gmt_pictures import draw
from eval.inspection.numbers import number, plain
from eval.inspection.text import Text, mean_loss, read
from eval.inspection.verbatim import code
from eval.run import LoadedRun
from eval.tables import markdown
from kernels.gmt_cell import Hop
from models import LM, UserError
from models.channels.gmt import GMT, NORM_EPS, Tables
from models.channels.gmt_losses import cosines, effective, entropy, off_diagonal_mean, wide

__all__ = [
    "ABLATIONS",
    "ablate",
    "changes",
    "check",
    "draw",
    "history",
    "lists",
    "measure",
    "more",
    "observe",
    "standard",
    "summary",
]

ABLATIONS = gmt_hooks.ABLATIONS
LISTED, CLOSEST = 8, 3  # kinds of token, and single tokens, that are told of a slot
ROWS, COLUMNS = 28, 24  # of the map of tokens and slots
BINS = 40  # of a histogram of cosines


class Seen(NamedTuple):
    """What one cell did with N tokens, on the CPU."""

    source: Tensor  # w_src [N, F]
    target: Tensor  # w_tgt [N, F]
    distance: Tensor  # [N], to the nearest slot, at least the floor
    move: Tensor  # [N], of (w_tgt - w_src) C', before its norm
    output: Tensor  # [N], of y
    mixer: Tensor  # [N], of what the mixer of the block adds; NaN where there is none
    influence: Tensor  # [N], KL(w_tgt || w_tgt if every hop led everywhere alike)


def observe(model: LM, text: Text) -> tuple[dict[int, Seen], float]:
    """-> (what each cell did with the tokens of the text, by layer; the mean loss on it). The model is only watched."""
    watches = {layer: _Watch() for layer in cells(model)}
    nll = []
    with contextlib.ExitStack() as stack:
        for layer, cell in cells(model).items():
            stack.enter_context(changed([cell], watches[layer].of_hop))
            mixer = model.layers[layer].parts().get("mixer")  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            if mixer is not None:
                handle = mixer.register_forward_hook(watches[layer].of_mixer)
                stack.callback(handle.remove)
        for losses, valid in read(model, text):
            nll.append(losses)
            for watch in watches.values():
                watch.keep(valid)
    return {layer: watch.all() for layer, watch in watches.items()}, mean_loss(text, nll)


@dataclass
class _Watch:
    hop: dict[str, Tensor] = field(default_factory=dict)
    mixer: Tensor | None = None
    kept: list[dict[str, Tensor]] = field(default_factory=list)

    def of_hop(self, hop: Hopper) -> Hopper:
        def hopped(h: Tensor, tables: Tables, temperature: Tensor) -> Hop:
            found = hop(h, tables, temperature)
            alike = hop(h, gmt_hooks.with_uniform_edges(tables), temperature)
            self.hop = {
                "source": found.source,
                "target": found.target,
                "distance": found.distance,
                "move": ((found.target - found.source) @ tables.points).norm(dim=1),
                "output": wide(found.y).norm(dim=1),
                "influence": divergence(found.target, alike.target),
            }
            return found

        return hopped

    def of_mixer(self, _: Any, __: Any, output: tuple[Tensor, ...]) -> None:
        self.mixer = wide(output[0]).norm(dim=-1).flatten()

    def keep(self, valid: Tensor) -> None:
        """Of the forward that just ended, the tokens that are some."""
        mixer = torch.full_like(self.hop["move"], math.nan) if self.mixer is None else self.mixer
        self.kept.append({name: t[valid.flatten()].cpu() for name, t in {**self.hop, "mixer": mixer}.items()})

    def all(self) -> Seen:
        return Seen(**{name: torch.cat([k[name] for k in self.kept]) for name in Seen._fields})


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of rows [N, F] -> [N]."""
    tiny = torch.finfo(p.dtype).tiny
    return (p * (p.clamp(min=tiny).log() - q.clamp(min=tiny).log())).sum(1).clamp(min=0)


# -- plain numbers


def measure(model: LM, text: Text) -> dict[str, Any]:
    """The loss on the text, its tokens, and ``layers``: what each cell is and did, in the order of the layers."""
    seen, loss = observe(model, text)
    shown, places = [text.shown(i) for i in text.ids], text.places()
    with torch.no_grad():
        layers = [_layer(n, cell, model.progress, seen[n], shown, places) for n, cell in cells(model).items()]
    return {"loss": plain(loss, 12), "tokens": shown, "layers": layers}


def more(run: LoadedRun, text: Text, beside: Beside) -> dict[str, Any]:
    """Nothing: a cell is known by the text alone. Raises UserError where there is something to compare with."""
    if beside.baseline is not None:
        raise UserError("--baseline: nothing of a gmt part is compared with another run")
    return {}


def _layer(
    layer: int, cell: GMT, progress: Tensor, seen: Seen, shown: Sequence[str], places: Sequence[str]
) -> dict[str, Any]:
    start, end = seen.source.argmax(1), seen.target.argmax(1)
    usage = {"source": seen.source.mean(0), "target": seen.target.mean(0), "training": cell.usage, "age": cell.age}
    close = cosines(wide(cell.slots))
    apart = close[~torch.eye(len(close), dtype=torch.bool, device=close.device)]
    edges = cell.edge_table()
    per_token = {
        "nearest": start,
        "target": end,
        "source_entropy": entropy(seen.source),
        "target_entropy": entropy(seen.target),
        "distance": seen.distance,
        "displacement": seen.move,
        "memory_fraction": seen.output / (seen.output + seen.mixer),
        "edge_influence": seen.influence,
    }
    return {
        "layer": layer,
        "slots": cell.cfg.slots,
        "numbers": _numbers(cell, progress, seen, edges, close),
        "usage": plain(usage),
        "edges": plain(edges),
        "flow": flow(start, end),
        "cosines": plain(torch.histc(apart.cpu(), BINS, -1, 1).long()),
        "per_token": plain(per_token),
        "affinity": affinity(seen.source, start, shown),
        "lists": slot_lists(seen, shown, places),
    }


def _numbers(cell: GMT, progress: Tensor, seen: Seen, edges: Tensor, close: Tensor) -> dict[str, Any]:
    """One number each, for tables and curves over layers."""
    cfg, f = cell.cfg, cell.cfg.slots
    start, end = seen.source.argmax(1), seen.target.argmax(1)
    other = close.masked_fill(torch.eye(f, dtype=torch.bool, device=close.device), -1.0)
    numbers = {
        "source_slots": effective(seen.source.mean(0)),  # N_eff, exp of the entropy of the mean weight
        "target_slots": effective(seen.target.mean(0)),
        "distinct_sources": len(start.unique()),  # slots that are the nearest one of a token
        "distinct_targets": len(end.unique()),
        "top_source": top_share(start, f),
        "top_target": top_share(end, f),
        "self_hops": (start == end).double().mean(),
        "source_entropy": entropy(seen.source).mean(),  # of single tokens
        "target_entropy": entropy(seen.target).mean(),
        "largest_entropy": math.log(f),
        "displacement": seen.move.mean(),
        "displacement_floor": _displacement_floor(cell),
        "memory_fraction": (seen.output / (seen.output + seen.mixer)).mean(),
        "edge_influence": seen.influence.mean(),
        "at_floor": (seen.distance <= cfg.floor * (1 + 1e-5)).double().mean(),  # share of tokens, no gradient there
        "dead_slots": int((cell.usage < cfg.dead_below).sum()),  # by their use in training
        "dead_below": cfg.dead_below,
        "gate": cell.gate.sigmoid(),
        "write_momentum": cell.write_momentum.sigmoid(),
        "temperature": cell.temperature(progress),
        "edge_scale": None if cell.edge_scale is None else cell.edge_scale.exp(),
        "edge_entropy": entropy(edges).mean(),
        "edge_entropy_floor": cfg.edge_entropy_floor,
        "largest_edge": edges.amax(1).mean(),
        "edge_similarity": off_diagonal_mean(cosines(edges)),
        "slot_cosine": off_diagonal_mean(close),
        "coverage": (1 - other.amax(1)).mean(),  # mean distance to the nearest other slot
    }
    return plain(numbers)


def _displacement_floor(cell: GMT) -> float | None:
    """The length below which a displacement keeps its size, because the eps of its norm is larger. None without a norm."""
    return None if cell.cfg.displacement == "none" else math.sqrt(NORM_EPS * cell.site.d_model)


def top_share(chosen: Tensor, slots: int) -> Tensor:
    """Share of tokens on the slot that most are on."""
    return torch.bincount(chosen, minlength=slots).max() / len(chosen)


def flow(start: Tensor, end: Tensor) -> list[list[int]]:
    """[from, to, tokens] of the slot nearest to a token and the slot it mostly goes to, most tokens first."""
    pairs = Counter(zip(start.tolist(), end.tolist(), strict=True))
    return [[i, j, n] for (i, j), n in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))]


def affinity(source: Tensor, start: Tensor, shown: Sequence[str]) -> dict[str, Any]:
    """Mean source weight of the most frequent kinds of token in the slots that are nearest to most tokens; of either, those that
    belong together stand together."""
    kinds = [kind for kind, _ in Counter(shown).most_common(ROWS)]
    slots = [slot for slot, _ in Counter(start.tolist()).most_common(COLUMNS)]
    member = torch.tensor([[word == kind for word in shown] for kind in kinds], dtype=source.dtype)
    weight = (member @ source)[:, slots] / member.sum(1, keepdim=True)
    order = sorted(range(len(kinds)), key=lambda k: (int(weight[k].argmax()), -float(weight[k].max())))
    return {"tokens": [kinds[k] for k in order], "slots": slots, "weight": plain(weight[order])}


def slot_lists(seen: Seen, shown: Sequence[str], places: Sequence[str]) -> list[dict[str, Any]]:
    """Of each slot, the nearest ones first that most tokens have: kinds of token that stand nearest to it and that mostly go to
    it, with their number, and the single tokens closest to it of all, where they stand in the text."""
    start, end = seen.source.argmax(1).tolist(), seen.target.argmax(1).tolist()
    near, going = defaultdict(Counter), defaultdict(Counter)
    for word, i, j in zip(shown, start, end, strict=True):
        near[i][word] += 1
        going[j][word] += 1
    closest = seen.source.topk(min(CLOSEST, len(shown)), dim=0)
    order = sorted(range(seen.source.shape[1]), key=lambda i: (-near[i].total(), -going[i].total(), i))
    return [
        {
            "slot": i,
            "near": near[i].total(),
            "going": going[i].total(),
            "near_tokens": [list(pair) for pair in near[i].most_common(LISTED)],
            "going_tokens": [list(pair) for pair in going[i].most_common(LISTED)],
            "closest": [
                {"weight": plain(w), "text": places[n]}
                for w, n in zip(closest.values[:, i], closest.indices[:, i].tolist(), strict=True)
            ],
        }
        for i in order
    ]


# -- over training


def history(model: LM, records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Lines of ``metrics.jsonl`` -> curves (`eval.inspection.curves`) of what the cells log."""
    return curves(records, {layer: f"layers.{layer}.channel." for layer in cells(model)})


def changes(earlier: LM, model: LM, text: Text) -> dict[str, Any]:
    """Between two checkpoints of a run: ``layers``, each with the share of tokens that are nearest (that mostly go) to another slot
    now, and the angle in degrees by which each slot has turned."""
    before, after = observe(earlier, text)[0], observe(model, text)[0]
    found = []
    for (layer, old), new in zip(cells(earlier).items(), cells(model).values(), strict=True):
        cosine = F.cosine_similarity(old.slots.detach().double(), new.slots.detach().double(), dim=1)
        was, now = before[layer], after[layer]
        moved = {"moved_sources": _moved(was.source, now.source), "moved_targets": _moved(was.target, now.target)}
        found.append({"layer": layer, **plain(moved), "angle": plain(cosine.clamp(-1, 1).acos().rad2deg())})
    return {"layers": found}


def _moved(before: Tensor, after: Tensor) -> Tensor:
    return (before.argmax(1) != after.argmax(1)).double().mean()


# -- for reading

SUMMARY = {
    "source slots": "source_slots",
    "target slots": "target_slots",
    "dead": "dead_slots",
    "top source": "top_source",
    "top target": "top_target",
    "H source": "source_entropy",
    "H target": "target_entropy",
    "displacement": "displacement",
    "memory fraction": "memory_fraction",
    "edge influence": "edge_influence",
    "at floor": "at_floor",
    "gate": "gate",
    "momentum": "write_momentum",
}


def summary(found: dict[str, Any]) -> str:
    """A table with a row for each cell; entropies and influences in nats, shares of 1. Then one of what has changed."""
    rows = [(layer["layer"], *(layer["numbers"][key] for key in SUMMARY.values())) for layer in found["layers"]]
    text = markdown(("layer", *SUMMARY), rows)
    if not found["since"]:
        return text
    headers = ("layer", "other source", "other target", "slots turned by, degrees, mean", "most")
    angles = {now["layer"]: [number(a) for a in now["angle"]] for now in found["since"]["layers"]}
    rows = [
        (n, now["moved_sources"], now["moved_targets"], sum(angles[n]) / len(angles[n]), max(angles[n]))
        for n, now in zip(angles, found["since"]["layers"], strict=True)
    ]
    return f"{text}\n\nsince step {found['since']['step']}:\n\n{markdown(headers, rows)}"


def lists(found: dict[str, Any]) -> str:
    """Which tokens stand nearest to which slot, and go to which, in Markdown."""
    headers = ("slot", "nearest to", "tokens", "goal of", "tokens that go there", "closest of all")
    pages = []
    for layer in found["layers"]:
        rows = [
            (
                str(s["slot"]),
                s["near"],
                _counted(s["near_tokens"]),
                s["going"],
                _counted(s["going_tokens"]),
                "  ".join(code(one["text"]) for one in s["closest"]),
            )
            for s in layer["lists"]
        ]
        pages.append(f"## Layer {layer['layer']}\n\n{markdown(headers, rows)}")
    return "\n\n".join(pages)


def _counted(pairs: Sequence[tuple[str, int]]) -> str:
    return "  ".join(f"{code(token)} {count}" for token, count in pairs)
