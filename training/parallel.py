"""Ranks and devices: who we are, what is reduced over ranks, and in which precision we compute."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from models.errors import UserError
from models.rows import sum_rows
from models.types import Stat, Write
from training.optim import Optimizer

BUCKET_BYTES = 64 << 20  # gradients reduced in one call
PATIENCE = timedelta(hours=6)  # of ranks that wait while rank 0 prepares the data
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the process group that ``torchrun`` describes, if any; leave it at the end."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    where = _device(device, int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else None)
    kind = where.type
    if kind == "cuda":
        torch.cuda.set_device(where)
        torch.set_float32_matmul_precision("high")
    if size > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(rank, size, where)
    finally:
        if size > 1:
            dist.destroy_process_group()


def _device(name: str, local_rank: int | None) -> torch.device:
    """The device of a name; with several ranks each takes the GPU of its number. Raises UserError if there is none."""
    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise UserError(f"unknown train.device '{name}'; valid: auto, cpu, cuda, cuda:N")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and not gpus):
        return torch.device("cpu")
    number = local_rank if local_rank is not None else int(index or 0)
    if number >= gpus:
        raise UserError(
            f"train.device={name}: there are {gpus} GPUs, so no number {number}; the CPU is train.device=cpu"
        )
    return torch.device("cuda", number)


def autocast_dtype(precision: str, device: torch.device, params: int) -> torch.dtype | None:
    """``auto``: bf16 where it pays: on GPUs that have it, and on CPUs with native bf16 unless the model is tiny."""
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native and params >= 500_000 else None


def all_reduce(values: Tensor, w: World, op: str = "sum") -> Tensor:
    """Sum (or max) over ranks, in place."""
    if w.size > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return values


def broadcast_object(value: Any, w: World) -> Any:
    """What rank 0 holds, on every rank."""
    if w.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(make: Callable[[], T], w: World) -> T:
    """What rank 0 makes, on every rank. A user's error there is raised on every rank, so that none waits in vain."""
    if w.size == 1:
        return make()
    value, failure = None, None
    if w.is_main:
        try:
            value = make()
        except ValueError as error:
            if not getattr(error, "one_line", False):
                raise
            failure = str(error)
    value, failure = broadcast_object((value, failure), w)
    if failure is not None:
        raise UserError(failure)
    return value


def gather_objects(value: Any, w: World) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if w.size == 1:
        return [value]
    box: list[Any] = [None] * w.size
    dist.all_gather_object(box, value)
    return box


@torch.no_grad()
def sync_gradients(optim: Optimizer, w: World) -> None:
    """Mean of the gradients over ranks, in buckets; of rows summed in the order of the ranks, on all or on their owner.

    A parameter without a gradient counts as zero on one rank as on many: whether a part was used by this batch must not
    decide whether its decay and momentum act.
    """
    params = [p for p in optim.params.values() if p.requires_grad]
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if w.size == 1:
        return
    bucket: list[Tensor] = []
    for p in params:
        assert p.grad is not None
        bucket.append(p.grad)
        if sum(g.numel() * g.element_size() for g in bucket) >= BUCKET_BYTES:
            _mean(bucket, w)
            bucket = []
    if bucket:
        _mean(bucket, w)
    for table in optim.learning_tables().values():
        if table.meta.shard == "rows":
            table.average_grad()
        else:
            _sync_rows(table, w)


def _mean(grads: list[Tensor], w: World) -> None:
    flat = torch.cat([g.flatten() for g in grads])
    all_reduce(flat, w).div_(w.size)
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


def _sync_rows(table: Any, w: World) -> None:
    own = table.take_grad()
    empty = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, table.width))
    parts = gather_objects(tuple(t.cpu() for t in (own or empty)), w)
    if not sum(len(r) for r, _ in parts):
        return
    rows, grad = sum_rows(torch.cat([r for r, _ in parts]), torch.cat([g for _, g in parts]))
    device = own[0].device if own else w.device
    table.set_grad(rows.to(device), grad.to(device) / w.size)


# -- what parts said, reduced over micro-batches and ranks


def merge_writes(total: dict[str, Write], new: Mapping[str, Write]) -> dict[str, Write]:
    """Add one micro-batch's writes to what earlier ones said."""
    merged = dict(total)
    for name, write in new.items():
        merged[name] = _combine([merged[name], write]) if name in merged else _detached(write)
    return merged


def reduce_writes(writes: Mapping[str, Write], w: World) -> dict[str, Write]:
    """The same over ranks: every rank ends with identical values."""
    if w.size == 1:
        return dict(writes)
    reduced = {}
    for name in sorted(writes):
        write = writes[name]
        if write.reduce == "sum":
            reduced[name] = write._replace(value=all_reduce(write.value.clone(), w))
            continue
        parts = gather_objects((write.value.cpu(), None if write.key is None else write.key.cpu()), w)
        device = write.value.device
        reduced[name] = _combine([Write(v.to(device), write.reduce, k.to(device)) for v, k in parts])
    return reduced


def _detached(write: Write) -> Write:
    return Write(write.value.detach(), write.reduce, None if write.key is None else write.key.detach())


def _combine(writes: list[Write]) -> Write:
    first = writes[0]
    if first.reduce == "sum":
        return first._replace(value=torch.stack([w.value.detach() for w in writes]).sum(dim=0))
    if first.reduce != "topk_by_key":
        raise ValueError(f"unknown reduction '{first.reduce}' of a write; valid: sum, topk_by_key")
    keys = torch.cat([w.key.detach() for w in writes if w.key is not None])
    order = torch.sort(keys, descending=True, stable=True).indices[: len(first.value)]
    return Write(torch.cat([w.value.detach() for w in writes])[order], first.reduce, keys[order])


def merge_stats(total: Mapping[str, list[Stat]], new: Mapping[str, Stat]) -> dict[str, list[Stat]]:
    """Add one micro-batch's stats to the list of each name."""
    added = {name: [*total.get(name, ()), Stat(stat.value.detach(), stat.reduce)] for name, stat in new.items()}
    return {**total, **added}


def reduce_stats(stats: Mapping[str, list[Stat]], w: World) -> dict[str, float | list[float]]:
    """Over micro-batches and ranks, as plain numbers for the log."""
    found: dict[str, float | list[float]] = {}
    for name in sorted(stats):
        kind = stats[name][0].reduce
        values = torch.stack([s.value.float() for s in stats[name]])
        value = values.amax(dim=0) if kind == "max" else values.sum(dim=0)
        value = all_reduce(value.contiguous(), w, "max" if kind == "max" else "sum")
        if kind == "mean":
            value = value / (len(values) * w.size)
        found[name] = value.tolist()
    return found
