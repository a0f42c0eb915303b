"""Autoregressive generation over the model's own state. B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eval.scoring import Ids, walk
from models import LM, Batch, LMState, UserError
from models.state import select_rows

PREFILL_TOKENS = 8192  # padded tokens that one prefill forward may hold


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """logits [B, V] -> one id per row [B]. Temperature 0 is greedy; top_k 0 and top_p 1 keep everything.

    Top-p keeps the smallest set of most likely ids whose probability (after top-k) reaches p (arXiv:1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    where = logits.device if generator is None else generator.device
    scores = logits.to(where).float() / temperature
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        sorted_scores, order = scores.sort(dim=-1, descending=True)
        p = sorted_scores.softmax(dim=-1)
        drop = p.cumsum(dim=-1) - p >= top_p  # what stands before it already reaches p
        scores = scores.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)[:, 0].to(logits.device)


class Decoder:
    """B sequences being written. The state holds all their ids but the last, which the next step feeds."""

    def __init__(self, model: LM, prompts: Sequence[Ids], max_new: int) -> None:
        """Reads the prompts (each at least one id), ragged or not. UserError if prompt and ``max_new`` do not fit."""
        if not prompts or any(len(p) == 0 for p in prompts):
            raise UserError("generation needs a prompt of at least one token")
        self.model = model
        self.state = model.init_state(len(prompts), max(map(len, prompts)) + max_new)
        self.last = [int(p[-1]) for p in prompts]
        self._read([p[:-1] for p in prompts])

    @classmethod
    def resume(cls, model: LM, state: LMState, pending: Ids) -> Decoder:
        """One sequence whose state is already there; ``pending`` (at least one id) has not been read yet."""
        self = cls.__new__(cls)
        self.model, self.state, self.last = model, state, [int(pending[-1])]
        self._read([pending[:-1]])
        return self

    @torch.inference_mode()
    def _read(self, rows: Sequence[Ids]) -> None:
        if any(len(r) for r in rows):
            for _, _, _, state in walk(self.model, rows, self.state, max(1, PREFILL_TOKENS // len(rows))):
                self.state = state

    def select(self, rows: Sequence[int]) -> None:
        """Keep (or repeat) these rows: what a beam or N samples of one prompt need."""
        self.state = select_rows(self.state, torch.tensor(rows, dtype=torch.int64))
        self.last = [self.last[r] for r in rows]

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Feed the last ids -> logits of the next [B, V]. The state's buffers are reused."""
        tokens = torch.tensor(self.last, device=self.model.embed.weight.device)[:, None]
        h, state, _ = self.model.features(Batch(tokens), self.state, donate=True)
        assert state is not None
        self.state = state
        found = self.model.logits(h[:, -1:])
        assert found is not None
        return found[:, 0]


@torch.inference_mode()
def generate(
    model: LM,
    tokens: Tensor | Sequence[Ids],
    max_new: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    eos: int | None = None,
    stop: Callable[[int, list[int]], bool] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue prompts ([B, T] or ragged lists of ids) -> the new ids of each, ``eos`` not included.

    A row ends at ``eos``, when ``stop(row, new ids)`` says so, or after ``max_new`` tokens. ``on_token(row, id)`` sees
    every id as it is chosen. The model is used in the mode it is in; the global generators are not touched if
    ``generator`` is given or ``temperature`` is 0. Raises UserError when the context is longer than the model allows.
    """
    prompts = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    decoder = Decoder(model, prompts, max_new)
    return run_decoder(decoder, max_new, temperature, top_k, top_p, generator, eos, stop, on_token)


def run_decoder(
    decoder: Decoder,
    max_new: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    eos: int | None = None,
    stop: Callable[[int, list[int]], bool] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """As `generate`, from where the decoder stands; rows that have ended are dropped from it when half of them have."""
    made: list[list[int]] = [[] for _ in decoder.last]
    rows = list(range(len(decoder.last)))  # the sequence behind each row of the decoder
    live = set(rows) if max_new > 0 else set()
    while live:
        picked = choose(decoder.logits(), temperature, top_k, top_p, generator).tolist()
        for place, (row, token) in enumerate(zip(rows, picked)):
            if row not in live:
                continue
            decoder.last[place] = token
            if token == eos:
                live.discard(row)
                continue
            made[row].append(token)
            if on_token is not None:
                on_token(row, token)
            if len(made[row]) >= max_new or (stop is not None and stop(row, made[row])):
                live.discard(row)
        if live and 2 * len(live) <= len(rows):
            keep = [place for place, row in enumerate(rows) if row in live]
            decoder.select(keep)
            rows = [rows[place] for place in keep]
    return made
