"""Log-likelihoods of continuations, many at once, each context paid for once.

Requests with the same context ids form a group: the contexts of a batch of groups are prefilled side by side, the state
is branched by `select_rows`, and the continuations are scored side by side. A context with one continuation needs no
state: it is one pass. Logits exist only at scored positions. B rows, T places in a row, D model width.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from models import LM, Batch, LMState
from models.state import select_rows

Ids = Sequence[int]
PREFIX = 32  # contexts that agree in this many first tokens are batched together, and the common part is read once


class Score(NamedTuple):
    logprob: float  # nats, summed over the continuation
    greedy: bool  # every token of it is the most likely one


@dataclass
class Budget:
    """How much one forward may hold: padded ``tokens``, ``rows``, and ``state_bytes`` of branched states."""

    tokens: int
    rows: int
    state_bytes: int

    def halve(self, held: int) -> None:
        """After a forward of ``held`` tokens did not fit."""
        self.tokens, self.rows = max(1, min(self.tokens, held) // 2), max(1, self.rows // 2)
        self.state_bytes //= 2


def auto_budget(model: LM, batch_size: int | str = "auto") -> Budget:
    """From the memory that is free; an integer ``batch_size`` is the number of rows instead."""
    device = model.embed.weight.device
    free = free_memory(device)
    item = model.embed.weight.element_size()
    # A token in flight: a few residual-width and channel-width activations of one layer, and its place in the state.
    per_token = 48 * model.cfg.d_model * model.cfg.branches * item + model.cost(1024).state_bytes // 1024
    most = 2048 if device.type == "cpu" else 65536  # on a CPU activations should stay in the caches
    tokens = int(min(most, max(256, 0.25 * free / per_token)))
    rows = batch_size if isinstance(batch_size, int) else tokens
    return Budget(tokens if batch_size == "auto" else 1 << 40, rows, int(0.25 * free))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 4 << 30


def pad(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Ragged rows -> tokens [B, T] padded on the right with zeros, valid [B, T] (None when nothing is padded)."""
    lengths = torch.tensor([len(r) for r in rows])
    T = int(lengths.max())
    tokens = torch.tensor([[*r, *[0] * (T - len(r))] for r in rows], dtype=torch.int64)
    if bool((lengths == T).all()):
        return tokens.to(device), None
    valid = torch.arange(T)[None] < lengths[:, None]
    return tokens.to(device), valid.to(device)


def walk(
    model: LM, rows: Sequence[Ids], state: LMState, width: int
) -> Iterator[tuple[int, Tensor, Tensor | None, LMState]]:
    """Read the rows into a state that is given away, at most ``width`` places at a time.

    Yields (place of the first token, hidden states [B, t, D], valid [B, t], state so far).
    """
    tokens, valid = pad(rows, model.embed.weight.device)
    T = tokens.shape[1]
    full = T if valid is None else min(map(len, rows))  # up to here no row is padded, and parts take their plain path
    starts = [*range(0, full, width), *range(full, T, width)]
    for start, end in pairwise([*starts, T]):
        batch = Batch(tokens[:, start:end], valid=None if start < full or valid is None else valid[:, start:end])
        h, after, _ = model.features(batch, state, donate=True)
        assert after is not None
        state = after
        yield start, h, batch.valid, state


