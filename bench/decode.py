"""One-token decode against transformers' generate-style cached forward of the same Llama shape, and cost over context length."""

from __future__ import annotations

from typing import Any

import torch

from bench.pairs import alternate
from bench.train import ours_config, peer_model
from models import Batch, build
from models.state import nbytes

CONTEXTS = (128, 1024)
STEPS = 16


@torch.inference_mode()
def measure(shape: str, context: int, pairs: int, device: str) -> dict[str, Any]:
    """Time of ``STEPS`` cached one-token forwards after ``context`` tokens: the peer's over ours, and our state's bytes."""
    from transformers import DynamicCache

    mine = build(ours_config(shape), device=device).eval()
    theirs = peer_model(shape).to(device).eval()
    vocab = mine.cfg.vocab_size
    prompt = torch.randint(vocab, (1, context), generator=torch.Generator().manual_seed(0)).to(device)
    steps = torch.randint(vocab, (STEPS, 1, 1), generator=torch.Generator().manual_seed(1)).to(device)
    prefilled = mine(Batch(prompt), mine.init_state(1, context + STEPS), logits="last").state

    def ours() -> None:
        state = prefilled  # the first step copies it, the others reuse the copy
        for i, token in enumerate(steps):
            state = mine(Batch(token), state, donate=i > 0, logits="last").state

    cache = DynamicCache()
    theirs(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def peer() -> None:
        for token in steps:
            theirs(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-len(steps))

    ratio = alternate(ours, peer, pairs, f"decode {shape} at {context}", warmup=2)
    state = nbytes(mine.init_state(1, context))
    found = {"shape": shape, "context": context, "pairs": pairs, "state_bytes": state}
    return {**found, "ratio": ratio.median, "low": ratio.low, "high": ratio.high}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| shape | context | speed ours / transformers (95 % interval) | pairs | state bytes (fp32) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        interval = f"{r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
        lines.append(f"| {r['shape']} | {r['context']} | {interval} | {r['pairs']} | {r['state_bytes']:,} |")
    return "\n".join(lines)
