"""What a run measures on its validation split while it trains: always the same tokens or rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from configs.schema import RunConfig
from data import Corpus, iterate_once
from data.synthetic.feed import Synthetic
from eval import recall
from models import LM, Batch
from training.parallel import World, all_reduce


def validate(
    model: LM, data: Corpus | Synthetic, cfg: RunConfig, autocast: Callable[[], Any], rows: int, w: World
) -> dict[str, Any]:
    """Of text: mean loss per target (nats), perplexity and bits per byte; of a synthetic task: loss per answer and accuracy.
    ``rows`` in a batch. The model comes back in training mode."""
    model.eval()
    if isinstance(data, Synthetic):
        count = recall.validation_rows(cfg)
        found = recall.measure(model, data, data.once(count, rows, w.rank, w.size), autocast, w)
    else:
        found = _text(model, data, cfg, autocast, rows, w)
    model.train()
    return found


@torch.no_grad()
def _text(
    model: LM, corpus: Corpus, cfg: RunConfig, autocast: Callable[[], Any], rows: int, w: World
) -> dict[str, Any]:
    d, limit = cfg.data, cfg.train.val_tokens or None
    token_bytes = torch.from_numpy(corpus.tokenizer.token_bytes())
    sums = torch.zeros(3, dtype=torch.float64)
    batches: Iterator[Any] = iterate_once(
        corpus.val, corpus.tokenizer, d.seq_len, rows, d.packing, d.max_docs_per_row, w.rank, w.size, limit
    )
    for fields in batches:
        batch = Batch(**fields)
        assert batch.targets is not None
        with autocast():
            nll = model(batch.to(w.device), denom=1.0).losses["lm"]
        scored = batch.targets[batch.loss_mask]
        sums += torch.tensor([nll.item(), len(scored), token_bytes[scored].sum().item()], dtype=torch.float64)
    nll, count, size = all_reduce(sums.to(w.device), w).tolist()
    loss = nll / max(1, count)
    bpb = nll / math.log(2) / max(1, size)
    return {"loss": loss, "ppl": math.exp(min(loss, 700)), "bpb": bpb, "tokens": int(count), "bytes": int(size)}


def sentence(found: dict[str, Any]) -> str:
    """What a person wants to see of it."""
    second = f"{found['bpb']:.4f} bits per byte" if "bpb" in found else f"accuracy {found['accuracy']:.4f}"
    return f"validation loss {found['loss']:.4f}, {second}"
