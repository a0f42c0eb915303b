"""The configurations that sign the contracts: every kind of the zoo by slot and kind, the toys, and whole models.

Write an entry for a kind whose options change what it computes; without one it signs with its default config.
"""

from __future__ import annotations

from typing import Any

from models import zoo
from models.parsing import to_dict
from tests.tools import Case


def _part(slot: str, name: str, part: dict[str, Any], **how: Any) -> Case:
    return Case(f"{slot}-{name}", slot, part, **how)


def _mom(name: str, rule: dict[str, Any], **options: Any) -> Case:
    return _part("mixer", name, {"kind": "mom", "rule": rule, **options}, nonlinear=("balance",))


def _bmojo(name: str, ssm: dict[str, Any], window: int = 3, **options: Any) -> Case:
    part = {"kind": "bmojo", "ssm": ssm, "heads": 2, "window": window, "m_e": 2, **options}
    return _part("mixer", name, part)


def _structured(form: str, other_flops: float = 0.0, **options: Any) -> Case:
    name = f"structured-{form}-{options.get('activation', 'gelu')}"
    return _part("channel", name, {"kind": "structured_ffn", "form": form, **options}, other_flops=other_flops)


def _moe(name: str, **options: Any) -> Case:
    return _part("channel", name, {"kind": "moe", "hidden": 6, **options}, nonlinear=("balance",))


def _gmt(name: str, **options: Any) -> Case:
    part = {"kind": "gmt", "slots": 7, "width": 5, **options}
    return _part("channel", name, part, nonlinear=("usage", "target_usage"), held=("tracking",), dropout=0.0)


_MAMBA2 = {"kind": "mamba2", "head_dim": 8, "d_state": 4}
ENGRAM = {"kind": "engram", "heads": 2, "row_width": 3, "base": 37}


def _engram(name: str, taps: int = 4, branches: int = 1, gates: int | None = None, **options: Any) -> Case:
    """Counted beside the projection, in both layers: the agreement and the taps of each gate."""
    part = {**ENGRAM, "conv": taps, **options}
    other = 2 * (gates or branches) * (2 * 16 + 2 * taps * 16)
    if branches == 1:
        return _part("memory", name, part, other_flops=other)
    other += 2 * (0 if gates is None else 2 * branches * 16)
    return Case(name, model={"branches": branches, "blocks": {"a": {"memory": part}}}, other_flops=other)


EMA = {"kind": "tests.toys:ToyEMA"}
SLOTS_TOY = {"kind": "tests.toys:ToySlots"}
BRANCHES_HASH = {"kind": "tests.toy_memory:ToyHashBranches"}
HASH = {"kind": "tests.toy_memory:ToyHash"}

