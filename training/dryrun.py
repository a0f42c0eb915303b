"""One step that changes nothing, before the first that counts: wrong shapes and too little memory show at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from models.errors import UserError
from models.lm import LM
from models.types import Batch
from training.optim import Optimizer
from training.parallel import World


def random_batch(rows: int, seq_len: int, vocab_size: int, packing: str, max_docs: int) -> Batch:
    """Shaped as the loader's batches [rows, seq_len]; with ``documents`` packing there are two in each row."""
    tokens = torch.randint(vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(0))
    everything = torch.ones_like(tokens, dtype=torch.bool)
    batch = Batch(tokens, tokens, everything)
    if packing != "documents":
        return batch
    cu_seqlens = torch.full((rows * max_docs + 1,), tokens.numel(), dtype=torch.int32)
    starts = torch.arange(rows) * seq_len
    cu_seqlens[: 2 * rows] = torch.stack((starts, starts + seq_len // 2), dim=1).flatten()
    return batch._replace(cu_seqlens=cu_seqlens, valid=everything)


def dry_run(model: LM, optim: Optimizer, autocast: Callable[[], Any], batch: Batch, w: World) -> None:
    """Forward and backward. Raises UserError when memory does not suffice; gradients and generators are as before."""
    rows, seq_len = batch.tokens.shape
    try:
        with torch.random.fork_rng([w.device] if w.device.type == "cuda" else []):
            with autocast():
                out = model(batch.to(w.device), denom=float(batch.tokens.numel()))
            model.total(out.losses).backward()
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        raise UserError(
            f"out of memory with {rows} rows of {seq_len} tokens: lower train.micro_batch or data.seq_len"
        ) from error
    finally:
        optim.zero_grad()
