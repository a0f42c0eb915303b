"""Equal budgets: the integer (a width, a number of heads or slots) that makes one model as big as another."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from models.config import BlockConfig, ModelConfig
from models.errors import UserError, nearest
from models.lm import meta_model
from models.parsing import choice
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


def match(
    config: ModelConfig,
    to: ModelConfig,
    on: str = "params",
    vary: str = "channel.hidden",
    seq_len: int = 1024,
    multiple_of: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Match:
    """``config`` with the multiple of ``multiple_of`` in field ``vary`` that comes nearest to the budget of ``to``.

    ``on``: params | active_params | flops (per token, mean over ``seq_len``) | state (bytes after ``seq_len`` tokens).
    ``vary``: a field of the model (``d_model``), of one part (``blocks.NAME.channel.hidden``), or of the parts of all
    blocks that have it (``channel.hidden``). The budget must grow with the field; of two equally near values the
    smaller is taken. Raises UserError when no such field exists, or no value of it reaches the target.
    """
    choice("budget", on, tuple(BUDGETS))
    if multiple_of < 1:
        raise UserError(f"multiple_of must be at least 1, got {multiple_of}")
    paths = _resolve(config, vary)

    def measured(cfg: ModelConfig) -> float:
        return getattr(meta_model(cfg).cost(seq_len, dtype), BUDGETS[on])

    def candidate(k: int) -> ModelConfig:
        value = k * multiple_of
        try:
            changed: Any = config
            for path in paths:
                changed = _with(changed, path, value)
            return changed
        except UserError as error:
            raise UserError(f"{vary}={value}: {error}") from error

    def achieved(k: int) -> float:
        try:
            return measured(candidate(k))
        except UserError as error:
            said = str(error)
            raise error if said.startswith(vary) else UserError(f"{vary}={k * multiple_of}: {said}") from error

    target = measured(to)
    low, at_low = 1, achieved(1)
    high, at_high = 2, achieved(2)
    if at_high == at_low:
        raise UserError(f"{on} does not grow with {vary}")
    if at_low > target:
        raise UserError(f"{on} of {target:,.0f} is out of reach: {vary}={multiple_of} already gives {at_low:,.0f}")
    while at_high < target:
        low, at_low = high, at_high
        high = 2 * high
        if high * multiple_of > LARGEST:
            raise UserError(f"{on} of {target:,.0f} is out of reach: {vary}={low * multiple_of} gives {at_low:,.0f}")
        at_high = achieved(high)
    while high - low > 1:
        middle = (low + high) // 2
        at_middle = achieved(middle)
        if at_middle < target:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    best, result = (low, at_low) if target - at_low <= at_high - target else (high, at_high)
    return Match(candidate(best), best * multiple_of, result, target, result - target)


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
