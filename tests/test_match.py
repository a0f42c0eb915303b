"""Equal budgets, against exhaustive search and against counts that were worked out by hand."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from models import ModelConfig, UserError, meta_model, model_config
from models.match import BUDGETS, Match, match
from models.parsing import to_dict
from models.types import Cost, count_params


def dense(width: int) -> ModelConfig:
    """The GPT-2-like baseline: 16 blocks, width 768, bias-free linear layers, LayerNorm with weight and bias, tied."""
    return model_config(
        {
            "d_model": 768,
            "n_layers": 16,
            "vocab_size": 50257,
            "max_seq_len": 1024,
            "learned_positions": True,
            "norm": "layernorm",
            "norm_bias": True,
            "blocks": {
                "block": {
                    "mixer": {"kind": "attention", "heads": 12, "rope_theta": None},
                    "channel": {"kind": "gelu", "hidden": width},
                }
            },
        }
    )


ATTENTION = {"kind": "attention", "heads": 2}


def small(**channel: Any) -> ModelConfig:
    return model_config(
        {
            "d_model": 12,
            "n_layers": 4,
            "vocab_size": 11,
            "blocks": {
                "a": {"mixer": {**ATTENTION, "head_dim": 4}, "channel": {"kind": "swiglu", **channel}},
                "b": {"mixer": {**ATTENTION, "window": 8}, "channel": {"kind": "relu2"}},
                "c": {"mixer": {"kind": "tests.toys:ToyNest", "inner": {"kind": "tests.toys:ToyEMA"}}},
            },
            "pattern": ["a", "b", "a", "c"],
        }
    )


@pytest.mark.parametrize(
    ("width", "params"),
    [(1024, 102_349_056), (1050, 102_988_032), (205, 82_221_312), (277, 83_990_784), (3072, 152_680_704)],
)
def test_dense_parameter_counts(width: int, params: int):
    model = meta_model(dense(width))
    V, L, d, n = 50257, 1024, 768, 16
    assert params == V * d + L * d + 2 * d + n * (4 * d * d + 4 * d + 2 * d * width)
    assert model.cost(1024).params == count_params(model) == params


@pytest.mark.parametrize(("d", "ratio", "hidden"), [(1024, 3, 2048), (1024, 2, 1536), (2048, 4, 5632)])
def test_swiglu_width_rule(d: int, ratio: float, hidden: int):
    block = {"channel": {"kind": "swiglu", "ratio": ratio}}
    model = meta_model(model_config({"d_model": d, "n_layers": 1, "vocab_size": 5, "blocks": {"a": block}}))
    [(_, _, channel)] = model.parts()
    assert channel.hidden == hidden
    assert count_params(channel) == d + 3 * d * hidden


@pytest.mark.parametrize("width", [205, 1050])
def test_match_finds_the_width_of_the_dense_baseline(width: int):
    found = match(dense(4), to=dense(width), on="params", vary="channel.hidden")
    assert (found.value, found.residual, found.relative) == (width, 0, 0)
    assert found.config == dense(width)


@pytest.mark.parametrize("on", BUDGETS)
@pytest.mark.parametrize(
    ("vary", "multiple_of"),
    [
        ("channel.hidden", 1),
        ("channel.hidden", 3),
        ("blocks.b.channel.hidden", 1),
        ("blocks.a.mixer.heads", 1),
        ("mixer.inner.width", 2),
        ("n_layers", 4),
    ],
)
def test_match_is_the_best_of_all(on: str, vary: str, multiple_of: int):
    def at(value: int) -> Match:
        return match(small(hidden=7), to=target(value), on=on, vary=vary, seq_len=10, multiple_of=multiple_of)

    def target(extra: int) -> ModelConfig:
        return dataclasses.replace(small(hidden=14 + extra), n_layers=8 if on == "state" else 4)

    if on == "state" and "hidden" in vary:
        with pytest.raises(UserError, match="state does not grow with"):
            at(0)
        return
    for extra in (0, 5):
        found = at(extra)
        goal = getattr(meta_model(target(extra)).cost(10), BUDGETS[on])
        best: tuple[int, float] = (0, float("-inf"))
        for value in range(multiple_of, 2 * found.value + 2 * multiple_of, multiple_of):
            size = getattr(cost_of(vary, value), BUDGETS[on])
            if abs(size - goal) < abs(best[1] - goal):
                best = (value, size)
        assert (found.value, found.achieved) == best
        assert found.residual == found.achieved - found.target == best[1] - goal
        assert getattr(meta_model(found.config).cost(10), BUDGETS[on]) == found.achieved


@functools.cache
def cost_of(vary: str, value: int) -> Cost:
    return meta_model(replaced(vary, value)).cost(10)


def replaced(vary: str, value: int) -> ModelConfig:
    """``small(hidden=7)`` with a field set, by hand."""
    raw = to_dict(small(hidden=7))
    if "." not in vary:
        return model_config({**raw, vary: value})
    full = vary.split(".")
    names = raw["blocks"] if full[0] != "blocks" else [full[1]]
    keys = full if full[0] != "blocks" else full[2:]
    for name in names:
        at = raw["blocks"][name]
        for key in keys[:-1]:
            at = (at or {}).get(key)
        if at is not None and keys[-1] in at:
            at[keys[-1]] = value
    return model_config(raw)


def test_match_on_state_uses_the_length():
    """A window as long as the context holds as much as full attention."""
    attention = {"kind": "attention", "heads": 2, "head_dim": 4}
    raw = {"d_model": 8, "n_layers": 2, "vocab_size": 5}
    full = model_config({**raw, "blocks": {"a": {"mixer": attention}}})
    window = model_config({**raw, "blocks": {"a": {"mixer": {**attention, "window": 3}}}})
    assert match(window, to=full, on="state", vary="mixer.window", seq_len=100).value == 100
    half = model_config({**raw, "blocks": {"a": {"mixer": {**attention, "window": 50}}}})
    bf16 = match(window, to=half, on="state", vary="mixer.window", seq_len=100, dtype=torch.bfloat16)
    assert (bf16.value, bf16.residual) == (50, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vary": "channel.hiden"}, r"no integer field 'channel.hiden' to vary; did you mean 'channel.hidden'\?"),
        ({"vary": "blocks.a.chanel.hidden"}, r"did you mean 'blocks.a.channel.hidden'\?"),
        ({"vary": "channel.ratio"}, "no integer field 'channel.ratio'"),
        ({"on": "parms"}, r"unknown budget 'parms'; did you mean 'params'\?"),
        ({"multiple_of": 0}, "multiple_of must be at least 1"),
        ({"vary": "n_layers"}, "n_layers=1: pattern of 4 blocks does not divide n_layers=1; nearest: 4"),
        ({"vary": "mixer.window", "on": "flops"}, "out of reach: mixer.window=.* gives"),
        ({"vary": "d_model", "multiple_of": 64, "target": 7}, "out of reach: d_model=64 already gives"),
    ],
)
def test_match_says_what_is_wrong(changes: dict[str, Any], said: str):
    given = {"seq_len": 16, "target": 100, **changes}
    target = small(hidden=given.pop("target"))
    with pytest.raises(UserError, match=said):
        match(small(hidden=7), to=target, **given)
