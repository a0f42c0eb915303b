"""Our model config <-> a Llama-family ``config.json``. What one side cannot say is refused, never dropped."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

from models.channels.mlp import SwiGLU
from models.config import ModelConfig, model_config
from models.errors import UserError
from models.lm import LM
from models.mixers.attention import Attention, AttentionConfig

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COMMON = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": None,
    "rope_parameters": None,
    "rope_scaling": None,
    "attention_dropout": 0.0,
}


class Family(NamedTuple):
    architecture: str
    defaults: dict[str, Any]  # every field that is understood, with the value transformers assumes when it is absent


FAMILIES = {
    "llama": Family("LlamaForCausalLM", {**COMMON, "attention_bias": False, "mlp_bias": False}),
    "mistral": Family(
        "MistralForCausalLM",
        {**COMMON, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {
            **COMMON,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "layer_types": None,
        },
    ),
}
KNOWN_MISFITS = {
    "qwen2": "its attention has a bias on q, k and v but none on the output",
    "gemma": "its norms and embeddings are scaled",
    "gemma2": "its norms and embeddings are scaled",
    "gpt2": "its weights are not Llama-shaped",
}
HARMLESS = {  # say nothing about the forward of these families; neither does a name that begins with "_"
    *("architectures", "auto_map", "dtype", "is_llama_config", "model_type", "pretraining_tp", "tokenizer_class"),
    *("torch_dtype", "transformers_version", "transformers.js_config", "use_cache", "return_dict", "problem_type"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "chunk_size_feed_forward"),
    *("do_sample", "max_length", "temperature", "top_k", "top_p", "repetition_penalty"),
}


# -- in


def from_hf(raw: dict[str, Any]) -> ModelConfig:
    """A Llama-family ``config.json`` as our config. Raises UserError naming the first field that is not supported."""
    kind = raw["model_type"]
    family = FAMILIES[kind]
    check_fields(raw, REQUIRED, family.defaults)
    values = {**family.defaults, **raw}
    if values["hidden_act"] not in ("silu", "swish"):
        raise refuse("hidden_act", values["hidden_act"], "silu")
    windows = _windows(kind, values)
    names = ["full" if window is None else "local" for window in windows]
    return model_config(
        {
            "d_model": values["hidden_size"],
            "n_layers": values["num_hidden_layers"],
            "vocab_size": values["vocab_size"],
            "max_seq_len": values["max_position_embeddings"],
            "blocks": {name: _block(values, window) for name, window in zip(names, windows, strict=True)},
            "pattern": _shortest_period(names) if len(set(names)) > 1 else (),
            "norm_eps": values["rms_norm_eps"],
            "tied": values["tie_word_embeddings"],
            "init_std": values["initializer_range"],
        },
        "config.json, read as a model",
    )


def check_fields(raw: dict[str, Any], required: Sequence[str], known: Container[str]) -> None:
    """Raises UserError for a size that is not an integer, and for an unknown field that switches something on."""
    for name in required:
        if not isinstance(raw.get(name), int):
            raise UserError(f"config.json: '{name}' must be an integer, got {raw.get(name)!r}")
    for name, value in raw.items():
        understood = name in known or name in required or name in HARMLESS or name.startswith("_")
        # an unknown field that is null, false or empty switches something off
        if not understood and value not in (None, False, 0, "", [], {}):
            raise refuse(name, value)


def refuse(name: str, value: Any, supported: str = "") -> UserError:
    return UserError(
        f"config.json: {name} = {value!r} is not supported{f'; supported: {supported}' if supported else ''}"
    )


def _block(values: dict[str, Any], window: int | None) -> dict[str, Any]:
    mixer = {
        "kind": "attention",
        "heads": values["num_attention_heads"],
        "kv_heads": values["num_key_value_heads"],
        "head_dim": values["head_dim"],
        "window": window,
        "rope_theta": _rope_theta(values),
        "qk_norm": values["model_type"] == "qwen3",
        "bias": values.get("attention_bias", False),
        "dropout": values["attention_dropout"],
    }
    channel = {"kind": "swiglu", "hidden": values["intermediate_size"], "bias": values.get("mlp_bias", False)}
    return {"mixer": mixer, "channel": channel}


def _rope_theta(values: dict[str, Any]) -> Any:
    """Of the older ``rope_theta`` + ``rope_scaling`` or the newer ``rope_parameters``; only the plain form is taken."""
    theta = values["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):
        group = values[name] or {}
        if not isinstance(group, dict):
            raise refuse(name, group, "a mapping")
        kind = group.get("rope_type", group.get("type", "default"))
        if kind != "default":
            raise refuse(f"{name}.rope_type", kind, "default")
        for key, value in group.items():
            if key not in ("rope_type", "type", "rope_theta") and (key, value) != ("partial_rotary_factor", 1.0):
                raise refuse(f"{name}.{key}", value)
        inner = group.get("rope_theta", theta)
        if theta not in (None, inner):
            raise refuse("rope_theta", theta, f"{inner}, as in {name}")
        theta = inner
    return 10000.0 if theta is None else theta


def _windows(kind: str, values: dict[str, Any]) -> list[int | None]:
    """The sliding window of each layer."""
    layers = values["num_hidden_layers"]
    if kind == "llama":
        return [None] * layers
    window = values["sliding_window"]
    if kind == "mistral":
        return [window] * layers
    if not values["use_sliding_window"]:
        window = None
    types = values["layer_types"]
    if types is None:
        slides = window is not None
        first = values["max_window_layers"]
        types = ["sliding_attention" if slides and i >= first else "full_attention" for i in range(layers)]
    if len(types) != layers:
        raise refuse("layer_types", types, f"one entry for each of {layers} layers")
    for name in types:
        if name not in ("full_attention", "sliding_attention") or (name == "sliding_attention" and window is None):
            raise refuse("layer_types", name, "full_attention" + (", sliding_attention" if window else ""))
    return [window if name == "sliding_attention" else None for name in types]


def _shortest_period(names: list[str]) -> tuple[str, ...]:
    sizes = (n for n in range(1, len(names) + 1) if len(names) % n == 0)
    return next(tuple(names[:n]) for n in sizes if names[:n] * (len(names) // n) == names)


# -- out


def to_hf(model: LM) -> dict[str, Any]:
    """A native Llama-family ``config.json``. Raises UserError naming the first thing that no family can express."""
    cfg = model.cfg
    _need(cfg.norm == "rmsnorm", f"norm '{cfg.norm}'")
    _need(not cfg.learned_positions, "learned_positions")
    _need(cfg.branches == 1, f"branches={cfg.branches}")
    _need(not cfg.dropout, f"dropout={cfg.dropout}")
    _need(not model.tables() and not model.addressing, "row stores")
    layers = cfg.layers()
    for i, block in enumerate(layers):
        _need(block.memory is None, f"layer {i}: a memory")
        for slot, kind in (("mixer", "attention"), ("channel", "swiglu")):
            found = getattr(getattr(block, slot), "kind", None)
            _need(found == kind, f"layer {i}: {slot} '{found}'")
        _need(not block.mixer.token_shift, f"layer {i}: token_shift")
        _need(_shape(model, i) == _shape(model, 0), f"layer {i}: a shape or option other than in layer 0")
    windows = [block.mixer.window for block in layers]
    attention: Any = model.layers[0].mixer
    kind, extra = _family(attention.cfg, layers[0].channel.bias, windows)
    if kind == "llama":
        _need(cfg.d_model % attention.heads == 0, f"heads={attention.heads} that do not divide d_model={cfg.d_model}")
    channel: Any = model.layers[0].channel
    return {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": channel.hidden,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        # a native checkpoint must name a length; rotary positions have no hard end
        "max_position_embeddings": cfg.max_seq_len or FAMILIES[kind].defaults["max_position_embeddings"],
        "initializer_range": cfg.init_std,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        "attention_dropout": attention.cfg.dropout,
        "rope_theta": attention.cfg.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.cfg.rope_theta},
        "use_cache": True,
        **extra,
    }


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise UserError(f"{what} cannot be written as a Llama-family checkpoint; use --format loci")


def _shape(model: LM, layer: int) -> tuple[Any, ...]:
    """Everything that these families hold once for all layers."""
    mixer, channel = model.layers[layer].mixer, model.layers[layer].channel
    if not (isinstance(mixer, Attention) and isinstance(channel, SwiGLU)):
        return ()
    c = mixer.cfg
    return (
        mixer.splits,
        mixer.head_dim,
        c.rope_theta,
        c.qk_norm,
        c.bias,
        c.dropout,
        channel.hidden,
        channel.cfg.bias,
    )


def _family(attention: AttentionConfig, mlp_bias: bool, windows: list[int | None]) -> tuple[str, dict[str, Any]]:
    """-> (model_type, the fields only it has)."""
    _need(attention.rope_theta is not None, "attention without rotary positions")
    widths = {w for w in windows if w is not None}
    if attention.qk_norm:
        _need(not mlp_bias, "swiglu with bias and attention with qk_norm")
        _need(len(widths) <= 1, f"windows of several widths {sorted(widths)}")
        types = ["full_attention" if w is None else "sliding_attention" for w in windows]
        sliding = {"use_sliding_window": bool(widths), "sliding_window": min(widths, default=None)}
        return "qwen3", {"attention_bias": attention.bias, "layer_types": types, **sliding}
    if not widths:
        return "llama", {"attention_bias": attention.bias, "mlp_bias": mlp_bias}
    _need(len(set(windows)) == 1, "a window in some layers only, without qk_norm,")
    _need(not attention.bias and not mlp_bias, "bias together with a window, without qk_norm,")
    return "mistral", {"sliding_window": windows[0]}
