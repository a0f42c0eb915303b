"""Experts or rows of a table: how to spend parameters that a token does not touch (Engram, arXiv:2601.07372, allocation law).

Of the sparse parameters of a mixture of experts, total less active, a share rho stays with its routed experts and the rest becomes
rows of n-gram tables. Total parameters and operations per token stay those of the mixture alone: narrower experts pay for the
projections of the memory, and fewer of them for its rows. rho = 1 is the mixture without a memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from models.config import ModelConfig
from models.errors import UserError
from models.lm import meta_model
from models.match import match
from models.parsing import to_dict
from models.types import Cost


class Allocation(NamedTuple):
    config: ModelConfig
    rho: float  # that came out; with it the settings that did it
    experts: int
    hidden: int  # of an expert
    base: int  # rows per head and order, 0 without tables
    cost: Cost
    target: Cost  # of the mixture alone

    def __str__(self) -> str:
        off = [
            f"{name} {(mine - wanted) / wanted:+.2%}"
            for name, mine, wanted in (
                ("params", self.cost.params, self.target.params),
                ("flops", self.cost.flops_per_token, self.target.flops_per_token),
            )
        ]
        return (
            f"rho={self.rho:.3f}: experts={self.experts} hidden={self.hidden} base={self.base}; "
            f"{self.cost.params:,} parameters, {self.cost.active_params:,} active, "
            f"{self.cost.flops_per_token:,.0f} FLOPs per token; off by {', '.join(off)}"
        )


def allocate(config: ModelConfig, rho: float, seq_len: int = 1024) -> Allocation:
    """``config`` has moe channels and engram memories, in named blocks: the experts of its channels are the whole budget, its
    memories say how tables are laid out and where.

    Raises UserError for a config without these, and for a share that leaves no table or no expert to choose from.
    """
    if not 0 <= rho <= 1:
        raise UserError(f"rho must lie in [0, 1], got {rho:g}")
    experts, top_k = _mixture(config)
    alone = _without_memories(config)
    target = _cost(alone, seq_len)
    budget = target.params - target.active_params
    if rho == 1:
        return Allocation(alone, 1.0, experts, _one(alone, "channel", "hidden"), 0, target, target)
    if not any(block.memory is not None and block.memory.kind == "engram" for block in config.blocks.values()):
        raise UserError("allocation: no block of this model has an engram memory")
    tried, kept, hidden, sparse = set(), experts, 0, 0
    while kept not in tried:  # the router shrinks with its experts, so what is left for their width grows
        tried.add(kept)
        narrow = match(
            _with(config, "channel", experts=kept), target.flops_per_token, "flops", "channel.hidden", seq_len
        )
        hidden, sparse = narrow.value, _sparse_per_expert(narrow.config, top_k, seq_len)
        kept = top_k + round(rho * budget / sparse)
    fewer = _with(config, "channel", experts=kept, hidden=hidden)
    found = match(fewer, target.params, "params", "memory.base", seq_len, multiple_of=2).config
    cost = _cost(found, seq_len)
    share = (kept - top_k) * sparse / (cost.params - cost.active_params)
    return Allocation(found, share, kept, hidden, _one(found, "memory", "base"), cost, target)


def _sparse_per_expert(config: ModelConfig, top_k: int, seq_len: int) -> int:
    """Parameters, over all layers, of an expert that a token does not use."""
    without = _without_memories(config)
    fewest, more = (_cost(_with(without, "channel", experts=top_k + extra), seq_len) for extra in (0, 1))
    return more.params - more.active_params - (fewest.params - fewest.active_params)


def _mixture(config: ModelConfig) -> tuple[int, int]:
    """-> (experts, of which a token uses so many)."""
    found = {(c.experts, c.top_k) for b in config.blocks.values() if (c := b.channel) is not None and c.kind == "moe"}
    if len(found) != 1:
        what = "no moe channel" if not found else "moe channels of several sizes"
        raise UserError(f"allocation: {what} in the blocks of this model")
    return found.pop()


def _cost(config: ModelConfig, seq_len: int) -> Cost:
    return meta_model(config).cost(seq_len)


def _without_memories(config: ModelConfig) -> ModelConfig:
    if any("memory" in (change or {}) for change in config.at.values()):
        raise UserError("allocation: memories stand in named blocks here, not in 'at'")
    blocks = {name: dataclasses.replace(block, memory=None) for name, block in config.blocks.items()}
    return dataclasses.replace(config, blocks=blocks)


def _with(config: ModelConfig, slot: str, **settings: Any) -> ModelConfig:
    """Settings of all parts of a slot that have them."""
    blocks = {}
    for name, block in config.blocks.items():
        part = getattr(block, slot)
        if part is not None and all(key in to_dict(part) for key in settings):
            block = dataclasses.replace(block, **{slot: dataclasses.replace(part, **settings)})
        blocks[name] = block
    return dataclasses.replace(config, blocks=blocks)


def _one(config: ModelConfig, slot: str, name: str) -> int:
    """A setting that all parts of a slot share."""
    return next(value for b in config.blocks.values() if (value := getattr(getattr(b, slot), name, None)) is not None)
