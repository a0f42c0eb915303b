"""The model's sentence: named blocks, a cycled pattern, amendments of single layers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from models.errors import UserError, nearest
from models.parsing import choice, from_dict, to_dict
from models.types import SLOTS


@dataclass(frozen=True)
class BlockConfig:
    """Three residual parts, in this order; any of them may be null."""

    memory: Any = field(default=None, metadata={"slot": "memory"})
    mixer: Any = field(default=None, metadata={"slot": "mixer"})
    channel: Any = field(default=None, metadata={"slot": "channel"})


@dataclass(frozen=True)
class ModelConfig:
    d_model: int = 256
    n_layers: int = 4
    vocab_size: int = 0  # 0: the tokenizer's
    max_seq_len: int = 0  # the longest context; 0: unbounded, which learned positions do not allow
    blocks: dict[str, BlockConfig] = field(default_factory=dict)
    pattern: tuple[str, ...] = ()  # names of blocks, cycled over the layers; empty: the only block
    at: dict[int, Any] = field(default_factory=dict)  # {layer: {slot: part, or the keys of it to change, or null}}
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-5
    norm_bias: bool = False
    learned_positions: bool = False
    tied: bool = True  # the head is the embedding
    dropout: float = 0.0  # on embeddings and on what each part adds
    embedding_dropout: float | None = None  # on embeddings; default: as dropout
    branches: int = 1  # residual branches M (manifold-constrained hyper-connections when > 1)
    init_std: float = 0.02

    def __post_init__(self) -> None:
        choice("norm", self.norm, ("rmsnorm", "layernorm"))
        for name in ("d_model", "n_layers", "branches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "embedding_dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise UserError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.norm_bias and self.norm == "rmsnorm":
            raise UserError("norm_bias: an rmsnorm has no bias; norm=layernorm does")
        if not self.blocks:
            raise UserError("blocks: at least one named block is needed")
        if self.learned_positions and self.max_seq_len < 1:
            raise UserError("learned_positions needs max_seq_len")
        if not self.pattern and len(self.blocks) > 1:
            raise UserError(f"pattern: needed to choose between the blocks {', '.join(self.blocks)}")
        for name in self.pattern:
            if name not in self.blocks:
                raise UserError(f"pattern: no block '{name}'{nearest(name, self.blocks)}")
        period = len(self.pattern) or 1
        if self.n_layers % period:
            low = self.n_layers // period * period
            raise UserError(
                f"pattern of {period} blocks does not divide n_layers={self.n_layers}; nearest: {max(low, period)} or {low + period}"
            )
        for layer in self.at:
            if not 0 <= layer < self.n_layers:
                raise UserError(f"at: no layer {layer}; valid: 0 to {self.n_layers - 1}")
        self.layers()

    def block_name(self, layer: int) -> str:
        names = self.pattern or tuple(self.blocks)
        return names[layer % len(names)]

    def layers(self) -> list[BlockConfig]:
        """The block at each depth, pattern and amendments applied."""
        return [self._amended(i, self.blocks[self.block_name(i)]) for i in range(self.n_layers)]

    def _amended(self, layer: int, block: BlockConfig) -> BlockConfig:
        changes = {}
        amendment = self.at.get(layer) or {}
        if not isinstance(amendment, dict):
            raise UserError(f"at.{layer}: expected a mapping of {', '.join(SLOTS)}, got {amendment!r}")
        for slot, raw in amendment.items():
            where = f"at.{layer}.{slot}"
            if slot not in SLOTS:
                raise UserError(f"unknown key '{where}'{nearest(slot, SLOTS)}")
            old = getattr(block, slot)
            if isinstance(raw, dict) and "kind" not in raw and old is not None:
                raw = {**to_dict(old), **raw}
            changes[slot] = getattr(from_dict(BlockConfig, {slot: raw}, f"at.{layer}"), slot)
        return replace(block, **changes)


def model_config(raw: dict[str, Any], where: str = "model") -> ModelConfig:
    """From plain data; see `models.parsing.from_dict` for the errors."""
    return from_dict(ModelConfig, raw, where)


def tiny(cfg: ModelConfig) -> ModelConfig:
    """The same architecture small enough for a test: one period of the pattern, or as deep as the amendments reach."""
    period = len(cfg.pattern) or 1
    at = {layer: change for layer, change in cfg.at.items() if layer < 2 * period}
    depth = period if all(layer < period for layer in at) else 2 * period
    blocks = {
        name: BlockConfig(**{slot: _tiny_part(getattr(block, slot)) for slot in SLOTS})
        for name, block in cfg.blocks.items()
    }
    small = replace(cfg, d_model=64, n_layers=depth, blocks=blocks, at={})
    if not at:
        return small
    layers = replace(cfg, n_layers=-(-cfg.n_layers // period) * period).layers()
    return replace(small, at={i: {s: to_dict(_tiny_part(getattr(layers[i], s))) for s in at[i]} for i in at})


def _tiny_part(part: Any) -> Any:
    return part.tiny() if hasattr(part, "tiny") else part
