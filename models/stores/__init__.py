"""Row stores that follow a config: where a table lives, and the rule by which its rows learn. All give the same bits.

To add one: write its file, add its line here.
"""

from __future__ import annotations

import importlib

from models.stores.base import StoreConfig, Table

KINDS = {
    "resident": "models.stores.resident:Resident",
    "host": "models.stores.host:Host",
}


def build_store(cfg: StoreConfig, rows: int, width: int) -> Table:
    """A store of rows [R, W], made on the current default device; its rows hold garbage until ``reset``."""
    module, _, name = KINDS[cfg.kind].partition(":")
    return getattr(importlib.import_module(module), name)(cfg, rows, width)
