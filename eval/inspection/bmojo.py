"""What the layers of B'MOJO do with a text (arXiv:2407.06324): which tokens they keep, how old those are, and how attention is
shared out among the window, outputs of the state-space mixer and kept tokens.

Everything is made plain numbers first, as they are stored in ``inspect.json``; pictures and tables are made from those alone.
Tokens are numbered window by window; a window of the text is read without a past, in chunks of W tokens, before each of which the
kept tokens are chosen anew. Shares of attention are weights of the one softmax. They are told of the queries behind the first chunk
of a window: the others have no memory yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eval.inspection import bmojo_hooks
from eval.inspection.beside import Beside
from eval.inspection.bmojo_attention import KINDS
from eval.inspection.bmojo_hooks import ablate, check, mixers, standard
from eval.inspection.bmojo_pictures import draw
from eval.inspection.bmojo_recall import recall
from eval.inspection.bmojo_watch import Kept, Seen, final_sets, observe, observe_archive
from eval.inspection.curves import curves
from eval.inspection.numbers import number, plain, rank_correlation
from eval.inspection.text import Text
from eval.inspection.verbatim import block, code
from eval.run import LoadedRun
from eval.tables import markdown
from models import LM, UserError
from models.mixers.bmojo import BMojo

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

ABLATIONS = bmojo_hooks.ABLATIONS
LISTED = 16  # kept tokens that are told of
BINS = 24  # of ages
QUANTILES = (0.1, 0.5, 0.9)


# -- plain numbers


def measure(model: LM, text: Text) -> dict[str, Any]:
    """The loss on the text, its tokens, how long its ``windows`` are, and ``layers``: what each kept and read. ``archive``: where a
    layer has one, the shares with its rows, of the text read as a prompt is. Raises UserError without a layer to look at."""
    if not mixers(model):
        raise UserError(
            "no bmojo layer has a window, so there is one key and nothing is kept: look at the model with --part any"
        )
    seen, loss = observe(model, text)
    shown, places = [text.shown(i) for i in text.ids], text.places()
    return {
        "loss": plain(loss, 12),
        "tokens": shown,
        "windows": [len(w) - 1 for w in text.windows],
        "ids": text.answers is not None,  # tokens are shown as numbers
        "layers": [_layer(n, part, seen[n], shown, places) for n, part in mixers(model).items()],
        "archive": _archive(model, text),
    }


def more(run: LoadedRun, text: Text, beside: Beside) -> dict[str, Any]:
    """``recall``: whether needed tokens are kept, of a run on a task that says which they are (`bmojo_recall.recall`). Raises
    UserError for a baseline: there is nothing to compare."""
    if beside.baseline is not None:
        raise UserError("--baseline: nothing of a bmojo part is compared with another run")
    return {"recall": recall(run)}


def _layer(layer: int, part: BMojo, seen: Seen, shown: Sequence[str], places: Sequence[str]) -> dict[str, Any]:
    """Lists by head or by kind stand in the order of heads and of KINDS; those by chunk in the order of the chunks of a window."""
    cfg, kept = part.cfg, seen.kept
    assert seen.shares is not None
    assert seen.keys is not None
    later = kept.position >= cfg.window
    by_head = seen.shares[later].mean(0)
    even = (seen.keys / seen.keys.sum(1, keepdim=True))[later].mean(0)
    found = {
        "layer": layer,
        "window": cfg.window,
        "m_f": cfg.m_f,
        "m_e": cfg.m_e,
        "fading_mode": cfg.fading_mode,
        "score": cfg.score,
        "kinds": list(KINDS),
        "queries": int(later.sum()),
        "shares": by_head.mean(0),
        "shares_by_head": by_head,
        "shares_by_chunk": _by_chunk(seen.shares.mean(1), kept),
        "even": even,  # what the shares would be if all keys in sight had the same weight
        "error": seen.error,
        "per_token": {"shares": seen.shares.mean(1).T},
        "kept": None,
    }
    if cfg.m_e:
        assert seen.score is not None
        held, final = _held(kept), torch.cat(final_sets(part, seen))
        found["per_token"] |= {"score": seen.score, "held": held, "given": seen.given, "bar": _bar(part, seen)}
        found["kept"] = _kept(part, seen, final)
        found["lists"] = _listed(seen, held, final, shown, places)
    return plain(found, 5)


def _by_chunk(values: Tensor, kept: Kept) -> Tensor:
    """values [N, ...] -> means over the tokens of the n-th chunks of all windows [chunks, ...]."""
    number = (kept.before // _size(kept))[kept.chunk]
    sums = torch.zeros(int(number.max()) + 1, *values.shape[1:], dtype=values.dtype).index_add_(0, number, values)
    return sums / torch.bincount(number).view(-1, *[1] * (values.ndim - 1))


def _size(kept: Kept) -> int:
    """Tokens of a whole chunk."""
    return int(kept.count.max())


def _kept(part: BMojo, seen: Seen, final: Tensor) -> dict[str, Any]:
    """``sets``: the kept tokens of each chunk; ``final``: those held behind each window."""
    kept, ages = seen.kept, seen.ages
    assert ages is not None
    assert seen.score is not None
    turnover, chunks = _turnover(kept)
    sets = [[i for i in row if i >= 0] for row in kept.token.tolist()]
    return {
        "sets": sets,
        "final": final,
        "mean": sum(map(len, sets)) / max(1, int((kept.before > 0).sum())),  # per chunk that has a past
        "turnover": turnover,  # by chunk, from the second on: the share of its set that was not in the one before
        # of scores without an order in time, where there are more tokens than slots
        "turnover_iid": [1 / c for c in chunks],
        "mean_turnover": torch.tensor(turnover[1:]).mean() if turnover[1:] else None,
        "age": _ages(ages),
        "score": torch.quantile(seen.score, torch.tensor(QUANTILES)),
        "score_kept": torch.quantile(seen.score[final], torch.tensor(QUANTILES)) if len(final) else None,
        "zero_scores": (seen.score == 0).double().mean(),
    }


def _turnover(kept: Kept) -> tuple[list[float], list[int]]:
    """-> (means over windows, the number of the chunk that each is about, 1 for the second)."""
    shares: dict[int, list[float]] = {}
    size = _size(kept)
    sets = [{i for i in row if i >= 0} for row in kept.token.tolist()]
    for before, earlier, now in zip(kept.before.tolist()[1:], sets, sets[1:]):
        if before and now:
            shares.setdefault(before // size, []).append(len(now - earlier) / len(now))
    return [sum(found) / len(found) for found in shares.values()], [*shares]


def _ages(ages: Tensor) -> dict[str, Any]:
    """`Seen.ages` -> ``edges`` of bins; the shares in each of kept tokens, of the weight on them, and of an evenly drawn set; and
    QUANTILES of these three. None where no query sees a kept token."""
    longest = ages.shape[1]
    edges = torch.linspace(0, longest, min(BINS, longest) + 1).round().long()
    bins = torch.bucketize(torch.arange(longest), edges[1:], right=True)
    binned = torch.zeros(3, len(edges) - 1, dtype=ages.dtype).index_add_(1, bins, ages)
    total = ages.sum(1, keepdim=True)
    share, below = binned / total, ages.cumsum(1) / total
    quantiles = [(below < q).sum(1) for q in QUANTILES]
    names = ("kept", "read", "even")
    return {
        "edges": edges,
        **{name: share[n] for n, name in enumerate(names)},
        "quantiles": {name: [int(q[n]) if total[n] > 0 else None for q in quantiles] for n, name in enumerate(names)},
    }


def _held(kept: Kept) -> Tensor:
    """int64 [N], for how many chunks each token was kept."""
    return torch.bincount(kept.token[kept.token >= 0], minlength=int(kept.count.sum()))


def _bar(part: BMojo, seen: Seen) -> Tensor:
    """[N], the lowest score in the set of the token's chunk: what a newcomer has to beat. NaN where there is room."""
    assert seen.score is not None
    score = torch.where(seen.kept.token >= 0, seen.score[seen.kept.token.clamp(min=0)], torch.inf)
    full = (seen.kept.token >= 0).all(1)
    return torch.where(full, score.amin(1), torch.nan)[seen.kept.chunk]


