"""Row stores that follow a config: where a table lives, and the rule by which its rows learn. All give the same bits.

To add one: write its file, add its line here.
"""

from __future__ import annotations

import importlib
from dataclasses import fields, is_dataclass, replace
from typing import Any

from models.stores.base import StoreConfig, Table

KINDS = {
    "resident": "models.stores.resident:Resident",
    "host": "models.stores.host:Host",
    "mmap": "models.stores.mmap:Mapped",
    "sharded": "models.stores.sharded:Sharded",
}


def build_store(cfg: StoreConfig, rows: int, width: int) -> Table:
    """A store of rows [R, W], made on the current default device; its rows hold garbage until ``reset``."""
    module, _, name = KINDS[cfg.kind].partition(":")
    return getattr(importlib.import_module(module), name)(cfg, rows, width)


def with_kind(config: Any, kind: str) -> Any:
    """The config of a part (any dataclass) with all its stores of another kind; options that only the old kind has are dropped."""
    if isinstance(config, StoreConfig):
        cache = config.cache_rows if kind == "host" else 0
        return replace(config, kind=kind, cache_rows=cache)
    if is_dataclass(config) and not isinstance(config, type):
        return replace(config, **{f.name: with_kind(getattr(config, f.name), kind) for f in fields(config) if f.init})
    return config
