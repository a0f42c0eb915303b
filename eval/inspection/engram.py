"""What the Engrams of a model do with a text (arXiv:2601.07372): what their gates let in, who shares rows, what it is good for.

Everything is made plain numbers first, as they are stored in ``inspect.json``; pictures and tables are made from those alone.
Losses and divergences are in nats, lengths are L2 norms over the features of one token and branch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data import Corpus
from eval.inspection import depth, engram_hooks, engram_rows, engram_words
from eval.inspection.beside import Beside, batches_of, batches_of_text, corpus_of
from eval.inspection.curves import curves
from eval.inspection.engram_hooks import Seen, ablate, check, engrams, observe, standard
from eval.inspection.engram_pictures import draw
from eval.inspection.engram_rows import QUANTILES, Tokens, addressing_of
from eval.inspection.numbers import number, plain
from eval.inspection.text import Text, loss, mean_loss, read
from eval.inspection.verbatim import code
from eval.run import LoadedRun
from eval.tables import markdown
from kernels.memory_gate.reference import DEAD_ZONE
from models import LM
from models.memories.engram import Engram
from models.stores.base import VALUES

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

ABLATIONS = engram_hooks.ABLATIONS
LISTED = 12  # n-grams on either side that are told of


# -- plain numbers


def measure(model: LM, text: Text) -> dict[str, Any]:
    """The loss on the text, its tokens and n-grams, and ``layers``: what each gate did with them."""
    seen, nll = observe(model, text)
    return {
        "loss": plain(mean_loss(text, [nll]), 12),
        "tokens": [text.shown(i) for i in text.ids],
        "ngrams": engram_words.ngrams(addressing_of(model), text),
        "layers": [_layer(n, part, seen[n]) for n, part in engrams(model).items()],
    }


def _layer(layer: int, part: Engram, seen: Seen) -> dict[str, Any]:
    """``alpha``: by branch and token; quantiles (QUANTILES) by branch."""
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    has_conv = part.conv is not None

    def spread(t: Tensor) -> list[list[float]]:
        return torch.quantile(t.double(), at, dim=0).T.tolist()

    numbers = {
        "gate": seen.alpha.double().mean(),
        "added": seen.added.double().mean(),
        "conv": seen.conv.double().mean() if has_conv else None,
        "flat": (seen.score.abs() < DEAD_ZONE).double().mean(),  # share of gates that have no slope
    }
    quantiles = {
        "alpha": spread(seen.alpha),
        "added": spread(seen.added),
        "conv": spread(seen.conv) if has_conv else None,
    }
    return {
        "layer": layer,
        "key": part.key,
        "branches": part.branches,
        "orders": list(part.cfg.orders),
        "heads": part.cfg.heads,
        "row_width": part.cfg.row_width,
        "gate": part.cfg.gate,
        "numbers": plain({name: None if t is None else float(t) for name, t in numbers.items()}),
        "quantiles": plain(quantiles),
        "alpha": plain(seen.alpha.T, 4),
    }


def more(run: LoadedRun, text: Text, beside: Beside) -> dict[str, Any]:
    """What the tables hold, who shares their rows and what a cache of them would be worth, on the data that the run was trained on
    (``counted``; without it on the text); the loss by how often an n-gram was seen there; classes of tokens; depth, also beside a
    baseline."""
    model = run.model
    corpus, why = corpus_of(run) if beside.train_tokens else (None, "--train-tokens 0")
    tokens, source = _counted(run, text, corpus, why, beside.train_tokens)
    addressing = addressing_of(model)
    return {
        "counted": {
            "source": source,
            "tokens": tokens.back.shape[1],
            "batches": int(tokens.batch[-1]) + 1,
        },
        "tables": [plain(_table(run, part, layer, tokens)) for layer, part in engrams(model).items()],
        "zipf": {str(n): plain(_zipf(tokens, n)) for n in range(2, addressing.max_order + 1)},
        "frequency": plain(_frequency(run, text, corpus, beside)),
        "compression": plain(engram_words.compression(addressing, tokens.back[0], text.shown)),
        "lens": plain(depth.lens(model, text)),
        "baseline": plain(_baseline(run, text, beside.baseline)),
    }


def _counted(run: LoadedRun, text: Text, corpus: Corpus | None, why: str, limit: int) -> tuple[Tokens, str]:
    addressing = addressing_of(run.model)
    if corpus is not None and run.step:
        tokens = engram_rows.gather(addressing, batches_of(run, corpus), limit)
        return tokens, "what it was trained on, from the first step"
    source = f"the text itself ({why or 'it was never trained'})"
    return engram_rows.gather(addressing, batches_of_text(text), len(text.ids)), source


def _table(run: LoadedRun, part: Engram, layer: int, tokens: Tokens) -> dict[str, Any]:
    """``orders``: `engram_rows.sharing`, with distinct rows per lookup in a batch (``unique``)."""
    orders = engram_rows.heads(addressing_of(run.model), part, tokens)
    rows = torch.cat([order.rows for order in orders])
    bar = tqdm(zip(part.cfg.orders, orders, strict=True), f"rows of layer {layer}", len(orders), False, disable=None)
    found = []
    for n, order in bar:
        unique = engram_rows.unique_ratio(order.rows, tokens.batch, part.table.rows)
        found.append({"order": n, "unique": unique, **engram_rows.sharing(order)})
    return {
        "layer": layer,
        "orders": found,
        "unique": engram_rows.unique_ratio(rows, tokens.batch, part.table.rows),
        "caches": engram_rows.caches(rows, part.table.rows),
        "values": engram_rows.contents(part.table, rows),
    }


def _zipf(tokens: Tokens, order: int) -> dict[str, Any]:
    return engram_words.zipf(torch.bincount(engram_words.types(tokens.back[:order])).numpy())


def _frequency(run: LoadedRun, text: Text, corpus: Corpus | None, beside: Beside) -> dict[str, Any] | None:
    """By order: `engram_words.buckets`. None without training data."""
    if corpus is None:
        return None
    seen, nll = observe(run.model, text)
    losses = {"whole": nll}
    with ablate(run.model, "no_memory"):
        losses["without memory"] = _losses(run.model, text)
    if beside.baseline is not None:
        losses["baseline"] = _losses(beside.baseline.model, text)
    orders = range(2, addressing_of(run.model).max_order + 1)
    return {str(n): engram_words.buckets(corpus, beside.train_tokens, n, text, losses, seen) for n in orders}


def _losses(model: LM, text: Text) -> Tensor:
    return torch.cat([nll.cpu() for nll, _ in read(model, text)])


def _baseline(run: LoadedRun, text: Text, other: LoadedRun | None) -> dict[str, Any] | None:
    """``cka`` [layers of the run, layers of the baseline], ``alignment``: `depth.soft_alignment`."""
    if other is None:
        return None
    similarity = depth.cka(run.model, other.model, text)
    return {
        "run": other.name,
        "step": other.step,
        "loss": loss(other.model, text),
        "lens": depth.lens(other.model, text),
        "cka": similarity,
        "alignment": depth.soft_alignment(similarity),
    }


# -- over training


def history(model: LM, records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Lines of ``metrics.jsonl`` -> curves (`eval.inspection.curves`) of what the layers log."""
    return curves(records, {layer: f"layers.{layer}.memory." for layer in engrams(model)})


