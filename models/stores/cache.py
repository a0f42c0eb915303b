"""The rows that were looked up most recently or most often, in a small table on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

POLICIES = ("lru", "lfu")
EMPTY = 1 << 62  # above every row


class RowCache:
    """At most C rows [C, W]. Nothing here touches the table behind it: whoever changes that says so with `refresh`.

    ``lru``: a new row takes the place of the one that was looked up longest ago; ``lfu``: of the one that was looked up least
    often since it came, and of those the longest ago.
    """

    def __init__(self, capacity: int, width: int, policy: str, dtype: torch.dtype, device: torch.device) -> None:
        self.policy, self.clock = policy, 0
        self.values = torch.empty(capacity, width, dtype=dtype, device=device)
        self.rows = torch.arange(EMPTY, EMPTY + capacity, device=device)
        self._uses, self._last = (torch.zeros(capacity, dtype=torch.int64, device=device) for _ in range(2))
        self._index()

    def find(self, rows: Tensor) -> Tensor:
        """rows [U] -> the slot of each [U], -1 for those that are not here."""
        at = torch.searchsorted(self._sorted, rows).clamp_(max=len(self.rows) - 1)
        return torch.where(self._sorted[at] == rows, self._slot[at], -1)

    def refresh(self, rows: Tensor, read: Callable[[Tensor], Tensor]) -> None:
        """The table changed in these rows [U]: those that are here are read anew. ``read``: rows -> values."""
        slots = self.find(rows)
        here = slots >= 0
        self.values.index_copy_(0, slots[here], read(rows[here]))

    def look(self, slots: Tensor, rows: Tensor, values: Tensor) -> None:
        """One lookup: ``slots`` were found, ``rows`` [M] with ``values`` [M, W] were not and move in, as many as fit."""
        self.clock += 1
        self._uses[slots] += 1
        self._last[slots] = self.clock
        room = min(len(rows), len(self.rows) - len(slots))
        if not room:
            return
        worth = self._last if self.policy == "lru" else (self._uses << 40) + self._last
        worth = worth.index_fill(0, slots, EMPTY)
        out = torch.topk(worth, room, largest=False, sorted=False).indices
        self.rows[out], self.values[out] = rows[:room], values[:room]
        self._uses[out], self._last[out] = 1, self.clock
        self._index()

    def _index(self) -> None:
        self._sorted, self._slot = self.rows.sort()
