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
from models.memories.engram_compression import Compression, compress, identity
from models.rows import Addressing
from models.types import Ctx, State

ALIVE = "engram.alive"
OTHER_ROWS = "with it every row would mean something else"


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

    ``compression``: "compat" or "tagged" fold tokens onto canonical ids, "none" leaves them. Until `use_tokenizer` every token
    stands for itself; or a saved model brings its map. Once set, a map stays: another one would rename every row.
    """

    canonical: Tensor
    multipliers: Tensor
    primes: Tensor
    offsets: Tensor
    identity: Tensor

    def __init__(
        self,
        vocab_size: int,
        keys: Sequence[int],
        bases: Sequence[int],
        heads: int,
        pad: int,
        seed: int = 0,
        compression: str = "none",
    ) -> None:
        super().__init__()
        self.vocab_size, self.keys, self.bases, self.heads = vocab_size, list(keys), list(bases), heads
        self.pad_token, self.seed, self.kind = pad, seed, compression
        L, orders = len(keys), len(bases)
        if not 0 <= pad < vocab_size:
            raise UserError(f"engram: pad token {pad} is not in the vocabulary of {vocab_size}")
        if len(set(keys)) != L:
            raise UserError(f"engram: layer keys {self.keys} are not distinct")
        self.max_order = orders + 1
        self._take(identity(vocab_size))
        self.final = compression == "none"  # the map is what it will be
        self.register_buffer("canonical", torch.empty(vocab_size, dtype=torch.int32))
        self.register_buffer("multipliers", torch.empty(L, orders + 1, dtype=torch.int64))
        self.register_buffer("primes", torch.empty(L, orders, heads, dtype=torch.int64))
        self.register_buffer("offsets", torch.empty(L, orders, heads, dtype=torch.int64))
        self.register_buffer("identity", torch.empty(2, 4, dtype=torch.int64))  # hashes of 32 bytes

    def _take(self, compression: Compression) -> None:
        """``pad``: the canonical id of the pad token. Plain integers, which a compiled graph can hold."""
        self.compression = compression
        self.classes, self.pad = compression.classes, int(compression.canonical[self.pad_token])
        self.gaps = bool((compression.canonical == DEAD).any())

    def reset_parameters(self) -> None:
        primes = torch.tensor(table_primes(len(self.keys), self.bases, self.heads))
        flat = primes.flatten(1)
        self.primes.copy_(primes)
        self.offsets.copy_((flat.cumsum(dim=1) - flat).view_as(primes))
        self._fill()

    def use_tokenizer(self, tokenizer_json: str) -> None:
        """Raises UserError for a tokenizer with more ids than the model, and for another one than a saved model had."""
        if self.kind != "none":
            self.use_map(compress(tokenizer_json, compat=self.kind == "compat"))

    def use_map(self, found: Compression) -> None:
        """Of at least one id; those of the model behind its end are no tokens. The buffers must have been initialised or loaded."""
        missing = self.vocab_size - len(found.canonical)
        if missing < 0:
            raise UserError(f"engram: the tokenizer has {len(found.canonical)} ids, the model {self.vocab_size}")
        if self.pad_token >= len(found.canonical):
            raise UserError(f"engram: pad token {self.pad_token} is none of the tokenizer's {len(found.canonical)}")
        canonical = np.pad(found.canonical, (0, missing), constant_values=DEAD)
        new = Compression(canonical, found.classes)
        if self.final and new.sha256 != self.compression.sha256:
            raise UserError(f"engram: the model has another token map than this tokenizer's: {OTHER_ROWS}")
        if not self.final:
            self._take(new)
            self.final = True
            self._fill()

    def _fill(self) -> None:
        """What depends on the map."""
        drawn = [draw_multipliers(self.classes, self.max_order, key, self.seed) for key in self.keys]
        self.canonical.copy_(torch.from_numpy(self.compression.canonical))
        self.multipliers.copy_(torch.tensor(drawn))
        self.identity.copy_(torch.tensor([self._facts(), self._map()]))

    def _facts(self) -> list[int]:
        """What the addresses are a function of beside the map, hashed."""
        facts = (self.kind, self.pad_token, self.keys, self.bases, self.heads, self.seed)
        return _words(hashlib.sha256(json.dumps(facts).encode()).hexdigest())

    def _map(self) -> list[int]:
        return _words(self.compression.sha256)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        stored, canonical = (state_dict.get(f"{prefix}{name}") for name in ("identity", "canonical"))
        if stored is not None and canonical is not None:
            self._adopt(stored, canonical)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def after_loading(self) -> None:
        self._adopt(self.identity, self.canonical)

    def _adopt(self, stored: Tensor, canonical: Tensor) -> None:
        """Take a saved map, or refuse it."""
        facts, tokens = stored.tolist()
        if facts != self._facts():
            what = "pad, seed, table size, compression or list of layer keys"
            raise UserError(f"engram: the saved addresses belong to another {what}: {OTHER_ROWS}")
        if self.final and tokens != self._map():
            raise UserError(f"engram: the saved addresses belong to another token map: {OTHER_ROWS}")
        ids = canonical.cpu().numpy()
        self._take(Compression(ids, int(ids.max()) + 1))
        self.final = True

    def must_agree(self, source: Addressing) -> None:
        assert isinstance(source, EngramAddressing)
        same = self.pad == source.pad and self.compression.sha256 == source.compression.sha256
        for key, numbers in source._numbers().items():
            if not same or self._numbers().get(key) != numbers:
                raise UserError(
                    f"engram: the rows of layer key {key} would be those of other n-grams: "
                    "its token map, pad, seed, sizes or place in the list differ"
                )

    def _numbers(self) -> dict[int, Any]:
        """What each layer hashes with, by key."""
        drawn = zip(self.multipliers.tolist(), self.primes.tolist(), strict=True)
        return dict(zip(self.keys, drawn, strict=True))

    def init_state(self, batch: int, device: torch.device | str) -> State:
        """The last N-1 canonical ids [B, N-1], oldest first."""
        return torch.full((batch, self.max_order - 1), DEAD, dtype=torch.int64, device=device)

    def forward(self, ctx: Ctx, lookback: State | None) -> tuple[dict[str, Tensor], State | None]:
        """-> rows [B, T, (N-1) K] by layer key; under `ALIVE`, where the map has gaps, which tokens are some, bool [B, T].

        Invalid tokens are passed over: they get the rows of PAD alone. An id outside the vocabulary is refused on the
        host, and DEAD on a device, as is one without a token: it and all before it are out of reach."""
        ids = self._canonical_ids(ctx)
        history = self.init_state(len(ids), ids.device) if lookback is None else lookback
        rows, newest = ngram_rows(
            ids,
            history,
            self.multipliers,
            self.primes,
            self.offsets,
            classes=self.classes,
            pad=self.pad,
            segments=ctx.shared.get("segments"),
            valid=ctx.valid,
        )
        by_layer = {str(key): rows[i] for i, key in enumerate(self.keys)}
        if self.gaps:
            by_layer[ALIVE] = ids != DEAD
        return by_layer, None if lookback is None else newest

    def _canonical_ids(self, ctx: Ctx) -> Tensor:
        tokens, vocab = ctx.tokens, len(self.canonical)
        known = (tokens >= 0) & (tokens < vocab)
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ~known if ctx.valid is None else ~known & ctx.valid
            if wrong.any():
                raise UserError(f"engram: token {int(tokens[wrong][0])} is outside the vocabulary of {vocab}")
        return torch.where(known, self.canonical[torch.where(known, tokens, 0)].long(), DEAD)


def _words(digest: str) -> list[int]:
    """A hash in hexadecimal, as a buffer holds it."""
    return np.frombuffer(bytes.fromhex(digest), dtype="<i8").tolist()
