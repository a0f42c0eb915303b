"""A table in a file, mapped into memory: for inference from tables larger than memory. It takes no private memory at all.

The file is a checkpoint's own, or an exported model's, as it is. What is read stays in the system's cache as long as nobody else
needs the room. A row costs a page of the disk where that cache does not have it; `begin` asks for the pages of a whole lookup
at once, `wait` gathers, each row once and in the order of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from models.errors import UserError
from models.stores.base import VALUES, StoreConfig, Table
from models.tensorfile import MappedFile


class Mapped(Table):
    """Read-only. Rows come in the dtype and on the device that the model was moved to, as those of a resident table."""

    def __init__(self, cfg: StoreConfig, rows: int, width: int) -> None:
        super().__init__(cfg, rows, width)
        self._dtype = torch.float32
        self._file: MappedFile | None = None
        self._name = ""  # of the table in the file
        self._begun: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # distinct rows and their places, by the address of the values

    def load_file(self, path: Path, name: str) -> None:
        self._file, self._name = MappedFile(path, scattered=True), name
        found = self.arrays()
        if VALUES not in found or list(found[VALUES].shape) != [self.rows, self.width]:
            shape = list(found[VALUES].shape) if VALUES in found else None
            raise UserError(f"{path}: '{name}/{VALUES}' has shape {shape}, the table {[self.rows, self.width]}")

    def arrays(self) -> dict[str, Tensor]:
        """All that the file holds of this table, moments too. They are the file's own pages: whoever writes to them is ended."""
        return self._opened().under(self._name)

    def read(self, rows: Tensor) -> Tensor:
        return self.wait(self.begin(rows))  # pyright: ignore[reportAttributeAccessIssue]

    @torch.compiler.disable  # it could not see what `wait` writes, so it breaks its graph here
    def prefetch(self, rows: Tensor) -> Tensor:
        return super().prefetch(rows)

    def begin(self, rows: Tensor) -> Tensor:
        distinct, places = torch.unique(rows, return_inverse=True)
        distinct = distinct.cpu()
        self._opened().read_soon(self._values, distinct)
        out = torch.empty(*rows.shape, self.width, dtype=self._dtype, device=rows.device)
        self._begun[out.data_ptr()] = distinct, places.flatten()
        return out

    @torch.compiler.disable
    @torch.no_grad()
    def wait(self, values: Tensor) -> Tensor:
        begun = self._begun.pop(values.data_ptr(), None)
        if begun is not None:
            distinct, places = begun
            found = self._opened().tensor(self._values).index_select(0, distinct)
            out = values.detach().view(-1, self.width)
            torch.index_select(found.to(values), 0, places, out=out)
        return values

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype

    @property
    def _values(self) -> str:
        return f"{self._name}/{VALUES}"

    def _opened(self) -> MappedFile:
        if self._file is None:
            self._refuse()
        return self._file

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise UserError(
            "a table of kind mmap is the file of a finished checkpoint, and read-only: it can neither start afresh nor learn; "
            "kind=host keeps a table that learns in host memory"
        )

    reset = load_state_dict = load_values = zero_moments = collect = step = _refuse
