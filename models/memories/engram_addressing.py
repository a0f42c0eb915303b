"""Row addresses of Engram (arXiv 2601.07372): hashes of the last 2..N canonical tokens, K heads an order.

Integers only, int64 throughout: a canonical id times a multiplier stays below 2^63, so products and their exclusive or are
never negative and a remainder means the same on every device.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.ngram_gather import DEAD, ngram_rows
from models.errors import UserError
from models.memories.engram_compression import Compression
from models.rows import Addressing
from models.types import Ctx, State


def table_primes(layers: int, bases: Sequence[int], heads: int) -> list[list[list[int]]]:
    """[layer][order][head]: each the smallest prime >= the order's base that nothing before it has taken, in any layer."""
    taken: set[int] = set()

    def fresh(base: int) -> int:
        size = base
        while size in taken or not _is_prime(size):
            size += 1
        taken.add(size)
        return size

    return [[[fresh(base) for _ in range(heads)] for base in bases] for _ in range(layers)]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def draw_multipliers(classes: int, max_order: int, key: int, seed: int = 0) -> list[int]:
    """N odd integers below (2^63 - 1) / classes, of the layer with this key.

    NumPy does not promise its streams across versions: a model stores the numbers, and a saved one brings its own.
    """
    bound = max(1, (2**63 - 1) // classes // 2)
    drawn = np.random.default_rng(seed + 10007 * key).integers(0, bound, size=max_order, dtype=np.int64)
    return [2 * int(r) + 1 for r in drawn]


class EngramAddressing(Addressing):
    """The rows of all Engram layers, from tokens alone.

    ``keys``: the number that each layer hashes with; it goes with the layer's table, so it stays when the layer moves.
    ``bases``: the least number of rows of a head, for the orders 2, 3, ... ``pad``: the token (not canonical) that stands
    for what is not there. The order of ``keys`` decides the primes.
    """

    canonical: Tensor
    multipliers: Tensor
    primes: Tensor
    offsets: Tensor
    identity: Tensor

    def __init__(
        self, compression: Compression, keys: Sequence[int], bases: Sequence[int], heads: int, pad: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.compression, self.keys, self.bases, self.heads, self.seed = compression, keys, bases, heads, seed
        self.max_order = len(bases) + 1
        vocab, L, orders = len(compression.canonical), len(keys), len(bases)
        if not 0 <= pad < vocab:
            raise UserError(f"engram: pad token {pad} is not in the vocabulary of {vocab}")
        if len(set(keys)) != L:
            raise UserError(f"engram: layer keys {list(keys)} are not distinct")
        self.pad = int(compression.canonical[pad])
        self.register_buffer("canonical", torch.empty(vocab, dtype=torch.int32))
        self.register_buffer("multipliers", torch.empty(L, orders + 1, dtype=torch.int64))
        self.register_buffer("primes", torch.empty(L, orders, heads, dtype=torch.int64))
        self.register_buffer("offsets", torch.empty(L, orders, heads, dtype=torch.int64))
        self.register_buffer("identity", torch.empty(32, dtype=torch.uint8))

    def reset_parameters(self) -> None:
        drawn = [draw_multipliers(self.compression.classes, self.max_order, key, self.seed) for key in self.keys]
        primes = torch.tensor(table_primes(len(self.keys), self.bases, self.heads))
        flat = primes.flatten(1)
        self.canonical.copy_(torch.from_numpy(self.compression.canonical))
        self.multipliers.copy_(torch.tensor(drawn))
        self.primes.copy_(primes)
        self.offsets.copy_((flat.cumsum(dim=1) - flat).view_as(primes))
        self.identity.copy_(torch.tensor(list(self._identity()), dtype=torch.uint8))

    def _identity(self) -> bytes:
        """What the addresses are a function of, hashed."""
        facts = (self.compression.sha256, self.pad, list(self.keys), list(self.bases), self.heads, self.seed)
        return hashlib.sha256(json.dumps(facts).encode()).digest()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        stored = state_dict.get(f"{prefix}identity")
        if stored is not None and bytes(stored.tolist()) != self._identity():
            raise UserError(
                "engram: the saved addresses belong to another token map, pad, seed, table size or list of layer keys; "
                "with these every row would mean something else"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def init_state(self, batch: int, device: torch.device | str) -> State:
        """The last N-1 canonical ids [B, N-1], oldest first."""
        return torch.full((batch, self.max_order - 1), DEAD, dtype=torch.int64, device=device)

    def forward(self, ctx: Ctx, lookback: State | None) -> tuple[dict[str, Tensor], State | None]:
        """Invalid tokens are passed over: they get the rows of PAD alone. An id outside the vocabulary is refused on the
        host, and DEAD on a device: it and all before it are out of reach."""
        ids = self._canonical_ids(ctx)
        history = self.init_state(len(ids), ids.device) if lookback is None else lookback
        rows, newest = ngram_rows(
            ids,
            history,
            self.multipliers,
            self.primes,
            self.offsets,
            classes=self.compression.classes,
            pad=self.pad,
            segments=ctx.shared.get("segments"),
            valid=ctx.valid,
        )
        by_layer = {str(key): rows[i] for i, key in enumerate(self.keys)}
        return by_layer, None if lookback is None else newest

    def _canonical_ids(self, ctx: Ctx) -> Tensor:
        tokens, vocab = ctx.tokens, len(self.canonical)
        known = (tokens >= 0) & (tokens < vocab)
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ~known if ctx.valid is None else ~known & ctx.valid
            if wrong.any():
                raise UserError(f"engram: token {int(tokens[wrong][0])} is outside the vocabulary of {vocab}")
        return torch.where(known, self.canonical[torch.where(known, tokens, 0)].long(), DEAD)
