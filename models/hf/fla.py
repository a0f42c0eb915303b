"""Checkpoints of flash-linear-attention (fla, checked with 0.6.0) read as ours: Gated DeltaNet and Mixture-of-Memories.

Its layers own one matrix per projection and per memory; ours are fused, and stacked over memories with the shared one last. What
fla cannot tell apart in its own forward is accepted, and said where it may surprise; everything else that we lack is refused.
An imported MoM computes what fla does in eval mode: in training, fla's convolution runs on from one memory's tokens to the next's.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from models.config import ModelConfig, model_config
from models.hf.config import check_fields, refuse
from models.hf.weights import Piece, stacked
from models.lm import LM
from models.mixers.mom import MoM

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim", "conv_size")
COMMON = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "head_dim": 256,
    "conv_size": 4,
    "use_short_conv": True,
    "max_position_embeddings": 2048,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attn": None,  # layers of softmax attention
    "attnres_block_size": None,
    "norm_first": False,
}
ROUTED = {"capacity": 1.0, "use_layer_wise_balance": True, "aux_loss_scale": 0.01, "topk": 2}
FAMILIES: dict[str, dict[str, Any]] = {  # what is understood, with the value that fla assumes where it is absent
    "gated_deltanet": {
        **COMMON,
        "num_hidden_layers": 21,
        "num_heads": 6,
        "num_v_heads": None,
        "expand_v": 2.0,
        "use_gate": True,
        "output_gate_activation": "swish",
        "allow_neg_eigval": False,
    },
    "mom": {
        **COMMON,
        **ROUTED,
        "num_hidden_layers": 24,
        "num_heads": 4,
        "expand_v": 1.0,
        "use_output_gate": True,
        "num_memories": 4,
        "shared_mem": True,
        "single_kv_proj": False,
        "mom_backend": "gated_deltanet",
    },
    "mom_gated_deltanet": {  # the authors' own code, under the names of its first version
        **COMMON,
        **ROUTED,
        "num_hidden_layers": 21,
        "num_heads": 6,
        "expand_v": 2.0,
        "use_gate": True,
        "num_experts": 8,
        "shared_mem": False,
        "single_expert": False,
    },
}
NUMBERS = {"hidden_ratio": True, "intermediate_size": True, "aux_loss_scale": False, "capacity": False}  # may be null
RENAMED = {"num_experts": "num_memories", "single_expert": "single_kv_proj", "use_gate": "use_output_gate"}
# How the same function is computed, or what it was trained with; fla reads `fuse_*` and `attn_mode` as hints.
HINTS = ("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")
ONLY: dict[str, tuple[Any, ...]] = {
    "use_short_conv": (True,),
    "hidden_act": ("swish", "silu"),
    "output_gate_activation": ("swish", "silu"),
    "attn": (None,),
    "attnres_block_size": (None,),
    "norm_first": (False,),
    "mom_backend": ("gated_deltanet",),
}


# -- the config


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """An fla ``config.json`` as our config. Raises UserError naming the first field that is not supported."""
    kind = raw["model_type"]
    defaults = FAMILIES[kind]
    values = {**defaults, **raw}
    sizes = [*SIZES, *(name for name in ("topk", "num_memories", "num_experts") if name in defaults)]
    check_fields({**raw, **{name: values[name] for name in sizes}}, sizes, {*defaults, *HINTS})
    for name, supported in ONLY.items():
        if name in defaults and values[name] not in supported:
            raise refuse(name, values[name], ", ".join("null" if v is None else str(v) for v in supported))
    for name, nullable in NUMBERS.items():
        value = values.get(name, 0)
        if not isinstance(value, (int, float)) and not (nullable and value is None):
            raise refuse(name, value, "a number")
    if kind == "mom_gated_deltanet" and values["capacity"] < 1:
        raise refuse("capacity", values["capacity"], "1.0 or more, which drops no token")
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    mixer = _gated_delta(values) if kind == "gated_deltanet" else _mom(values)
    return model_config(
        {
            "d_model": values["hidden_size"],
            "n_layers": values["num_hidden_layers"],
            "vocab_size": values["vocab_size"],
            "max_seq_len": values["max_position_embeddings"],
            "blocks": {mixer["kind"]: {"mixer": mixer, "channel": {"kind": "swiglu", "hidden": _hidden(values)}}},
            "norm_eps": values["norm_eps"],
            "tied": values["tie_word_embeddings"],
            "init_std": values["initializer_range"],
        },
        "config.json, read as a model",
    )


def _gated_delta(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "gated_delta",
        "heads": values["num_heads"],
        "value_heads": values.get("num_v_heads"),
        "head_dim": values["head_dim"],
        "expand_v": values["expand_v"],
        "conv": values["conv_size"],
        "gate": values["use_output_gate"],
        "allow_neg_eigval": values.get("allow_neg_eigval", False),
    }


def _mom(values: dict[str, Any]) -> dict[str, Any]:
    if values["capacity"] != 1:
        warnings.warn(f"capacity={values['capacity']} is ignored, as fla does: no token is ever dropped", stacklevel=2)
    if not values["use_layer_wise_balance"]:
        warnings.warn("use_layer_wise_balance=false is ignored: the balance loss is one of each layer", stacklevel=2)
    return {
        "kind": "mom",
        "rule": _gated_delta(values),
        "memories": values["num_memories"],
        "top_k": values["topk"],
        "shared": values["shared_mem"],
        "shared_kv": values["single_kv_proj"],
        "router_norm": "topk",
        # theirs is k where the load is balanced, ours is 1
        "balance_weight": values["aux_loss_scale"] * values["topk"],
    }


def _hidden(values: dict[str, Any]) -> int:
    """Width of SwiGLU by fla's rule: 2/3 of ratio times width, rounded down to a whole number and up to a multiple of 256."""
    ratio = 4 if values["hidden_ratio"] is None else values["hidden_ratio"]
    return values["intermediate_size"] or -(-int(values["hidden_size"] * ratio * 2 / 3) // 256) * 256


# -- the weights

TOP = {"embed.weight": "model.embeddings.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
WHOLE = {  # ours inside a layer: theirs
    "mixer.norm.weight": "attn_norm.weight",
    "mixer.router.weight": "attn.gate.weight",
    "mixer.rule.A_log": "attn.A_log",
    "mixer.rule.dt_bias": "attn.dt_bias",
    "mixer.readout.weight": "attn.o_norm.weight",
    "mixer.out.weight": "attn.o_proj.weight",
    "channel.norm.weight": "mlp_norm.weight",
    "channel.down.weight": "mlp.down_proj.weight",
}


def pieces(model: LM, name: str) -> list[Piece]:
    """Of our tensor ``name``, see `models.hf.weights.Pieces`."""
    shape = tuple(model.get_parameter(name).shape)
    if name in TOP:
        return [Piece(TOP[name], (), shape)]
    _, layer, inner = name.split(".", 2)
    found = _layer_pieces(model.layers[int(layer)].mixer, inner, shape)  # pyright: ignore[reportArgumentType]
    return [piece._replace(name=f"model.layers.{layer}.{piece.name}") for piece in found]


def _layer_pieces(mixer: Any, inner: str, shape: tuple[int, ...]) -> list[Piece]:
    """``inner``: our name after ``layers.N.``; the names that come back stand after ``model.layers.N.``."""
    if inner in WHOLE:
        return [Piece(WHOLE[inner], (), shape)]
    rows, *rest = shape
    routed = isinstance(mixer, MoM)
    match inner:
        case "channel.up.weight":
            return stacked(["mlp.gate_proj.weight", "mlp.up_proj.weight"], [rows // 2] * 2, rest)
        case "mixer.conv.weight":  # [C, W], theirs one for each of q, k, v and as Conv1d has them: [C, 1, W]
            return stacked([f"attn.{x}_conv1d.weight" for x in "qkv"], mixer.heads.widths, [1, *rest])
        case "mixer.project.weight":
            names = "qg" if routed else "qkvgba"
            sizes = mixer.common if routed else (*mixer.heads.widths, mixer.widths[1], *mixer.rule.logits)
            there = [(f"attn.{x}_proj.weight", n) for x, n in zip(names, sizes, strict=True) if n]
            return stacked([x for x, _ in there], [n for _, n in there], rest)
        case "mixer.kv":  # [M, rows, D], the shared memory last; one for all where they share it
            _, *rest = rest
            memories = [None] if mixer.cfg.shared_kv else [*range(mixer.cfg.memories), *([None] * mixer.cfg.shared)]
            return [
                piece
                for i, m in enumerate(memories)
                for piece in stacked(
                    [f"attn.shared_{x}.weight" if m is None else f"attn.{x}_proj.{m}.weight" for x in "kvba"],
                    mixer.own,
                    rest,
                    (i,),
                )
            ]
    raise KeyError(inner)


def modern(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Early versions stored gate and up projection of the channel as one matrix, called like the former."""
    found = dict(tensors)
    for name, gate in tensors.items():
        layer, fused, leaf = name.partition("mlp.gate_proj.")
        down, up = (tensors.get(f"{layer}mlp.{x}_proj.{leaf}") for x in ("down", "up"))
        if fused and up is None and down is not None and len(gate) == 2 * down.shape[-1]:
            found[name], found[f"{layer}mlp.up_proj.{leaf}"] = gate.chunk(2)
    return found