CASES: dict[tuple[str, str], list[Case]] = {
    ("mixer", "attention"): [
        _part("mixer", "attention", {"kind": "attention", "heads": 4}),
        _part("mixer", "attention-gqa-window", {"kind": "attention", "heads": 4, "kv_heads": 2, "window": 3}),
        _part("mixer", "attention-qknorm", {"kind": "attention", "heads": 2, "head_dim": 6, "qk_norm": True}),
        _part("mixer", "attention-nope-bias", {"kind": "attention", "heads": 2, "rope_theta": None, "bias": True}),
        _part("mixer", "attention-shift", {"kind": "attention", "heads": 2, "window": 4, "token_shift": 3}),
        _part("mixer", "attention-window1", {"kind": "attention", "heads": 2, "kv_heads": 1, "window": 1}),
    ],
    ("mixer", "linear_attention"): [
        _part("mixer", "linear_attention", {"kind": "linear_attention", "heads": 2}),
        _part(
            "mixer",
            "linear_attention-paper",
            {"kind": "linear_attention", "heads": 2, "normalize": True, "output_norm": False, "expand_v": 1.5},
        ),
        _part(
            "mixer",
            "linear_attention-identity",
            {"kind": "linear_attention", "heads": 2, "feature_map": "identity", "conv": 3, "gate": True},
        ),
    ],
    ("mixer", "retnet"): [
        _part("mixer", "retnet", {"kind": "retnet", "heads": 2}),
        _part(
            "mixer", "retnet-nope", {"kind": "retnet", "heads": 2, "value_heads": 4, "head_dim": 6, "rope_theta": None}
        ),
    ],
    ("mixer", "gla"): [
        _part("mixer", "gla", {"kind": "gla", "heads": 2, "rank": 3}),
        _part(
            "mixer",
            "gla-conv",
            {"kind": "gla", "heads": 1, "value_heads": 2, "conv": 2, "gate": False, "temperature": 1},
        ),
    ],
    ("mixer", "mamba"): [
        _part("mixer", "mamba", {"kind": "mamba", "d_state": 4}),
        _part(
            "mixer",
            "mamba-narrow",
            {"kind": "mamba", "expand": 1, "d_state": 1, "conv": 1, "conv_bias": False, "dt_rank": 3},
        ),
    ],
    ("mixer", "mamba2"): [
        _part("mixer", "mamba2", {"kind": "mamba2", "head_dim": 8, "d_state": 6}),
        _part(
            "mixer", "mamba2-groups", {"kind": "mamba2", "head_dim": 4, "d_state": 3, "groups": 2, "conv_bias": False}
        ),
        _part(
            "mixer",
            "mamba2-bare",
            {"kind": "mamba2", "head_dim": 8, "d_state": 4, "gate": False, "output_norm": False, "conv": 1},
        ),
    ],
    ("mixer", "delta"): [
        _part("mixer", "delta", {"kind": "delta", "heads": 2}),
        _part(
            "mixer", "delta-negative", {"kind": "delta", "heads": 1, "conv": 0, "allow_neg_eigval": True, "gate": True}
        ),
    ],
    ("mixer", "gated_delta"): [
        _part("mixer", "gated_delta", {"kind": "gated_delta", "heads": 2}),
        _part(
            "mixer",
            "gated_delta-grouped",
            {"kind": "gated_delta", "heads": 2, "value_heads": 4, "head_dim": 4, "expand_v": 1.5, "conv_bias": True},
        ),
    ],
    ("mixer", "mom"): [
        _mom("mom", {"kind": "gated_delta", "heads": 2}),
        _mom("mom-one", {"kind": "gla", "heads": 1, "rank": 3}, top_k=1, shared=False, router_norm="none"),
        _mom("mom-all", {"kind": "mamba2", "head_dim": 8, "d_state": 4}, memories=3, top_k=3),
        _mom("mom-shared-kv", {"kind": "retnet", "heads": 2}, shared_kv=True),
        _mom("mom-many", {"kind": "linear_attention", "heads": 2, "gate": True}, memories=8, shared=False),
        _mom("mom-delta", {"kind": "delta", "heads": 1, "value_heads": 2, "conv": 2}, router_norm="none"),
    ],
    ("mixer", "bmojo"): [
        _bmojo("bmojo", _MAMBA2),
        _bmojo("bmojo-mamba", {"kind": "mamba", "d_state": 4}),
        _bmojo("bmojo-gated-delta", {"kind": "gated_delta", "heads": 2}, window=4, m_f=2, kv_heads=1, dedup=False),
        _bmojo("bmojo-band", _MAMBA2, fading_mode="band", qk_norm=True, tie_fading=False, score="innov_cos"),
        _bmojo(
            "bmojo-point", {"kind": "retnet", "heads": 2}, fading_mode="point", pos="rope_const", m_e=5, token_shift=2
        ),
        _bmojo(
            "bmojo-true",
            {"kind": "gla", "heads": 2, "rank": 3},
            pos="rope_true",
            m_f=3,
            score="stride",
            evict_gamma=0.9,
        ),
        _bmojo("bmojo-delta", {"kind": "delta", "heads": 2}, score="delta"),
        _bmojo("bmojo-f", {"kind": "delta", "heads": 2}, m_e=0, token_shift=0, fading_norm=False),
        _bmojo("bmojo-self", _MAMBA2, fading_mode="self", window=5, score="random", score_debias=True),
        _bmojo("bmojo-ssm", _MAMBA2, fading_mode="self", window=0, m_e=0, kv_heads=1),
    ],
    ("channel", "swiglu"): [
        _part("channel", "swiglu", {"kind": "swiglu", "hidden": 20}),
        _part("channel", "swiglu-bias", {"kind": "swiglu", "multiple_of": 8, "bias": True}),
    ],
    ("channel", "gelu"): [
        _part("channel", "gelu", {"kind": "gelu", "bias": True}),
        _part("channel", "gelu-tanh", {"kind": "gelu", "hidden": 9, "approximate": "tanh"}),
    ],
    ("channel", "relu2"): [_part("channel", "relu2", {"kind": "relu2", "ratio": 2})],
    ("channel", "gmt"): [
        _gmt("gmt", fidelity="paper"),
        _gmt("gmt-corrected", fidelity="corrected"),
        _gmt("gmt-free", displacement="none", write_source="cell_input", momentum_learned=False, temperature=0.5),
    ],
    ("channel", "moe"): [
        _moe("moe", experts=5),
        _moe("moe-loss", experts=4, shared=0, score="softmax", balance="loss"),
        _moe("moe-one", experts=3, top_k=1, shared=2, router_norm="none", balance="none", scale=2.5),
        _moe("moe-all", experts=3, top_k=3, shared=0, score="softmax", router_norm="none", balance="none"),
    ],
    ("memory", "engram"): [
        _engram("engram"),
        _engram("engram-bare", taps=0, orders=[2, 3, 4], gate="sigmoid", compression="none"),
        _engram("engram-wide", taps=2, dilation=4, gate="sigmoid", base=[41, 30]),
        _engram("engram-branches", branches=4),
        _engram("engram-branches-bare", taps=0, branches=4, gate="sigmoid"),
        _engram("engram-read", branches=4, gates=1, per_branch=False),
    ],
    ("channel", "structured_ffn"): [
        _structured("low_rank", rank=5),
        _structured("block_dense", rank=6, blocks=2, bias=True),
        _structured("block_shuffle", hidden=24, blocks=4, activation="relu2"),
        _structured("block_shuffle", hidden=12, blocks=2, activation="swiglu"),
        # two layers, two products each way: 3 stacks of 16 up (4 levels), one of 64 down (6 levels); 4 FLOPs an entry and level
        _structured("butterfly", hidden=40, products=2, other_flops=2 * 2 * 4 * (3 * 16 * 4 + 64 * 6)),
    ],
}

