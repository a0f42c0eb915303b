"""What counting bytes achieves on a run's own text: ``python -m eval.baselines RUN``.

An order-k model predicts a byte from the k bytes before it by add-alpha smoothed counts. A document is b1 ... bn
followed by an end, and the place before it is filled with the same sign (the context restarts at each document), so
that every model pays for the same transitions as the language model: V = 257 signs.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from eval.tables import markdown
from models import UserError
from models.errors import guard

V, END = 257, 256
ORDERS = (0, 1, 2, 3)
ALPHAS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # tried on the held-out end of the training text
HELD_OUT = 0.05
TRAIN_BYTES = 32 << 20  # of the training text that is counted
XZ_BYTES = 4 << 20  # of the training text (its end) that xz sees before the validation text; more takes it minutes


def baselines(train: Sequence[bytes], val: Sequence[bytes], xz: bool = True) -> dict[str, Any]:
    """Bits per byte of validation documents under count models fitted on training documents, and of xz.

    -> {"bytes", "documents", "train_bytes", "orders": {k: {"bpb", "alpha"}}, "xz": bpb of the validation text alone,
    "xz_after_train": of what it adds behind the end of the training text}.
    """
    if not sum(map(len, train)) or not sum(map(len, val)):
        raise UserError("baselines need a training and a validation text that are not empty")
    used = _first(train, TRAIN_BYTES)
    size = sum(map(len, val))
    found: dict[str, Any] = {"bytes": size, "documents": len(val), "train_bytes": sum(map(len, used))}
    held = max(1, min(len(used) - 1, round(HELD_OUT * len(used))))
    orders = {}
    for order in ORDERS:
        alpha = ALPHAS[0]
        if len(used) > 1:
            small = CountModel(used[:-held], order)
            tried = small.bits(codes(used[-held:], order), ALPHAS)
            alpha = ALPHAS[int(np.argmin(tried))]
        bits = CountModel(used, order).bits(codes(val, order), (alpha,))[0]
        orders[str(order)] = {"bpb": bits / size, "alpha": alpha}
    found["orders"] = orders
    if xz:
        found |= xz_bpb(used, val)
    return found


class CountModel:
    """Counts of (context, sign) as one sorted array of codes: a count is a difference of two binary searches."""

    def __init__(self, documents: Sequence[bytes], order: int) -> None:
        self.sorted = np.sort(codes(documents, order))

    def bits(self, scored: np.ndarray, alphas: Sequence[float]) -> list[float]:
        """-log2 p of all coded transitions [n], for each alpha: p = (count + alpha) / (context's count + alpha V)."""
        unique, times = np.unique(scored, return_counts=True)
        context = unique // V * V
        pair = self._below(unique + 1) - self._below(unique)
        seen = self._below(context + V) - self._below(context)
        return [float((times * (np.log2(seen + a * V) - np.log2(pair + a))).sum()) for a in alphas]

    def _below(self, code: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.sorted, code)


def codes(documents: Sequence[bytes], order: int) -> np.ndarray:
    """Every transition of the documents as one int64: the ``order`` signs before it and itself, in base V."""
    lead = np.full(order, END, dtype=np.int16)
    end = np.array([END], dtype=np.int16)
    parts = [p for d in documents for p in (lead, np.frombuffer(d, dtype=np.uint8), end)]
    signs = np.concatenate(parts).astype(np.int16)
    code = np.zeros(len(signs) - order, dtype=np.int64)
    for back in range(order + 1):
        code = code * V + signs[back : len(signs) - order + back]
    lengths = np.array([len(d) + 1 + order for d in documents])
    starts = (
        np.cumsum(lengths) - lengths
    )  # a window that begins in a document's last `order` signs straddles the next one
    keep = np.ones(len(signs), dtype=bool)
    for back in range(order):
        keep[(starts + lengths - 1 - back)] = False
    return code[keep[: len(code)]]


def xz_bpb(train: Sequence[bytes], val: Sequence[bytes]) -> dict[str, float]:
    """xz -9e, in bits per byte of the validation text: by itself, and what it adds behind the end of the training text."""
    text, before = b"".join(val), b"".join(train)[-XZ_BYTES:]
    with ThreadPoolExecutor(max_workers=min(3, os.cpu_count() or 1)) as pool:
        alone, first, both = pool.map(_xz, (text, before, before + text))
    return {"xz": 8 * alone / len(text), "xz_after_train": 8 * (both - first) / len(text)}


def _xz(raw: bytes) -> int:
    return len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))


def _first(documents: Sequence[bytes], limit: int) -> list[bytes]:
    taken, size = [], 0
    for doc in documents:
        if taken and size + len(doc) > limit:
            break
        taken.append(doc)
        size += len(doc)
    return taken


# -- of a run


def run_baselines(run: Path | str, xz: bool = True) -> dict[str, Any]:
    """`baselines` on the corpus of a run, with the run's own last validation beside them; written to
    ``RUN/eval/baselines.json``."""
    from eval.corpus_tasks import documents, open_run_corpus
    from eval.history import read_metrics

    run = Path(run)
    corpus = open_run_corpus(run)
    train = [d.encode() for shards, _ in corpus.train for d in documents(shards, corpus.tokenizer)]
    val = [d.encode() for d in documents(corpus.val, corpus.tokenizer)]
    found = baselines(train, val, xz)
    last = next((m for m in reversed(read_metrics(run)) if "bpb" in m.get("val", {})), None)
    if last is not None:
        found["ours"] = {"step": last["step"], "bpb": last["val"]["bpb"], "bytes": last["val"].get("bytes")}
    target = run / "eval" / "baselines.json"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    return found


def table(found: dict[str, Any]) -> str:
    """Best last: model, bits per byte, and a word about it."""
    rows: list[tuple[str, float, str]] = []
    names = {"0": "unigram", "1": "order-1", "2": "order-2", "3": "order-3"}
    for order, one in found["orders"].items():
        rows.append(
            (names.get(order, f"order-{order}"), one["bpb"], f"add-{one['alpha']:g} counts, {order} bytes of context")
        )
    if "xz" in found:
        rows.append(("xz", found["xz"], "xz -9e, validation text alone"))
        rows.append(
            (
                "xz after train",
                found["xz_after_train"],
                f"xz -9e, what it adds behind the last {XZ_BYTES >> 20} MiB of training text",
            )
        )
    if "ours" in found:
        ours = found["ours"]
        whole = ours.get("bytes") in (None, found["bytes"])
        rows.append(
            ("ours", ours["bpb"], f"step {ours['step']}" + ("" if whole else f", on {ours['bytes']:,} bytes of it"))
        )
    rows.sort(key=lambda row: -row[1])
    return markdown(("model", "bits per byte", "what"), rows)


@guard
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m eval.baselines",
        description="Byte count models and xz on the text of a run, beside the run's own bits per byte.",
        epilog="example: python -m eval.baselines runs/quickstart",
    )
    p.add_argument("run", help="a run folder")
    p.add_argument("--no-xz", action="store_true", help="leave out xz, the slowest part")
    args = p.parse_args(argv)
    found = run_baselines(args.run, not args.no_xz)
    print(
        f"{found['bytes']:,} validation bytes in {found['documents']:,} documents, "
        f"{found['train_bytes']:,} training bytes counted"
    )
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
