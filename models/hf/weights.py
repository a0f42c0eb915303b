"""Tensors under our names <-> under Llama's. Ours are fused: qkv is q, k, v stacked, up is gate, up stacked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

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
DERIVED = re.compile(r"rotary_emb\.inv_freq$")  # stored by old checkpoints, follows from the config


def to_llama(model: LM) -> dict[str, Tensor]:
    """The weights under Llama's names. ``progress`` has no place there: no part of such a model reads it."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name != "progress":
            pieces = _pieces(model, name)
            rows = [size for _, size in pieces]
            found |= dict(zip([theirs for theirs, _ in pieces], tensor.split(rows), strict=True))
    return found


def from_llama(tensors: Mapping[str, Tensor], model: LM, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state dict of ``model`` (which may be on meta) from tensors under Llama's names.

    Raises UserError for the first tensor that is missing, superfluous, of another shape, or not of a floating dtype.
    """
    state, used = {}, set()
    for name, own in model.state_dict().items():
        if name == "progress":
            state[name] = torch.ones((), dtype=own.dtype)  # an imported model is a trained one
            continue
        parts = []
        for theirs, rows in _pieces(model, name):
            if theirs not in tensors:
                raise UserError(f"tensor '{theirs}' is missing{nearest(theirs, set(tensors) - used)}")
            part, shape = tensors[theirs], (rows, *own.shape[1:])
            if part.shape != shape:
                raise UserError(f"tensor '{theirs}' has shape {tuple(part.shape)}, the config says {shape}")
            if not part.is_floating_point() or part.dtype.itemsize < 2:
                raise UserError(f"tensor '{theirs}' has dtype {part.dtype}: quantized checkpoints are not supported")
            parts.append(part.to(dtype))
            used.add(theirs)
        state[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    for extra in sorted(set(tensors) - used):
        duplicate = extra == "lm_head.weight" and torch.equal(tensors[extra], tensors["model.embed_tokens.weight"])
        if not duplicate and not DERIVED.search(extra):
            raise UserError(f"tensor '{extra}' has no place in the model that the config describes")
    return state


def _pieces(model: LM, name: str) -> list[tuple[str, int]]:
    """Our tensor name -> [(Llama's name, rows)] in the order in which they are stacked."""
    module, _, leaf = name.rpartition(".")
    rows = model.get_parameter(name).shape[0]
    if module in TOP:
        return [(f"{theirs}.{leaf}", rows) for theirs in TOP[module]]
    _, layer, slot, inner = module.split(".", 3)
    theirs = LAYER[f"{slot}.{inner}"]
    part = model.get_submodule(f"layers.{layer}.{slot}")
    sizes = part.splits if inner == "qkv" else [rows // len(theirs)] * len(theirs)
    return [(f"model.layers.{layer}.{t}.{leaf}", int(size)) for t, size in zip(theirs, sizes, strict=True)]  # pyright: ignore[reportArgumentType]


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