# A kind that nobody wrote a case for signs with its defaults, shrunk: the line in the zoo is enough.
for _slot, _table in zoo.TABLE.items():
    for _kind in _table:
        if (_slot, _kind) not in CASES:
            _default = zoo.part_class(_slot, _kind).Config()
            CASES[_slot, _kind] = [
                _part(_slot, _kind, to_dict(_default.tiny() if hasattr(_default, "tiny") else _default))
            ]

TOYS = [
    _part("mixer", "ema", EMA, nonlinear=("spread",), other_flops=2 * 4 * 6),
    _part("channel", "slots", SLOTS_TOY, nonlinear=("balance",)),
    _part(
        "mixer",
        "nest-ema",
        {"kind": "tests.toys:ToyNest", "inner": EMA},
        nonlinear=("spread",),
        other_flops=2 * 4 * 6,
    ),
    _part(
        "mixer",
        "nest-attention",
        {"kind": "tests.toys:ToyNest", "inner": {"kind": "attention", "heads": 2, "window": 3}},
    ),
    _part("memory", "hash", HASH, other_flops=2 * 2 * 16),
]

_ATTENTION = {"kind": "attention", "heads": 2}
_SWIGLU = {"kind": "swiglu", "hidden": 12}
_RETNET = {"kind": "retnet", "heads": 2}
_BMOJO = {"kind": "bmojo", "heads": 2, "window": 3, "m_e": 2}
MODELS = [
    Case("model-llama", model={"blocks": {"a": {"mixer": {**_ATTENTION, "kv_heads": 1}, "channel": _SWIGLU}}}),
    Case(
        "model-gpt2",
        model={
            "blocks": {"a": {"mixer": {**_ATTENTION, "rope_theta": None}, "channel": {"kind": "gelu"}}},
            "norm": "layernorm",
            "norm_bias": True,
            "learned_positions": True,
            "max_seq_len": 32,
        },
    ),
    Case(
        "model-everything",
        model={
            "n_layers": 3,
            "tied": False,
            "blocks": {
                "local": {"mixer": {**_ATTENTION, "window": 4}, "channel": SLOTS_TOY},
                "ema": {"mixer": EMA, "channel": _SWIGLU},
            },
            "pattern": ["ema", "local", "ema"],
            "at": {1: {"memory": HASH}, 2: {"memory": HASH, "mixer": None}},
        },
        nonlinear=("balance", "spread"),
        other_flops=4 * 6 + 2 * 2 * 16,
    ),
    Case(
        "model-hybrid",
        model={
            "n_layers": 4,
            "blocks": {
                "delta": {"mixer": {"kind": "gated_delta", "heads": 2}, "channel": _SWIGLU},
                "ssm": {"mixer": {"kind": "mamba2", "head_dim": 8, "d_state": 4}},
                "local": {"mixer": {**_ATTENTION, "window": 4}, "channel": _SWIGLU},
                "nest": {"mixer": {"kind": "tests.toys:ToyNest", "inner": {"kind": "retnet", "heads": 1}}},
            },
            "pattern": ["delta", "ssm", "local", "nest"],
        },
    ),
    Case(
        "model-mom",
        model={
            "n_layers": 3,
            "blocks": {
                "mom": {"mixer": {"kind": "mom", "rule": {"kind": "gated_delta", "heads": 2}}, "channel": _SWIGLU},
                "local": {"mixer": {**_ATTENTION, "window": 4}},
                "nest": {"mixer": {"kind": "tests.toys:ToyNest", "inner": {"kind": "mom", "rule": _RETNET}}},
            },
            "pattern": ["mom", "local", "nest"],
        },
        nonlinear=("balance",),
    ),
    Case(
        "model-bmojo",
        model={
            "n_layers": 4,
            "blocks": {
                "bmojo": {"mixer": {**_BMOJO, "ssm": {"kind": "mom", "rule": _RETNET}}, "channel": _SWIGLU},
                "wide": {"mixer": {**_BMOJO, "ssm": _MAMBA2, "window": 5, "fading_mode": "band"}},
                "local": {"mixer": {**_ATTENTION, "window": 4}},
                "nest": {"mixer": {"kind": "tests.toys:ToyNest", "inner": {**_BMOJO, "ssm": EMA}}},
            },
            "pattern": ["bmojo", "wide", "local", "nest"],
        },
        nonlinear=("balance", "spread"),
        other_flops=4 * 6,
    ),
    Case(
        "model-branches",
        model={
            "branches": 3,
            "blocks": {"a": {"memory": BRANCHES_HASH, "mixer": EMA, "channel": _SWIGLU}},
        },
        nonlinear=("spread",),
        # per layer: three gates of the memory, the scan, and the write maps of two parts
        other_flops=2 * (3 * 2 * 16 + 4 * 6 + 2 * 2 * 3 * 16),
    ),
]

ALL = [case for cases in CASES.values() for case in cases] + TOYS + MODELS
