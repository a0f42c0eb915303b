"""What no kernel can be faster than: operations over the peak of the matrix units, or bytes over the bandwidth of memory.

Per token and head, bf16 activations and fp32 gates, every input read once and every output written once; K key width, V value
width, C rows of a chunk. Operations are those of the chunked form (arXiv:2412.06464, section 3.3; arXiv:2405.21060, section
6; arXiv:2312.06635, section 4.3), an fma is two. Both peaks are measured in the same run as the times they are compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Floor:
    flops: float  # per token and head
    bytes: float

    def seconds(self, peaks: Peaks) -> float:
        return max(self.flops / peaks.flops, self.bytes / peaks.bandwidth)

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Peaks:
    """Of this device, as measured."""

    flops: float  # per second, bf16 matrix product
    bandwidth: float  # bytes per second, read and written by a copy


def gated_delta_floor(k: int, v: int, c: int) -> tuple[Floor, Floor]:
    """-> (forward, backward with recomputation)."""
    forward = Floor(6 * k * v + c * (6 * k + 4 * v) + 2 / 3 * c * c, 4 * k + 4 * v + 8)
    return forward, Floor(16 * k * v + c * (18 * k + 10 * v) + 4 * c * c, 8 * k + 8 * v + 16)


def scalar_decay_floor(k: int, v: int, c: int) -> tuple[Floor, Floor]:
    forward = Floor(4 * k * v + 2 * c * (k + v), 4 * k + 4 * v + 4)
    return forward, Floor(10 * k * v + c * (6 * k + 4 * v), 8 * k + 8 * v + 8)


def gla_floor(k: int, v: int, c: int) -> tuple[Floor, Floor]:
    """As a scalar decay, with K gates in place of one. The exponentials (about 16 K) run on other units and are left out."""
    forward, backward = scalar_decay_floor(k, v, c)
    return Floor(forward.flops, forward.bytes + 4 * (k - 1)), Floor(backward.flops, backward.bytes + 8 * (k - 1))


def selective_floor(k: int, v: int, c: int) -> tuple[Floor, Floor]:
    """Of V channels with states of K numbers each (arXiv:2312.00752, section 3.3): bytes alone. Nothing is a matrix product, B and C
    are shared by all channels, and the K V exponentials run on other units (16 a cycle and multiprocessor on Hopper, which at K = 16
    takes longer than the bytes do)."""
    return Floor(0, 8 * v), Floor(0, 14 * v)


def cell_floor(d: int, slots: int) -> tuple[Floor, Floor]:
    """Of one token in a memory cell with F slots (`kernels.gmt_cell`): 2 F keys and F values of width D and the hop between them."""
    flops = 2 * (3 * slots * d + slots * slots)
    return Floor(flops, 4 * d), Floor(3 * flops, 8 * d)


def memory_attention_floor(k: int, keys: float, share: float = 1.0) -> tuple[Floor, Floor]:
    """Of softmax attention, where a query sees ``keys`` keys on average and no others are computed; ``share``: key heads per query
    head. The few fading rows are left out, and the exponentials, for which heads of 64 wait about as long as for the products."""
    return Floor(4 * k * keys, 4 * k * (1 + share)), Floor(10 * k * keys, 8 * k * (1 + share))


def gather_floor(row_bytes: int) -> Floor:
    """Of one row of a table: its address, the row read and written."""
    return Floor(0, 8 + 2 * row_bytes)


def update_floor(width: int, rule: str) -> Floor:
    """Of one touched fp32 row (`kernels.row_update`): its address and gradient read; values, moments and count read and written."""
    held = 3 * 4 * width + 4 if rule == "lazy_adam" else 4 * width + 8
    return Floor(0, 8 + 4 * width + 2 * held)


def engram_floor(d: int, branches: int, memory: int) -> tuple[Floor, Floor]:
    """Of one token in a looked-up memory of width ``memory`` beside M branches of width D, in bf16 with fp32 rows and addresses
    known (arXiv:2601.07372): keys and values by matrix product, the stream read and written; backward, its gradient too."""
    forward = 2 * memory * (branches + 1) * d
    return Floor(forward, 4 * branches * d + 4 * memory), Floor(2 * forward, 6 * branches * d + 8 * memory)


def decode_floor(k: int, v: int, itemsize: int = 4) -> Floor:
    """One token: the state is read and written."""
    return Floor(8 * k * v, 2 * itemsize * k * v)


def peaks(device: str, tiny: bool = False) -> Peaks:
    """A copy of 1 GiB and a product of 8192 x 8192 matrices in bf16, the best of ten."""
    elements, size = (1 << 18, 128) if tiny else (1 << 28, 8192)
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b, out = a.clone(), torch.empty_like(a)
    copy = best(lambda: target.copy_(source), device)
    product = best(lambda: torch.mm(a, b, out=out), device)
    return Peaks(2 * size**3 / product, 2 * source.nbytes / copy)


def best(run: Callable[[], object], device: str, repeats: int = 10, inner: int = 1) -> float:
    """Seconds of the fastest of ``repeats`` timings of ``inner`` calls, per call, after two that warm up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for i in range(repeats + 2):
        wait()
        start = time.perf_counter()
        for _ in range(inner):
            run()
        wait()
        if i >= 2:
            times.append((time.perf_counter() - start) / inner)
    return min(times)