def _listed(
    seen: Seen, held: Tensor, final: Tensor, shown: Sequence[str], places: Sequence[str]
) -> list[dict[str, Any]]:
    """The kept tokens that attention gave most, where they stand in the text."""
    assert seen.given is not None
    assert seen.score is not None
    last = set(final.tolist())
    order = [i for i in seen.given.argsort(descending=True, stable=True).tolist() if held[i]][:LISTED]
    return [
        {
            "token": i,
            "shown": shown[i],
            "place": places[i],
            "position": int(seen.kept.position[i]),
            "score": float(seen.score[i]),
            "held": int(held[i]),
            "given": float(seen.given[i]),
            "final": i in last,
        }
        for i in order
    ]


def _archive(model: LM, text: Text) -> dict[str, Any] | None:
    if all(part.cfg.archive is None for part in mixers(model).values()):
        return None
    found, errors, loss = observe_archive(model, text)
    later = {n: _positions(text) >= mixers(model)[n].cfg.window for n in found}
    layers = [
        {"layer": n, "queries": int(later[n].sum()), "shares_by_head": shares[later[n]].mean(0), "error": errors[n]}
        for n, shares in found.items()
    ]
    return {"loss": plain(loss, 12), "kinds": [*KINDS, "archive"], "layers": plain(layers)}