def prefill(model: LM, rows: Sequence[Ids], state: LMState, budget: Budget) -> tuple[Tensor, LMState]:
    """-> (hidden state of each row's last token [B, D], state after the rows). Every row has at least one token."""
    last = torch.tensor([len(r) - 1 for r in rows], device=model.embed.weight.device)
    out: Tensor | None = None
    for start, h, _, after in walk(model, rows, state, max(1, budget.tokens // len(rows))):
        state = after
        place = (last - start).clamp(0, h.shape[1] - 1)
        found = h[torch.arange(len(rows), device=h.device), place]
        out = found if out is None else torch.where((last >= start)[:, None], found, out)
    assert out is not None
    return out, state


class Group(NamedTuple):
    """One context with its continuations; ``members[i]`` is the number of the request behind continuation i."""

    context: Ids
    conts: list[Ids]
    members: list[int]

    @property
    def length(self) -> int:
        """Tokens that a row of this group feeds."""
        return len(self.context) + max(len(c) for c in self.conts) - 1


class Scorer:
    """Scores (context ids, continuation ids); neither is empty."""

    def __init__(self, model: LM, batch_size: int | str = "auto") -> None:
        self.model = model
        self.device = model.embed.weight.device
        self.budget = auto_budget(model, batch_size)
        self._bytes: dict[int, int] = {}

    @torch.inference_mode()
    def score(self, requests: Sequence[tuple[Ids, Ids]]) -> Iterator[list[tuple[int, Score]]]:
        """Yields [(number of the request, its score)] batch by batch, in an order of its own, every request once."""
        groups: dict[tuple[int, ...], Group] = {}
        for i, (context, cont) in enumerate(requests):
            group = groups.setdefault(tuple(context), Group(context, [], []))
            group.conts.append(cont)
            group.members.append(i)
        shared = [g for g in groups.values() if len(g.conts) > 1]
        alone = [g for g in groups.values() if len(g.conts) == 1]
        for cluster in _clusters(shared):
            yield from self._batches(cluster, self._score_shared)
        yield from self._batches(alone, self._score_alone)

    def _batches(
        self, groups: list[Group], score: Callable[[list[Group]], list[tuple[int, Score]]]
    ) -> Iterator[list[tuple[int, Score]]]:
        """Longest first, in batches within the budget; when the device's memory is full, go on with half of it."""
        todo = sorted(groups, key=lambda g: -g.length)
        while todo:
            batch = todo[: self._fits(todo)]
            try:
                done = score(batch)
            except torch.OutOfMemoryError:
                if self.budget.tokens < 64:
                    raise
                self.budget.halve(len(batch) * batch[0].length)
                continue
            yield done
            todo = todo[len(batch) :]

    def _fits(self, groups: list[Group]) -> int:
        """How many of the first groups go into one batch: at least one."""
        rows, widest = 0, groups[0].length
        per_row = self._state_bytes(widest)
        for n, group in enumerate(groups):
            rows += len(group.conts)
            full = (n + 1) * widest > self.budget.tokens or n >= self.budget.rows
            if n and (full or (len(group.conts) > 1 and (n + 1 + rows) * per_row > self.budget.state_bytes)):
                return n
        return len(groups)

    def _state_bytes(self, length: int) -> int:
        """Of one sequence, for a length rounded up: the closed formula visits every layer."""
        length = -(-length // 64) * 64
        if length not in self._bytes:
            self._bytes[length] = max(1, self.model.cost(length, self.model.embed.weight.dtype).state_bytes)
        return self._bytes[length]

    # -- one context, one continuation

    def _score_alone(self, groups: list[Group]) -> list[tuple[int, Score]]:
        """One pass without a state. Rows are padded on the right, where causality makes the padding harmless."""
        if max(g.length for g in groups) > self.budget.tokens:
            return self._score_shared(groups)  # too long for one forward: read in pieces
        tokens, _ = pad([[*g.context, *g.conts[0][:-1]] for g in groups], self.device)
        h, _, _ = self.model.features(Batch(tokens))
        parts = [h[b, len(g.context) - 1 : g.length] for b, g in enumerate(groups)]
        return self._collect(groups, parts)

    def _collect(self, groups: list[Group], parts: list[Tensor]) -> list[tuple[int, Score]]:
        """``parts[j]`` [n, D]: the hidden states that predict the n tokens of continuation j, all groups in order."""
        conts = [c for g in groups for c in g.conts]
        members = [m for g in groups for m in g.members]
        targets = torch.tensor([t for c in conts for t in c], device=self.device)
        nll, greedy = self.model.token_nll(torch.cat(parts)[None], targets[None])
        lengths = [len(c) for c in conts]
        sums = [-float(x.sum()) for x in nll[0].double().cpu().split(lengths)]
        best = [bool(x.all()) for x in greedy[0].cpu().split(lengths)]
        return [(m, Score(s, b)) for m, s, b in zip(members, sums, best)]

    # -- one context, many continuations

    def _score_shared(self, groups: list[Group]) -> list[tuple[int, Score]]:
        last, state = self._prefill(groups)
        owner = [g for g, group in enumerate(groups) for _ in group.conts]
        rest = [c[:-1] for group in groups for c in group.conts]
        parts: list[list[Tensor]] = [[last[g : g + 1]] for g in owner]  # the first token is predicted by the context
        feeding = sorted((i for i, r in enumerate(rest) if r), key=lambda i: -len(rest[i]))
        per_row = self._state_bytes(self._capacity(groups))
        while feeding:
            widest = len(rest[feeding[0]])
            most = max(1, min(self.budget.rows, self.budget.tokens // widest, self.budget.state_bytes // per_row))
            rows, feeding = feeding[:most], feeding[most:]
            branch = select_rows(state, torch.tensor([owner[i] for i in rows]))
            width = max(1, self.budget.tokens // len(rows))
            fed = [rest[i] for i in rows]
            if self._room_for_padding(groups, widest):  # it comes after all that counts, and the branch is thrown away
                fed = [[*r, *[0] * (widest - len(r))] for r in fed]
            for start, h, _, _ in walk(self.model, fed, branch, width):
                for b, i in enumerate(rows):
                    if start < len(rest[i]):
                        parts[i].append(h[b, : len(rest[i]) - start])
        return self._collect(groups, [torch.cat(p) for p in parts])

    def _capacity(self, groups: list[Group]) -> int:
        """Tokens that the state of a batch must hold: with room for padded continuations if the model allows."""
        rest = max(len(c) for g in groups for c in g.conts) - 1
        if self._room_for_padding(groups, rest):
            return max(len(g.context) for g in groups) + rest
        return max(g.length for g in groups)

    def _room_for_padding(self, groups: list[Group], rest: int) -> bool:
        limit = self.model.cfg.max_seq_len
        return not limit or max(len(g.context) for g in groups) + rest <= limit

    def _prefill(self, groups: list[Group]) -> tuple[Tensor, LMState]:
        """-> (hidden states of the last context tokens [B, D], state after them); a common prefix is read once."""
        contexts = [g.context for g in groups]
        capacity = self._capacity(groups)
        common = min(common_prefix(contexts), min(len(c) for c in contexts) - 1)
        if len(groups) > 1 and common >= PREFIX:
            one = self.model.init_state(1, capacity)
            _, one = prefill(self.model, [contexts[0][:common]], one, self.budget)
            state = select_rows(one, torch.zeros(len(groups), dtype=torch.int64))
            return prefill(self.model, [c[common:] for c in contexts], state, self.budget)
        return prefill(self.model, contexts, self.model.init_state(len(groups), capacity), self.budget)

    # -- whole documents with a carried state

    @torch.inference_mode()
    def score_documents(self, documents: Sequence[Ids], first: int, width: int) -> Iterator[list[tuple[int, Score]]]:
        """log p(document | first token): each is read once, ``width`` tokens at a time, the state carried along."""
        order = sorted((i for i, d in enumerate(documents) if d), key=lambda i: -len(documents[i]))
        while order:
            longest = len(documents[order[0]])
            room = self.budget.state_bytes // self._state_bytes(longest)
            most = max(1, min(self.budget.rows, self.budget.tokens // width, room))
            batch, order = order[:most], order[most:]
            rows = [[first, *documents[i][:-1]] for i in batch]
            targets, _ = pad([documents[i] for i in batch], self.device)
            state = self.model.init_state(len(batch), longest)
            total = torch.zeros(len(batch), dtype=torch.float64, device=self.device)
            best = torch.ones(len(batch), dtype=torch.bool, device=self.device)
            for start, h, valid, _ in walk(self.model, rows, state, width):
                nll, greedy = self.model.token_nll(h, targets[:, start : start + h.shape[1]])
                keep = torch.ones_like(greedy) if valid is None else valid
                total -= torch.where(keep, nll, 0.0).double().sum(dim=1)
                best &= (greedy | ~keep).all(dim=1)
            yield [(i, Score(float(s), bool(b))) for i, s, b in zip(batch, total, best)]


def common_prefix(rows: Sequence[Ids]) -> int:
    """How many first ids all rows share."""
    low, high = min(rows, key=list), max(rows, key=list)
    n = 0
    for a, b in zip(low, high):
        if a != b:
            break
        n += 1
    return n


def _clusters(groups: list[Group]) -> list[list[Group]]:
    """Contexts that begin alike (a task's few-shot examples) stand together, all others in one list."""
    heads = Counter(tuple(g.context[:PREFIX]) for g in groups if len(g.context) > PREFIX)
    found: dict[tuple[int, ...], list[Group]] = {}
    for g in groups:
        head = tuple(g.context[:PREFIX])
        found.setdefault(head if heads[head] >= 8 else (), []).append(g)
    return list(found.values())
