"""What layers of B'MOJO did with a text, as tensors: whom they kept before each chunk, and how attention was shared out.

Legend: N tokens of the text, numbered window by window; C chunks of W of them, none across two windows; m kept tokens; H heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.inspection.bmojo_attention import Shares, shared_out
from eval.inspection.bmojo_hooks import Attend, attending, mixers
from eval.inspection.hooks import changed
from eval.inspection.text import Text, mean_loss, read
from eval.scoring import pad
from kernels.chunks import chunks
from models import LM, Batch
from models.mixers.bmojo import BMojo
from models.mixers.bmojo_scores import rank


class Kept(NamedTuple):
    """Before each chunk, on the CPU."""

    start: Tensor  # int64 [C], the chunk's first token
    before: Tensor  # int64 [C], tokens of its window before it
    count: Tensor  # int64 [C], its tokens
    token: Tensor  # int64 [C, m], those kept, by rising number, then -1

    @property
    def chunk(self) -> Tensor:
        """int64 [N], of each token."""
        return torch.arange(len(self.start)).repeat_interleave(self.count)

    @property
    def position(self) -> Tensor:
        """int64 [N], of each token in its window."""
        return torch.arange(int(self.count.sum())) - (self.start - self.before)[self.chunk]


class Seen(NamedTuple):
    """By one layer, on the CPU. ``shares`` and what follows from them is None where attention was not looked at."""

    kept: Kept
    score: Tensor | None  # fp32 [N]; None: nothing is kept
    shares: Tensor | None = None  # fp64 [N, H, 3], weights on the kinds of keys (`bmojo_attention.KINDS`), 1 in all
    keys: Tensor | None = None  # [N, 3], keys of each kind that a query sees
    given: Tensor | None = None  # fp64 [N], to each token by all later queries while it was kept, mean over heads
    # fp64 [3, L], by age in tokens: kept tokens that queries see, the weight on them, and what the first would be if the set were
    # drawn evenly from all tokens before the chunk
    ages: Tensor | None = None
    error: float = 0.0  # the largest difference of the attention that these shares make from what the layer made


def observe(model: LM, text: Text, attention: bool = True) -> tuple[dict[int, Seen], float]:
    """-> (what each layer did with the tokens of the text; the mean loss on it). The model is only watched."""
    watches = {n: _Watch(part, attention) for n, part in mixers(model).items()}
    nll = []
    with contextlib.ExitStack() as stack:
        for watch in watches.values():
            stack.enter_context(watch.watching())
        for losses, valid in read(model, text):
            nll.append(losses)
            for watch in watches.values():
                watch.keep(valid)
    return {n: watch.all() for n, watch in watches.items()}, mean_loss(text, nll)


@dataclass
class _Watch:
    part: BMojo
    attention: bool
    tokens: int = 0  # seen so far
    score: Tensor | None = None
    given: dict[str, Any] = field(default_factory=dict)
    shares: Shares | None = None
    error: float = 0.0
    seen: list[Seen] = field(default_factory=list)

    @contextlib.contextmanager
    def watching(self) -> Any:
        with attending([self.part], self.of_attention), changed([self.part], "_score", self.of_score):
            yield

    def of_score(self, _: BMojo, scored: Any) -> Any:
        def run(*args: Any) -> Any:
            found = scored(*args)
            self.score = found[0]
            return found

        return run

    def of_attention(self, _: BMojo, attend: Attend) -> Attend:
        def attended(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
            o = attend(q, k, v, **given)
            self.given = {"shape": q.shape[:2], **given}
            if self.attention:
                self.shares = shared_out(q, k, v, **given)
                self.error = max(self.error, (self.shares.o.view_as(o) - o).abs().max().item())
            return o

        return attended

    def keep(self, valid: Tensor) -> None:
        """Of the forward that just ended. Valid tokens are its first rows, in the order of the text."""
        size, (B, T) = int(valid.sum()), self.given["shape"]
        at = chunks(B, T, self.given["cu_seqlens"], self.part.cfg.window, valid.device)
        used = (at.count > 0) & (at.row < size)
        index = self.given.get("index")
        index = torch.full((len(at.row), 0), -1, device=valid.device) if index is None else index
        token = torch.where(index < 0, -1, index + self.tokens)[used].cpu()
        kept = Kept((at.row + self.tokens)[used].cpu(), at.before[used].cpu(), at.count[used].cpu(), token)
        seen = Seen(kept, None if self.score is None else self.score[valid].cpu(), error=self.error)
        if self.shares is not None:
            eidetic = self.shares.eidetic[:size].mean(1).cpu()  # [n, m]
            given, ages = _received(kept, eidetic, self.part.cfg.window, self.part.cfg.dedup, self.tokens)
            by_kind, keys = self.shares.by_kind[:size].cpu(), self.shares.keys[:size].cpu()
            seen = seen._replace(shares=by_kind, keys=keys, given=given, ages=ages)
        self.seen.append(seen)
        self.tokens += size

    def all(self) -> Seen:
        kept = Kept(*(torch.cat(x) for x in zip(*(one.kept for one in self.seen), strict=True)))
        joined = {
            name: _joined([getattr(one, name) for one in self.seen]) for name in ("score", "shares", "keys", "given")
        }
        ages = None
        if self.attention:
            ages = torch.zeros(
                3, max(one.ages.shape[1] for one in self.seen if one.ages is not None), dtype=torch.float64
            )
            for one in self.seen:
                assert one.ages is not None
                ages[:, : one.ages.shape[1]] += one.ages
        return Seen(kept, ages=ages, error=self.error, **joined)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [x for x in parts if x is not None]
    return torch.cat(there) if there else None


def _received(kept: Kept, weight: Tensor, window: int, dedup: bool, first: int) -> tuple[Tensor, Tensor]:
    """weight [n, m], of the queries from token ``first`` on on those kept for their chunk -> (the sum that each token got [n], and
    `Seen.ages`)."""
    n, longest = len(weight), int((kept.before + kept.count).max())
    number = torch.arange(n) + first
    chunk = kept.chunk
    token = kept.token[chunk]
    age = number[:, None] - token
    seen = (token >= 0) & ((age >= window) | (not dedup))
    given = torch.zeros(n, dtype=torch.float64)
    given.index_add_(0, (token - first)[seen], weight[seen])
    ages = torch.zeros(3, longest, dtype=torch.float64)
    ages[0].index_add_(0, age[seen], torch.ones(int(seen.sum()), dtype=torch.float64))
    ages[1].index_add_(0, age[seen], weight[seen])
    # Drawn evenly, each of the tokens before the chunk is in the set with the same probability.
    before, size = kept.before[chunk], (token >= 0).sum(1)
    position = number - kept.start[chunk] + before
    chance = size / before.clamp(min=1)
    low = torch.where(before > 0, (position - before + 1).clamp(min=window if dedup else 0), longest)
    step = torch.zeros(longest + 1, dtype=torch.float64)  # differences of the sum over queries
    step.index_add_(0, low.clamp(max=longest), chance.double())
    step.index_add_(0, torch.where(low <= position, position + 1, low).clamp(max=longest), -chance.double())
    ages[2] = step.cumsum(0)[:longest]
    return given, ages


def final_sets(part: BMojo, seen: Seen) -> list[Tensor]:
    """Of each window, the tokens that a state holds behind it: the best of its whole chunks, by rising number."""
    starts = seen.kept.before == 0
    found = []
    for first, chunk in zip(seen.kept.start[starts].tolist(), starts.nonzero()[:, 0].tolist(), strict=True):
        later = starts.nonzero()[:, 0]
        end = int(later[later > chunk][0]) if bool((later > chunk).any()) else len(starts)
        length = int(seen.kept.count[chunk:end].sum()) // part.cfg.window * part.cfg.window
        if seen.score is None:
            found.append(torch.zeros(0, dtype=torch.int64))
            continue
        key = rank(seen.score[first : first + length], torch.arange(length), part.cfg.evict_gamma)
        best = key.sort(descending=True, stable=True).indices[: part.cfg.m_e]
        found.append(first + best.sort().values)
    return found


# -- as decoding reads it


@torch.no_grad()
def observe_archive(model: LM, text: Text) -> tuple[dict[int, Tensor], dict[int, float], float]:
    """The windows read by a call that continues an empty state, as a prompt is read, so that archives answer -> (weights on window,
    fading, eidetic and found rows [N, H, 4] of each layer with an archive; its largest error, as `Seen.error`; the mean loss)."""
    over = {n: part for n, part in mixers(model).items() if part.cfg.archive is not None}
    last: dict[int, Shares] = {}
    errors = dict.fromkeys(over, 0.0)
    found: dict[int, list[Tensor]] = {n: [] for n in over}
    nll = []

    def watch(layer: int) -> Any:
        def change(_: BMojo, attend: Attend) -> Attend:
            def attended(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
                o = attend(q, k, v, **given)
                last[layer] = shares = shared_out(q, k, v, **given)
                errors[layer] = max(errors[layer], (shares.o.view_as(o) - o).abs().max().item())
                return o

            return attended

        return change

    with contextlib.ExitStack() as stack:
        for n, part in over.items():
            stack.enter_context(attending([part], watch(n)))
        for windows, targets in text.batches_with_targets():
            tokens, valid = pad([w[:-1] for w in windows], model.embed.weight.device)
            wanted, _ = pad(targets, tokens.device)
            valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
            if tokens.shape[1] == 1:  # would be a step of decoding, which does not attend by the op that is watched
                tokens, wanted, valid = (F.pad(x, (0, 1)) for x in (tokens, wanted, valid))
            h, _, _ = model.features(Batch(tokens, valid=valid), model.init_state(tokens.shape[0], tokens.shape[1]))
            losses, _ = model.token_nll(h, wanted.clamp(min=0))
            nll.append(losses[valid].double())
            for n, shares in last.items():
                found[n].append(_by_kind_with_archive(shares, over[n].cfg.m_e, valid))
            last.clear()
    return {n: torch.cat(parts) for n, parts in found.items()}, errors, mean_loss(text, nll)


def _by_kind_with_archive(shares: Shares, m: int, valid: Tensor) -> Tensor:
    """The cells of a line that begins with the first token -> [n, H, 4] of the valid ones."""
    kinds = torch.stack(
        (shares.window, shares.fading, shares.eidetic[..., :m].sum(2), shares.eidetic[..., m:].sum(2)), 2
    )
    return kinds.unflatten(0, (len(valid), -1))[:, : valid.shape[1]][valid].cpu()