def _positions(text: Text) -> Tensor:
    """int64 [N], of each token in its window."""
    return torch.cat([torch.arange(len(w) - 1) for w in text.windows])


# -- over training


def history(model: LM, records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Lines of ``metrics.jsonl`` -> curves (`eval.inspection.curves`) of what the layers log."""
    return curves(records, {layer: f"layers.{layer}.mixer." for layer in mixers(model)})


def changes(earlier: LM, model: LM, text: Text) -> dict[str, Any]:
    """Between two checkpoints of a run: ``layers``, each with the shares of attention then (by kind); the share of kept tokens, over
    all chunks, that were not kept then; and the rank correlation of the scores of all tokens, then and now."""
    before, after = observe(earlier, text)[0], observe(model, text)[0]
    found = []
    for n, now in after.items():
        was = before[n]
        assert was.shares is not None
        later = was.kept.position >= mixers(earlier)[n].cfg.window
        one: dict[str, Any] = {"layer": n, "shares": was.shares[later].mean((0, 1)), "other": None, "agreement": None}
        if was.score is not None and now.score is not None:
            one |= {"other": _other(was.kept, now.kept), "agreement": rank_correlation(was.score, now.score)}
        found.append(plain(one))
    return {"layers": found}


def _other(was: Kept, now: Kept) -> Tensor:
    """Share of what is kept that was not, over all chunks."""
    there = now.token >= 0
    old = (now.token[:, :, None] == was.token[:, None]).any(2) & there
    return 1 - old.sum() / there.sum()


# -- for reading


def summary(found: dict[str, Any]) -> str:
    """Tables with a row for each layer: shares of attention, beside those of keys that are all alike; kept tokens; archives; recall;
    what has changed."""
    tables = [_shares_table(found["layers"])]
    kept = [layer for layer in found["layers"] if layer["kept"]]
    if kept:
        tables.append(_kept_table(kept))
    if found["archive"]:
        tables.append(_archive_table(found["archive"]))
    if found["recall"]:
        tables.append(_recall_table(found["recall"]))
    if found["since"]:
        headers = ("layer", *(f"{kind} then" for kind in KINDS), "other tokens kept", "scores' rank correlation")
        rows = [(one["layer"], *one["shares"], one["other"], one["agreement"]) for one in found["since"]["layers"]]
        tables.append(f"since step {found['since']['step']}:\n\n{markdown(headers, rows)}")
    return "\n\n".join(tables)


def _shares_table(layers: Sequence[dict[str, Any]]) -> str:
    headers = ("attention of layer", *KINDS, *(f"{kind}, if even" for kind in KINDS), "most eidetic head")
    rows = [
        (layer["layer"], *layer["shares"], *layer["even"], max((h[2] for h in layer["shares_by_head"]), default=None))
        for layer in layers
        if layer["queries"]
    ]
    return markdown(headers, rows)


def _archive_table(found: dict[str, Any]) -> str:
    rows = [(one["layer"], *_mean_over_heads(one["shares_by_head"])) for one in found["layers"] if one["queries"]]
    said = f"read as a prompt, with archives: loss {number(found['loss']):.4f}"
    return f"{said}\n\n{markdown(('layer', *found['kinds']), rows)}" if rows else said


def _kept_table(layers: Sequence[dict[str, Any]]) -> str:
    headers = (
        "kept by layer",
        "score",
        "slots",
        "in use",
        "age, median",
        "if even",
        "as read",
        "turnover",
        "lowest",
        "scores 0",
    )
    rows = []
    for layer in layers:
        kept, ages = layer["kept"], layer["kept"]["age"]["quantiles"]
        middle = QUANTILES.index(0.5)
        bar = [b for b in layer["per_token"]["bar"] if b is not None]
        rows.append(
            (
                layer["layer"],
                layer["score"],
                layer["m_e"],
                kept["mean"],
                *(ages[name][middle] for name in ("kept", "even", "read")),
                kept["mean_turnover"],
                bar[-1] if bar else None,
                kept["zero_scores"],
            )
        )
    return markdown(headers, rows)


def _recall_table(found: dict[str, Any]) -> str:
    headers = (
        "questions to layer",
        "outside of its window",
        "key kept",
        "value kept",
        "by chance",
        "pair carried",
        "by chance",
        "right if carried",
        "right if not",
        "kept of pairs",
        "of the past",
    )
    keys = (
        "layer",
        "questions",
        "key",
        "value",
        "one_by_chance",
        "carried",
        "carried_by_chance",
        "right_if_kept",
        "right_if_not",
        "kept_of_pairs",
        "pairs_of_past",
    )
    rows = [tuple(layer[key] for key in keys) for layer in found["layers"]]
    said = f"{found['questions']:,} questions in {found['rows']:,} validation rows, {found['right']:.1%} answered right"
    return f"{said}\n\n{markdown(headers, rows)}"


def _mean_over_heads(shares: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*shares, strict=True)]


def lists(found: dict[str, Any]) -> str:
    """Of each layer, the text with the tokens that it holds in the end «marked», and the kept tokens that attention gave most."""
    headers = ("token", "position", "score", "chunks held", "in the end", "weight got", "where it stands")
    pages = []
    for layer in found["layers"]:
        if not layer["kept"]:
            continue
        rows = [
            (
                code(one["shown"]),
                one["position"],
                one["score"],
                one["held"],
                "yes" if one["final"] else "no",
                one["given"],
                code(one["place"]),
            )
            for one in layer["lists"]
        ]
        pages.append(f"## Layer {layer['layer']}\n\n{_marked(found, layer)}\n\n{markdown(headers, rows)}")
    return "\n\n".join(pages)


def _marked(found: dict[str, Any], layer: dict[str, Any]) -> str:
    """The windows of the text, each a block of code."""
    final, shown, first, blocks = set(layer["kept"]["final"]), found["tokens"], 0, []
    for length in found["windows"]:
        tokens = range(first, first + length)
        words = [f"«{shown[i]}»" if i in final else shown[i] for i in tokens]
        text = (" " if found["ids"] else "").join(words).replace("␣", " ").replace("\\n", "\\n\n")
        blocks.append(block(text))
        first += length
    return "\n\n".join(blocks)
