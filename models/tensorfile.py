"""Safetensors files larger than memory: written block by block, read through a mapping.

The format: the length of the header (8 bytes, little-endian), the header as JSON, {name: {dtype, shape, data_offsets}}, then the
numbers of every tensor, little-endian and without gaps; offsets count from the end of the header.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
PAGE = mmap.PAGESIZE
ROWS = 1 << 16  # of a block


class Blocks(NamedTuple):
    """A tensor that is handed over in blocks of its first dimension, in order, and once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Iterator[Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Blocks:
        """A tensor that is at hand, so that a device's need not be in host memory at once."""
        return cls(tensor.dtype, tuple(tensor.shape), iter(tensor.split(ROWS) if tensor.ndim else (tensor,)))


def write_tensors(tensors: Mapping[str, Tensor | Blocks], path: Path) -> None:
    """Into a file with the metadata that transformers wants. Raises OSError when the disk refuses."""
    found = ordered(tensors)
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    end = 0
    for name, t in found.items():
        start, end = end, end + math.prod(t.shape) * t.dtype.itemsize
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for t in found.values():
            for block in t.blocks if isinstance(t, Blocks) else (t,):
                file.write(block.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if file.tell() != 8 + len(text) + end:
            raise ValueError(f"{path.name}: the blocks of a tensor are not its whole")


def ordered(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """As a file holds them: wide numbers first, so that all are aligned."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))


class MappedFile:
    """The tensors of a file, by name, as pages that the system reads when they are touched and drops when it needs room.

    They take no private memory and are read-only: the system ends a process that writes to one. ``scattered``: touched here
    and there, so that reading ahead of a touched page is a waste. Raises UserError for what is not a whole safetensors file.
    """

    def __init__(self, path: Path, scattered: bool = False) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                self._header = json.loads(file.read(length))
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError, struct.error, MemoryError, OverflowError) as error:
            raise UserError(f"cannot read {path}: {error or 'it is no safetensors file'}") from error
        self._header.pop(METADATA, None)
        self._start = 8 + length
        if any(self._start + entry["data_offsets"][1] > len(self._map) for entry in self._header.values()):
            raise UserError(f"cannot read {path}: it is cut short")
        if scattered:
            self._map.madvise(mmap.MADV_RANDOM)

    def __deepcopy__(self, _: Any) -> MappedFile:
        return self  # nobody can change it

    def names(self) -> list[str]:
        return list(self._header)

    def under(self, name: str) -> dict[str, Tensor]:
        """Those called ``name/...``, by the rest of their names."""
        return {k.removeprefix(f"{name}/"): self.tensor(k) for k in self._header if k.rpartition("/")[0] == name}

    def tensor(self, name: str) -> Tensor:
        entry = self._header[name]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            flat = torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=self._offset(name))
        return flat.view(shape)

    def read_soon(self, name: str, rows: Tensor) -> None:
        """Ask the system for the pages of these rows [U], which ascend: all of them at once, not one after the other."""
        width = DTYPES[self._header[name]["dtype"]].itemsize * math.prod(self._header[name]["shape"][1:])
        if not len(rows):
            return
        at = self._offset(name) + rows * width
        first, last = at // PAGE, (at + width - 1) // PAGE
        opens = torch.ones_like(rows, dtype=torch.bool)
        opens[1:] = first[1:] > last[:-1] + 1
        closes = opens.roll(-1)
        for start, end in zip(first[opens].tolist(), last[closes].tolist(), strict=True):
            self._map.madvise(mmap.MADV_WILLNEED, start * PAGE, (end - start + 1) * PAGE)

    def _offset(self, name: str) -> int:
        return self._start + self._header[name]["data_offsets"][0]
