"""Every part there is. To add one: write its file, add its line here; the contract suite, the summary, the benches and the
ablation runner pick it up from these tables."""

from __future__ import annotations

import importlib
from typing import Any

from models.errors import UserError, nearest
from models.parsing import from_dict
from models.types import Part, Site

MIXERS = {
    "attention": "models.mixers.attention:Attention",
    "linear_attention": "models.mixers.linear:LinearAttentionMixer",
    "retnet": "models.mixers.linear:RetNetMixer",
    "gla": "models.mixers.linear:GLAMixer",
    "mamba": "models.mixers.mamba:Mamba",
    "mamba2": "models.mixers.linear:Mamba2Mixer",
    "delta": "models.mixers.linear:DeltaMixer",
    "gated_delta": "models.mixers.linear:GatedDeltaMixer",
    "mom": "models.mixers.mom:MoM",
    "bmojo": "models.mixers.bmojo:BMojo",
}
CHANNELS = {
    "swiglu": "models.channels.mlp:SwiGLU",
    "gelu": "models.channels.mlp:Gelu",
    "relu2": "models.channels.mlp:Relu2",
    "gmt": "models.channels.gmt:GMT",
    "structured_ffn": "models.channels.structured:StructuredFFN",
    "moe": "models.channels.moe:MoE",
}
MEMORIES = {
    "engram": "models.memories.engram:Engram",
}
TABLE = {"mixer": MIXERS, "channel": CHANNELS, "memory": MEMORIES}

_foreign = False


def allow_foreign(yes: bool = True) -> None:
    """Permit ``kind: "package.module:Class"``: building such a model runs code from outside this repository."""
    global _foreign
    _foreign = yes


def foreign_allowed() -> bool:
    return _foreign


def part_class(slot: str, kind: str, where: str = "kind") -> type[Part]:
    """The class behind a kind. Raises UserError for an unknown kind, or a foreign one without the opt-in."""
    table = TABLE[slot]
    if not isinstance(kind, str) or (kind not in table and ":" not in kind):
        raise UserError(f"{where}: unknown {slot} kind '{kind}'{nearest(kind, table)}")
    if kind not in table and not _foreign:
        raise UserError(f"{where}: '{kind}' is code from outside this repository; allow it with --allow-foreign")
    module, _, name = table.get(kind, kind).partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where}: cannot load '{kind}': {error}") from error
    if not (isinstance(found, type) and issubclass(found, Part)):
        raise UserError(f"{where}: '{kind}' is not a models.types.Part")
    return found


def parse(slot: str, raw: Any, where: str) -> Any:
    """A part's config from plain data: ``{kind: ..., ...}``."""
    if not isinstance(raw, dict):
        if hasattr(raw, "kind"):
            return raw
        raise UserError(f"{where}: expected a mapping with a kind, got {raw!r}")
    if "kind" not in raw:
        raise UserError(f"{where}: missing 'kind'; valid: {', '.join(sorted(TABLE[slot]))}")
    return from_dict(part_class(slot, raw["kind"], f"{where}.kind").Config, raw, where)


def build(slot: str, cfg: Any, site: Site) -> Part:
    """The part itself. A part that contains another builds it with its own site and ``norm="none"``."""
    return part_class(slot, cfg.kind)(cfg, site)
