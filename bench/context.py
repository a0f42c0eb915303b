"""What one more token costs after a long context, over what it costs after a short one; and the bytes that are remembered."""

from __future__ import annotations

import time
from typing import Any

import torch

from bench.floors import best
from bench.pairs import alternate
from models import LM, Batch, LMState, build, model_config
from models.state import clone, nbytes

CONTEXTS = (1024, 8192, 65536)
STEPS = 16
PIECE = 1024  # tokens of the context in one forward; divides all of them
WIDTH, LAYERS, HEADS = 256, 4, 4

_DELTA = {"kind": "gated_delta", "heads": HEADS, "head_dim": WIDTH // HEADS, "expand_v": 1.0}
MIXERS: dict[str, dict[str, Any]] = {
    "gated_delta": _DELTA,
    "mom": {"kind": "mom", "rule": _DELTA, "memories": 4, "top_k": 2},
    "attention": {"kind": "attention", "heads": HEADS},
    "bmojo-32": {"kind": "bmojo", "heads": HEADS, "window": 32, "m_e": 8},
    "bmojo-512": {"kind": "bmojo", "heads": HEADS, "window": 512, "m_e": 64},
}


def model(name: str, device: str) -> LM:
    """A small model with this mixer in every layer."""
    block = {"mixer": MIXERS[name], "channel": {"kind": "swiglu", "hidden": 3 * WIDTH}}
    return build(
        model_config({"d_model": WIDTH, "n_layers": LAYERS, "vocab_size": 257, "blocks": {"only": block}}),
        device=device,
    ).eval()


@torch.inference_mode()
def measure(
    name: str, pairs: int, device: str, contexts: tuple[int, ...] = CONTEXTS, piece: int = PIECE
) -> list[dict[str, Any]]:
    """Time of ``STEPS`` one-token forwards after each of the longer contexts over that after the first one, in alternating runs."""
    lm, (short, *longer), long = model(name, device), contexts, contexts[-1]
    room = long + STEPS * (pairs + 6) * len(longer)  # two runs to warm up before each of the two timings
    tokens = torch.randint(257, (1, long), generator=torch.Generator().manual_seed(0)).to(device)
    states: dict[int, LMState] = {}
    state, began = lm.init_state(1, room), time.perf_counter()
    for at in range(0, long, piece):
        if at in contexts:
            states[at] = clone(state)
        state = lm(Batch(tokens[:, at : at + piece]), state, donate=True, logits="none").state
    states[long] = state
    seconds = time.perf_counter() - began
    sizes = {n: nbytes(lm.init_state(1, n)) for n in contexts}

    def decode(context: int) -> None:
        for i in range(STEPS):
            out = lm(Batch(tokens[:, i : i + 1]), states[context], donate=True, logits="last")
            states[context] = out.state

    rows = []
    for n in longer:
        ratio = alternate(lambda: decode(short), lambda n=n: decode(n), pairs, f"{name} after {n}", warmup=2)
        row: dict[str, Any] = {"mixer": name, "short": short, "long": n, "pairs": pairs, "state_bytes": sizes}
        row |= {"ratio": ratio.median, "low": ratio.low, "high": ratio.high, "prefill_tokens_per_s": long / seconds}
        row["milliseconds"] = best(lambda n=n: decode(n), device, repeats=2) / STEPS * 1e3
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| mixer | contexts | cost of a token, long / short (95 % interval) | pairs | ms, long | state bytes, short | long |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        short, long = (f"{r['state_bytes'][n]:,}" for n in (r["short"], r["long"]))
        cost = f"{r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
        lines.append(
            f"| {r['mixer']} | {r['long']:,} / {r['short']:,} | {cost} | {r['pairs']} | {r['milliseconds']:.2f} | {short} | {long} |"
        )
    return "\n".join(lines)