def changes(earlier: LM, model: LM, text: Text) -> dict[str, Any]:
    """Between two checkpoints of a run: ``layers``, each with the mean gate then, the mean size of its change, the share of rows
    that are others now, and the mean length of their change over that of what they were."""
    before, after = observe(earlier, text)[0], observe(model, text)[0]
    found = []
    for (layer, old), new in zip(engrams(earlier).items(), engrams(model).values(), strict=True):
        moved, by = _moved_rows(old, new)
        now = {
            "gate": before[layer].alpha.double().mean().item(),
            "gate_change": (after[layer].alpha - before[layer].alpha).abs().double().mean().item(),
            "rows_changed": moved,
            "row_change": by,
        }
        found.append({"layer": layer, **plain(now)})
    return {"layers": found}


def _moved_rows(old: Engram, new: Engram) -> tuple[float, float | None]:
    rows, moved, ratio = old.table.rows, 0, 0.0
    was, now = (part.table.state_dict()[VALUES] for part in (old, new))
    for start in range(0, rows, engram_rows.BLOCK):
        a, b = (t[start : start + engram_rows.BLOCK].double().cpu() for t in (was, now))
        other = (a != b).any(1)
        moved += int(other.sum())
        ratio += float(((b - a)[other].norm(dim=1) / a[other].norm(dim=1).clamp(min=1e-30)).sum())
    return moved / rows, ratio / moved if moved else None


# -- for reading


def summary(found: dict[str, Any]) -> str:
    """What the gates did, what is in the tables, how n-grams share rows, and what has changed: a Markdown table each."""
    parts = [_gates(found), _tables(found), _sharing(found)]
    if found["since"]:
        parts.append(f"since step {found['since']['step']}:\n\n{_since(found['since'])}")
    if found["baseline"]:
        parts.append(_beside(found))
    return "\n\n".join(parts)


def _gates(found: dict[str, Any]) -> str:
    headers = ("layer", "branch", "gate", "5 %", "median", "95 %", "added / stream", "conv / value", "without slope")
    rows = []
    for layer in found["layers"]:
        numbers, quantiles = layer["numbers"], layer["quantiles"]
        for m, alpha in enumerate(layer["alpha"]):
            some = quantiles["alpha"][m]
            mean = sum(map(number, alpha)) / len(alpha)
            conv = None if quantiles["conv"] is None else quantiles["conv"][m][2]
            row = (layer["layer"], m, mean, some[0], some[2], some[4], quantiles["added"][m][2], conv, numbers["flat"])
            rows.append(row)
    return markdown(headers, rows)


