"""A table in host memory, beside a model whose device could not hold it; pinned where that device is a GPU.

Everything that touches the table happens in one background thread, in the order in which it was asked for, on a stream of its
own: a prefetch runs beside the blocks below, an update beside the rest of the optimizer. Only rows that were looked up cross
the link, each once per lookup, and none that the cache holds. Updates run where the gradients are, by the same operations as
those of a resident table, so that the bits are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from kernels.ngram_gather import gather_rows
from kernels.row_update import Hyper, reaches, row_update
from models.stores.base import VALUES, StoreConfig, Table
from models.stores.cache import RowCache
from models.stores.resident import moved


class Host(Table):
    """``cfg.cache_rows`` rows are kept on the device, chosen by ``cfg.cache_policy``."""

    def __init__(self, cfg: StoreConfig, rows: int, width: int) -> None:
        super().__init__(cfg, rows, width)
        self._arrays = self.allocate(rows)
        self._cache: RowCache | None = None
        self._known = -1  # the version of the values that the cache has seen
        self._flights: dict[int, Future[Any]] = {}  # by the address of the values
        self._last: Future[Any] | None = None
        self._counts = dict.fromkeys(("lookups", "distinct", "hits", "bytes_to_device", "bytes_to_host", "wait_s"), 0.0)

    def arrays(self) -> dict[str, Tensor]:
        self.drain()
        return dict(self._arrays)

    def stats(self) -> dict[str, float]:
        """Since the table was made: rows looked up, distinct ones per lookup summed, how many of these the cache had, bytes
        that crossed the link, seconds for which a forward waited, and the hit rate."""
        self.drain()
        return {**self._counts, "hit_rate": self._counts["hits"] / max(1.0, self._counts["distinct"])}

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Take over the dtype; of the device only whether it is a GPU, whose copies want pinned memory."""
        self.drain()
        self._cache = None
        for name, t in self._arrays.items():
            there = moved(fn, t.new_empty(0), name == VALUES)
            device = "meta" if there.is_meta else "cpu"
            pin = there.is_cuda and not t.is_pinned()
            if t.is_meta or there.is_meta:
                self._arrays[name] = torch.empty(t.shape, dtype=there.dtype, device=device, pin_memory=pin)
            else:
                self._arrays[name] = t.to(there.dtype).pin_memory() if pin else t.to(there.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what is under way arrives first."""
        self.drain()
        return {**self.__dict__, "_flights": {}, "_last": None}

    # -- asked for here, done in the background; the compiler, which could not see that, breaks its graph here

    def read(self, rows: Tensor) -> Tensor:
        return self.wait(self.begin(rows))  # pyright: ignore[reportAttributeAccessIssue]

    @torch.compiler.disable
    def prefetch(self, rows: Tensor) -> Tensor:
        return super().prefetch(rows)

    def begin(self, rows: Tensor) -> Tensor:
        with torch.inference_mode(False):  # the mode is the caller's alone, and the background thread writes into this
            out = torch.empty(*rows.shape, self.width, dtype=self._arrays[VALUES].dtype, device=rows.device)
        self._flights[out.data_ptr()] = self._submit(self._fill, rows, out.detach())
        return out

    @torch.compiler.disable
    def wait(self, values: Tensor) -> Tensor:
        flight = self._flights.pop(values.data_ptr(), None)
        if flight is not None:
            start = time.perf_counter()
            _join(flight)
            self._counts["wait_s"] += time.perf_counter() - start
        return values

    def update(self, rows: Tensor | slice, grad: Tensor, rule: str, hyper: Hyper) -> None:
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=grad.device)
        self._submit(self._learn, rows, grad, rule, hyper)

    def drain(self) -> None:
        """Wait for all that was asked for. An error in the background is raised here, or by the next `wait`."""
        if self._last is not None:
            last, self._last = self._last, None
            after = last.result()
            if after is not None:
                after.synchronize()  # the host will look at what a kernel wrote into its memory

    def _submit(self, job: Callable[..., None], *args: Any) -> Future[Any]:
        if self._last is not None and self._last.done():
            self._last.result()  # raises what it raised
        self._last = _worker.submit(_run, _mark(args[0].device), job, *args)
        return self._last

    # -- in the background

    def _fill(self, rows: Tensor, out: Tensor) -> None:
        distinct, inverse = torch.unique(rows, return_inverse=True)
        values, slots = self._held(distinct)
        torch.index_select(values, 0, inverse.flatten(), out=out.view(-1, self.width))
        self._counts["lookups"] += rows.numel()
        self._counts["distinct"] += len(distinct)
        if self._cache is not None and slots is not None:
            missing = slots < 0
            self._counts["hits"] += len(distinct) - int(missing.sum())
            self._cache.look(slots[~missing], distinct[missing], values[missing])

    def _learn(self, rows: Tensor, grad: Tensor, rule: str, hyper: Hyper) -> None:
        self._freshen(rows.device)
        arrays = list(self._arrays.values())
        if reaches(arrays[0], arrays[1:], grad):
            row_update(arrays[0], arrays[1:], rows, grad, rule, hyper)
        else:
            self._learn_there(arrays, rows, grad, rule, hyper)
        crossed = len(rows) * sum(t[:1].nbytes for t in arrays)
        self._counts["bytes_to_device"] += crossed
        self._counts["bytes_to_host"] += crossed
        if self._cache is not None:
            self._cache.refresh(rows, self._from_table)
            self._known = arrays[0]._version

    def _learn_there(self, arrays: list[Tensor], rows: Tensor, grad: Tensor, rule: str, hyper: Hyper) -> None:
        """The touched rows go to the gradient, learn, and come back."""
        here = rows.cpu()
        held = [t.index_select(0, here).to(grad.device) for t in arrays]
        row_update(held[0], held[1:], None, grad, rule, hyper)
        for array, new in zip(arrays, held, strict=True):
            array.index_copy_(0, here, new.cpu())

    def _held(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Distinct rows [U] -> (their values [U, W]; their slots in the cache, if there is one)."""
        self._freshen(rows.device)
        if self._cache is None:
            return self._from_table(rows), None
        slots = self._cache.find(rows)
        missing = slots < 0
        values = self._cache.values.index_select(0, slots.clamp(min=0))
        where = missing.nonzero().squeeze(1)
        if len(where):
            values.index_copy_(0, where, self._from_table(rows[where]))
        return values, slots

    def _freshen(self, device: torch.device) -> None:
        """A cache on this device that holds nothing old: the table may have been loaded, or written by others."""
        table = self._arrays[VALUES]
        if not self.cfg.cache_rows or (self._cache is not None and self._known == table._version):
            return
        capacity = min(self.cfg.cache_rows, self.rows)
        self._cache = RowCache(capacity, self.width, self.cfg.cache_policy, table.dtype, device)
        self._known = table._version

    def _from_table(self, rows: Tensor) -> Tensor:
        values = gather_rows(self._arrays[VALUES], rows)
        self._counts["bytes_to_device"] += values.nbytes
        return values


# One thread for all tables of a process: in order, and beside the caller never more than one core. It starts with the first job.
_worker = ThreadPoolExecutor(1, thread_name_prefix="tables")
_streams: dict[torch.device, torch.cuda.Stream] = {}


def _mark(device: torch.device) -> Any:
    """An event: what the caller's stream has been asked to do so far. None on a device without streams."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _run(before: Any, job: Callable[..., None], *args: Any) -> Any:
    """The job after ``before``. -> the event that marks its end."""
    with torch.no_grad():
        if before is None:
            job(*args)
            return None
        device = args[0].device
        stream = _streams[device] if device in _streams else _streams.setdefault(device, torch.cuda.Stream(device))
        with torch.cuda.stream(stream):
            stream.wait_event(before)
            for t in args:
                if isinstance(t, Tensor):
                    t.record_stream(stream)
            job(*args)
            return stream.record_event()


def _join(job: Future[Any]) -> None:
    """Wait for a job on the host, and for what it left on its stream on the caller's."""
    after = job.result()
    if after is not None:
        torch.cuda.current_stream().wait_event(after)
