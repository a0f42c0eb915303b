"""Tensors under our names <-> under those of a native checkpoint. Ours are fused: qkv is q, k, v stacked, up is gate, up stacked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.errors import UserError, nearest
from models.lm import LM

TOP = {"embed": ("model.embed_tokens",), "norm": ("model.norm",), "head": ("lm_head",)}
LAYER = {
    "mixer.norm": ("input_layernorm",),
    "mixer.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mixer.q_norm": ("self_attn.q_norm",),
    "mixer.k_norm": ("self_attn.k_norm",),
    "mixer.out": ("self_attn.o_proj",),
    "channel.norm": ("post_attention_layernorm",),
    "channel.up": ("mlp.gate_proj", "mlp.up_proj"),
    "channel.down": ("mlp.down_proj",),
}
PREFIX = "lm."  # of our own names inside the registered class
# Stored by old checkpoints, read by no model: rotary frequencies follow from the config, early delta layers own a skip weight.
UNREAD = re.compile(r"rotary_emb\.inv_freq$|\.attn\.D$")


class Piece(NamedTuple):
    """One tensor of a native checkpoint, and the region of one of ours that it fills."""

    name: str
    at: tuple[slice | int, ...]
    shape: tuple[int, ...]  # as stored there


Pieces = Callable[[LM, str], list[Piece]]  # of our tensor with that name, together all of it


def to_native(model: LM, pieces: Pieces) -> dict[str, Tensor]:
    """The weights under native names. ``progress`` has no place there: no part of such a model reads it."""
    state = model.state_dict()
    return {
        piece.name: state[name][piece.at].reshape(piece.shape)
        for name in state
        if name != "progress"
        for piece in pieces(model, name)
    }


def from_native(
    tensors: Mapping[str, Tensor], model: LM, pieces: Pieces, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The state dict of ``model`` (which may be on meta) from tensors under native names.

    Raises UserError for the first tensor that is missing, superfluous, of another shape, or not of a floating dtype.
    """
    state, used = {}, set()
    for name, own in model.state_dict().items():
        if name == "progress":
            state[name] = torch.ones((), dtype=own.dtype)  # an imported model is a trained one
            continue
        filled = []
        for theirs, at, shape in pieces(model, name):
            if theirs not in tensors:
                raise UserError(f"tensor '{theirs}' is missing{nearest(theirs, set(tensors) - used)}")
            part = tensors[theirs]
            if part.shape != shape:
                raise UserError(f"tensor '{theirs}' has shape {tuple(part.shape)}, the config says {shape}")
            if not part.is_floating_point() or part.dtype.itemsize < 2:
                raise UserError(f"tensor '{theirs}' has dtype {part.dtype}: quantized checkpoints are not supported")
            filled.append((at, part))
            used.add(theirs)
        state[name] = _joined(filled, own.shape, dtype)
    embedding = pieces(model, "embed.weight")[0].name
    for extra in sorted(set(tensors) - used):
        duplicate = extra == "lm_head.weight" and torch.equal(tensors[extra], tensors[embedding])
        if not duplicate and not UNREAD.search(extra):
            raise UserError(f"tensor '{extra}' has no place in the model that the config describes")
    return state


def _joined(filled: list[tuple[tuple[slice | int, ...], Tensor]], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Regions and what fills them -> the whole; without a copy where there is one region and nothing to convert."""
    if len(filled) == 1:
        return filled[0][1].reshape(shape).to(dtype)
    whole = torch.empty(shape, dtype=dtype)
    for at, part in filled:
        whole[at].copy_(part.reshape(whole[at].shape))
    return whole


def stacked(
    names: Sequence[str], rows: Sequence[int], rest: Sequence[int] = (), under: tuple[int, ...] = ()
) -> list[Piece]:
    """Tensors [rows, *rest] stacked in dimension 0 of ours, or of its part ``under`` an index."""
    found, start = [], 0
    for name, n in zip(names, rows, strict=True):
        found.append(Piece(name, (*under, slice(start, start + n)), (n, *rest)))
        start += n
    return found


def llama_pieces(model: LM, name: str) -> list[Piece]:
    module, _, leaf = name.rpartition(".")
    rows, *rest = model.get_parameter(name).shape
    if module in TOP:
        return stacked([f"{theirs}.{leaf}" for theirs in TOP[module]], [rows], rest)
    _, layer, slot, inner = module.split(".", 3)
    theirs = LAYER[f"{slot}.{inner}"]
    part = model.get_submodule(f"layers.{layer}.{slot}")
    sizes = part.splits if inner == "qkv" else [rows // len(theirs)] * len(theirs)
    return stacked([f"model.layers.{layer}.{t}.{leaf}" for t in theirs], sizes, rest)  # pyright: ignore[reportArgumentType]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder: of ``model.safetensors``, or of the shards that its index names."""
    tensors: dict[str, Tensor] = {}
    for file in _files(folder):
        try:
            tensors |= load_file(str(file))
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {file}: {error}") from error
    return tensors


def _files(folder: Path) -> Iterator[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is not an index of safetensors files") from error
        yield from (folder / name for name in names)
    elif single.is_file():
        yield single
    else:
        other = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors"))
        raise UserError(f"no model.safetensors in {folder}{f' (found {other[0]})' if other else ''}")