def _tables(found: dict[str, Any]) -> str:
    headers = ("layer", "rows", "touched in training", "looked up", "distinct rows per lookup in a batch")
    rows = [
        (t["layer"], t["values"]["rows"], t["values"]["touched"], t["values"]["looked_up"], t["unique"])
        for t in found["tables"]
    ]
    counted = found["counted"]
    about = f"Rows and sharing: {counted['source']}, {counted['tokens']:,} tokens in {counted['batches']:,} batches."
    return f"{about}\n\n{markdown(headers, rows)}"


def _sharing(found: dict[str, Any]) -> str:
    headers = (
        "layer", "order", "n-grams", "load", "occupied", "ideal", "Zipf", "collide, by token", "in any head", "in all",
        "by type", "in any head", "in all",
    )  # fmt: skip
    rows = []
    for table in found["tables"]:
        for o in table["orders"]:
            token, kind = o["collisions"]["token"], o["collisions"]["type"]
            means = (_mean(o[name]) for name in ("load", "occupied", "ideal"))
            zipf = found["zipf"][str(o["order"])]["exponent"]
            by = [x for c in (token, kind) for x in (_mean(c["different"]), c["any"], c["all"])]
            rows.append((table["layer"], o["order"], o["types"], *means, zipf, *by))
    return markdown(headers, rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _since(since: dict[str, Any]) -> str:
    headers = ("layer", "gate then", "change of the gate", "rows changed", "by, of their length")
    rows = [(n["layer"], n["gate"], n["gate_change"], n["rows_changed"], n["row_change"]) for n in since["layers"]]
    return markdown(headers, rows)


def _beside(found: dict[str, Any]) -> str:
    other = found["baseline"]
    lens = [*other["lens"], *[None] * (len(found["lens"]) - len(other["lens"]))]
    rows = list(zip(range(len(lens)), found["lens"], lens, other["alignment"]))
    headers = ("layer", "KL(last, layer)", "of the baseline", "most like layer of the baseline")
    about = f"baseline {other['run']}, step {other['step']}: loss {number(other['loss']):.4f} nats per {found['per']}"
    return f"{about}\n\n{markdown(headers, rows)}"


def lists(found: dict[str, Any]) -> str:
    """The loss by frequency, caches, classes of tokens, and for which n-grams the gates open."""
    return "\n\n".join([*_by_frequency(found), _caches(found), _classes(found), *_opened(found)])


def _by_frequency(found: dict[str, Any]) -> Iterator[str]:
    for order, buckets in (found["frequency"] or {}).items():
        if buckets is None:
            continue
        headers = ("seen in training", "tokens", *(f"loss, {name}" for name in buckets["losses"]))
        headers += tuple(f"gate of layer {layer}" for layer in buckets["gates"])
        columns = (*buckets["losses"].values(), *buckets["gates"].values())
        rows = list(zip(buckets["names"], buckets["tokens"], *columns, strict=True))
        about = f"By how often the last {order} tokens stand in {buckets['tokens_counted']:,} tokens of training data"
        yield f"## Loss by frequency, order {order}\n\n{about}:\n\n{markdown(headers, rows)}"


def _caches(found: dict[str, Any]) -> str:
    rows = []
    for table in found["tables"]:
        c = table["caches"]
        for size, *rates in zip(c["rows"], c["lru"], c["lfu"], c["best"], strict=True):
            rows.append((table["layer"], size, size / table["values"]["rows"], *rates, c["ceiling"]))
    headers = ("layer", "rows of the cache", "of the table", "LRU", "LFU", "the most frequent", "room for all")
    lookups = found["tables"][0]["caches"]["lookups"]
    return (
        f"## Caches\n\nHit rates, simulated with {lookups:,} lookups, one after the other:\n\n{markdown(headers, rows)}"
    )


def _classes(found: dict[str, Any]) -> str:
    c = found["compression"]
    about = (
        f"{c['tokens']:,} tokens fold onto {c['classes']:,} ({c['kind']}): {c['reduction']:.2%} fewer; "
        f"{c['merged']:.2%} of the tokens read are of a class with others."
    )
    rows = [(one["size"], " ".join(code(t) for t in one["tokens"])) for one in c["largest"]]
    return (
        f"## Compression\n\n{about}\n\n{markdown(('size', 'tokens'), rows)}" if rows else f"## Compression\n\n{about}"
    )


def _opened(found: dict[str, Any]) -> Iterator[str]:
    """N-grams of the highest order by their mean gate."""
    grams = found["ngrams"][max(found["ngrams"], key=int)]
    for layer in found["layers"]:
        gates = defaultdict(list)
        for gram, *alpha in zip(grams, *layer["alpha"], strict=True):
            gates[gram].append(_mean([number(a) for a in alpha]))
        ranked = sorted(((_mean(values), len(values), gram) for gram, values in gates.items()), reverse=True)
        shown = {"widest": ranked[:LISTED], "narrowest": ranked[::-1][:LISTED]}
        rows = [
            tuple(cell for some in shown.values() for cell in (code(some[i][2]), some[i][1], some[i][0]))
            for i in range(min(LISTED, len(ranked)))
        ]
        headers = ("gate widest for", "times", "gate", "narrowest for", "times", "gate")
        yield f"## Layer {layer['layer']}\n\n{markdown(headers, rows)}"
