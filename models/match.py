"""Equal budgets: the integer (a width, a rank, a number of heads or slots) that makes one model as big as another, and the fair
controls of a model: dense and structured channels in place of its own, as large or as expensive."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from models.config import BlockConfig, ModelConfig
from models.errors import UserError, nearest
from models.lm import meta_model
from models.parsing import choice, from_dict
from models.types import SLOTS

BUDGETS = {"params": "params", "active_params": "active_params", "flops": "flops_per_token", "state": "state_bytes"}
LARGEST = 1 << 31  # values above this are out of reach


class Match(NamedTuple):
    config: ModelConfig
    value: int  # of the field that was varied
    achieved: float
    target: float
    residual: float  # achieved - target

    @property
    def relative(self) -> float:
        """The residual as a share of the target."""
        return self.residual / self.target

    def __str__(self) -> str:
        return f"{self.achieved:,.0f}, target {self.target:,.0f}: {self.residual:+,.0f} ({self.relative:+.3%})"


def match(
    config: ModelConfig,
    to: ModelConfig | float,
    on: str = "params",
    vary: str = "channel.hidden",
    seq_len: int = 1024,
    multiple_of: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Match:
    """``config`` with the multiple of ``multiple_of`` in field ``vary`` that comes nearest to the budget of ``to``.

    ``to``: a model, or the budget itself as a number.
    ``on``: params | active_params | flops (per token, mean over ``seq_len``) | state (bytes after ``seq_len`` tokens).
    ``vary``: a field of the model (``d_model``), of one part (``blocks.NAME.channel.hidden``), or of the parts of all
    blocks that have it (``channel.hidden``). The budget must grow with the field; of two equally near values the
    smaller is taken. Raises UserError when no such field exists, or no value of it that the model allows reaches the target.
    """
    choice("budget", on, tuple(BUDGETS))
    if multiple_of < 1:
        raise UserError(f"multiple_of must be at least 1, got {multiple_of}")
    sizes = _Sizes(config, _resolve(config, vary), on, vary, seq_len, multiple_of, dtype)
    target = sizes.measure(to) if isinstance(to, ModelConfig) else float(to)
    low, high = _bracket(sizes, target)
    best = low if target - sizes[low] <= sizes[high] - target else high
    return Match(sizes.config(best), best * multiple_of, sizes[best], target, sizes[best] - target)


class _Sizes:
    """What a budget is when a field is k * multiple_of; infinite where the model does not allow that."""

    def __init__(self, config: ModelConfig, paths: list[tuple[str, ...]], on: str, vary: str, *how: Any) -> None:
        self.base, self.paths, self.on, self.vary = config, paths, on, vary
        self.seq_len, self.multiple_of, self.dtype = how
        self.known: dict[int, float] = {}
        self.refused: dict[int, UserError] = {}

    def measure(self, config: ModelConfig) -> float:
        return getattr(meta_model(config).cost(self.seq_len, self.dtype), BUDGETS[self.on])

    def config(self, k: int) -> ModelConfig:
        changed: Any = self.base
        for path in self.paths:
            changed = _with(changed, path, k * self.multiple_of)
        return changed

    def __getitem__(self, k: int) -> float:
        if k not in self.known:
            try:
                self.known[k] = self.measure(self.config(k))
            except UserError as error:
                self.known[k] = float("inf")
                self.refused[k] = UserError(f"{self.name(k)}: {error}")
        return self.known[k]

    def name(self, k: int) -> str:
        return f"{self.vary}={k * self.multiple_of}"

    def out_of_reach(self, target: float, why: str) -> UserError:
        return UserError(f"{self.on} of {target:,.0f} is out of reach: {why}")


def _bracket(sizes: _Sizes, target: float) -> tuple[int, int]:
    """Neighbours low, high with ``sizes[low] <= target <= sizes[high]``. What is refused counts as too large while it is searched,
    but bounds no result. Raises UserError if there are none."""
    low, high = 1, 2
    first, second = sizes[low], sizes[high]
    if low in sizes.refused:
        raise sizes.refused[low]
    if second == first:
        raise UserError(f"{sizes.on} does not grow with {sizes.vary}")
    if second < first:
        raise UserError(f"{sizes.on} falls as {sizes.vary} grows: vary another field")
    if first > target:
        raise sizes.out_of_reach(target, f"{sizes.name(low)} already gives {first:,.0f}")
    while sizes[high] < target:
        low, high = high, 2 * high
        if high * sizes.multiple_of > LARGEST:
            raise sizes.out_of_reach(target, f"{sizes.name(low)} gives {sizes[low]:,.0f}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sizes[middle] < target else (low, middle)
    if high in sizes.refused and sizes[low] < target:
        raise sizes.out_of_reach(target, f"{sizes.name(low)} gives {sizes[low]:,.0f}, and {sizes.refused[high]}")
    return low, high


# -- controls


class Control(NamedTuple):
    """A channel that may stand in for another, and what of it is free."""

    channel: dict[str, Any]
    vary: str
    multiple_of: int = 1


def _structured(form: str, **options: int) -> dict[str, Any]:
    return {"kind": "structured_ffn", "form": form, **options}


BLOCKS = 4
CONTROLS = {
    "dense": Control({}, "hidden"),
    "low_rank": Control(_structured("low_rank"), "rank"),
    "block_dense": Control(_structured("block_dense", blocks=BLOCKS), "rank", BLOCKS),
    "block_shuffle": Control(_structured("block_shuffle", blocks=BLOCKS), "hidden", BLOCKS),
}


def control(
    config: ModelConfig,
    name: str,
    on: str = "params",
    activation: str = "gelu",
    to: float | None = None,
    seq_len: int = 1024,
) -> Match:
    """``config`` with another channel in place of those of its blocks, as near to it on ``on`` as that can be.

    ``name``: dense (its width is found) | low_rank | block_dense (the rank, at the default width) | block_shuffle (the width).
    ``activation``: gelu | relu2 | swiglu. ``to``: another target than what the model itself has. Everything else stays as it is,
    layers whose channel is amended to a kind of their own too. Raises UserError where no such channel comes near.
    """
    choice("control", name, tuple(CONTROLS))
    channel, vary, multiple_of = CONTROLS[name]
    full = {"kind": activation} if not channel else {**channel, "activation": activation}
    changed = _with_channel(config, from_dict(BlockConfig, {"channel": full}).channel)
    return match(changed, config if to is None else to, on, f"channel.{vary}", seq_len, multiple_of)


def _with_channel(config: ModelConfig, channel: Any) -> ModelConfig:
    """The channels of all blocks replaced; amendments of keys of the old ones go with them."""
    blocks = {
        name: dataclasses.replace(block, channel=channel if block.channel is not None else None)
        for name, block in config.blocks.items()
    }
    if not any(block.channel for block in blocks.values()):
        raise UserError("no block of this model has a channel to replace")
    at = {layer: {s: part for s, part in change.items() if not _amends(s, part)} for layer, change in config.at.items()}
    return dataclasses.replace(config, blocks=blocks, at=at)


def _amends(slot: str, part: Any) -> bool:
    return slot == "channel" and isinstance(part, dict) and "kind" not in part


# -- fields


def _resolve(config: ModelConfig, vary: str) -> list[tuple[str, ...]]:
    """The full paths that ``vary`` names."""
    fields = list(_integer_fields(config))
    given = tuple(vary.split("."))
    found = [path for path in fields if path == given]
    if given[0] in SLOTS:
        found = [path for path in fields if path[0] == "blocks" and path[2:] == given]
    if not found:
        short = {".".join(path[2:] if path[0] == "blocks" else path) for path in fields}
        full = {".".join(path) for path in fields}
        raise UserError(f"no integer field '{vary}' to vary{nearest(vary, full if given[0] == 'blocks' else short)}")
    return found


def _integer_fields(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of integer fields of the model and of the parts in its named blocks, nested parts included."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, here = getattr(config, f.name), (*path, f.name)
        if isinstance(value, dict) and f.name == "blocks":
            for name, block in value.items():
                yield from _integer_fields(block, (*here, name))
        elif dataclasses.is_dataclass(value):
            yield from _integer_fields(value, here)
        elif value is None or isinstance(value, int):
            accepts = hints[f.name], *typing.get_args(hints[f.name])
            if int in accepts and not isinstance(config, BlockConfig):
                yield here


def _with(config: Any, path: tuple[str, ...], value: int) -> Any:
    """A copy with the field at ``path`` set."""
    name, rest = path[0], path[1:]
    if isinstance(config, dict):
        return {**config, name: _with(config[name], rest, value)}
    return dataclasses.replace(config, **{name: _with(getattr(config, name), rest, value) if rest else value})
