"""Equal budgets, against exhaustive search and against counts that were worked out by hand."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from models import ModelConfig, UserError, meta_model, model_config
from models.__main__ import main
from models.match import BUDGETS, CONTROLS, Match, control, match
from models.parsing import to_dict
from models.types import Cost, count_params
from tests.runs import ROOT, write_config


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
        ({"to": 1000}, "params of 1,000 is out of reach: channel.hidden=1 already gives"),
    ],
)
def test_match_says_what_is_wrong(changes: dict[str, Any], said: str):
    given = {"seq_len": 16, "target": 100, **changes}
    given = {"to": small(hidden=given.pop("target")), **given}
    with pytest.raises(UserError, match=said):
        match(small(hidden=7), **given)


# -- a graph memory and its dense rivals: 16 blocks, width 768, 128 slots, navigation width 128 (arXiv:2604.23862)

d, F, V_NAV, LAYERS = 768, 128, 128, 16
GMT_PARAMS = 77_183_232 + LAYERS * (
    F * d + F * F + 2 * d * V_NAV + 4 * d + 2
)  # everything but the channels, and the cells
PUBLISHED = 2 * (2 * d * F + d * V_NAV + V_NAV * F + F * F) + 2 * F * d  # similarity, two mixtures, Q, scores, edges
DIFFERENCE = PUBLISHED - 2 * F * d  # one product with the difference of two distributions
FUSED = DIFFERENCE - 2 * F * V_NAV  # scores through one precomputed matrix


def test_equal_parameters_with_a_graph_memory():
    assert GMT_PARAMS == 82_213_152
    found = match(dense(4), to=GMT_PARAMS)
    assert (found.value, found.achieved, found.residual) == (205, 82_221_312, 8_160)
    assert str(found) == "82,221,312, target 82,213,152: +8,160 (+0.010%)"


@pytest.mark.parametrize(
    ("flops", "mega", "width"), [(PUBLISHED, 0.852, 277), (DIFFERENCE, 0.655, 213), (FUSED, 0.623, 203)]
)
def test_equal_flops_with_a_graph_memory(flops: int, mega: float, width: int):
    """The cell as published, with one product for both mixtures, and fused; everything around the channels is common."""
    assert round(flops / 1e6, 3) == mega
    around = meta_model(dense(4)).cost(1024).flops_per_token - LAYERS * 2 * 2 * d * 4
    found = match(dense(4), to=around + LAYERS * flops, on="flops")
    assert found.value == width
    assert abs(found.residual) <= LAYERS * 2 * d  # half a step
    if flops == PUBLISHED:
        assert meta_model(found.config).cost(1024).params == 83_990_784


RIVALS = {  # of the graph memory: the value found, and the residual as a share of the whole model
    ("dense", "params"): (205, 1e-4),
    ("low_rank", "params"): (41, 1e-4),
    ("block_dense", "params"): (64, 2e-3),
    ("block_shuffle", "params"): (496, 1e-3),
    ("dense", "flops"): (213, 1e-3),
    ("low_rank", "flops"): (43, 1e-3),
    ("block_dense", "flops"): (68, 1e-3),
    ("block_shuffle", "flops"): (512, 1e-3),
}


@pytest.mark.parametrize(("name", "on"), RIVALS)
def test_controls_of_a_graph_memory(name: str, on: str):
    """Of the channel itself, which takes the difference of two distributions before its last product."""
    raw = to_dict(dense(4))
    raw["blocks"]["block"]["channel"] = {"kind": "gmt", "slots": F, "width": V_NAV}
    config = model_config(raw)
    cost = meta_model(config).cost(1024)
    around = meta_model(dense(4)).cost(1024).flops_per_token - LAYERS * 2 * 2 * d * 4
    assert (cost.params, cost.flops_per_token) == (GMT_PARAMS, around + LAYERS * DIFFERENCE)
    found = control(config, name, on)
    value, share = RIVALS[name, on]
    assert found.value == value
    assert abs(found.relative) < share


# -- fields that are bounded


def ffn(**options: Any) -> ModelConfig:
    channel = {"kind": "structured_ffn", "hidden": 24, **options}
    return model_config({"d_model": 12, "n_layers": 2, "vocab_size": 11, "blocks": {"a": {"channel": channel}}})


@pytest.mark.parametrize("on", ["params", "flops"])
def test_a_bounded_field_is_searched_to_its_bound(on: str):
    """The rank of a 24 x 12 matrix is 12 at most, which doubling passes by."""
    sizes = [getattr(meta_model(ffn(rank=r)).cost(8), BUDGETS[on]) for r in range(1, 13)]
    step = sizes[1] - sizes[0]
    for rank, size in enumerate(sizes, 1):
        for target, value in ((size, rank), (size + step // 3, rank), (size - step // 3, rank)):
            if sizes[0] <= target <= sizes[-1]:
                found = match(ffn(), to=target, on=on, vary="channel.rank", seq_len=8)
                assert (found.value, found.residual) == (value, size - target)
    with pytest.raises(UserError) as error:
        match(ffn(), to=sizes[-1] + 1, on=on, vary="channel.rank", seq_len=8)
    assert f"channel.rank=12 gives {sizes[-1]:,.0f}, and channel.rank=13: layer 0, channel: rank=13 is above" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("form", "changes", "said"),
    [
        ("block_shuffle", {}, "channel.hidden=1: .*blocks=4 does not divide .* of 1; nearest: blocks=1"),
        ("block_shuffle", {"vary": "channel.blocks"}, "params falls as channel.blocks grows: vary another field"),
        (
            "block_dense",
            {"vary": "channel.rank"},
            "channel.rank=1: .*blocks=4 does not divide rank=1; nearest: blocks=1",
        ),
    ],
)
def test_blocks_must_divide(form: str, changes: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        match(ffn(form=form), to=1500, **changes)


@pytest.mark.parametrize(("form", "vary", "to"), [("block_shuffle", "hidden", 700), ("block_dense", "rank", 900)])
def test_multiples_of_the_blocks(form: str, vary: str, to: int):
    found = match(ffn(form=form, rank=4), to=to, vary=f"channel.{vary}", multiple_of=4)
    sizes = {n: meta_model(ffn(form=form, **{"rank": 4, vary: n})).cost(8).params for n in range(4, 44, 4)}
    best = min(sizes, key=lambda n: (abs(sizes[n] - to), n))
    assert (found.value, found.achieved) == (best, sizes[best])
    assert 4 < best < 40


# -- controls


@pytest.mark.parametrize("on", ["params", "flops"])
@pytest.mark.parametrize("name", CONTROLS)
def test_controls(name: str, on: str):
    """Within half a step of the target, with everything but the channels as it was."""
    config = dense(277)
    found = control(config, name, on)
    channel, vary, multiple_of = CONTROLS[name]
    (block,) = found.config.blocks.values()
    assert block.channel.kind == channel.get("kind", "gelu")
    assert getattr(block.channel, vary) == found.value
    assert found.value % multiple_of == 0
    assert dataclasses.replace(found.config, blocks=config.blocks) == config
    assert block.mixer == config.blocks["block"].mixer
    assert found.target == getattr(meta_model(config).cost(1024), BUDGETS[on])
    for other in (found.value - multiple_of, found.value + multiple_of):
        raw = to_dict(found.config)
        raw["blocks"]["block"]["channel"][vary] = other
        size = getattr(meta_model(model_config(raw)).cost(1024), BUDGETS[on])
        assert abs(size - found.target) > abs(found.residual)
    if name == "dense":
        assert found.config == config


def test_controls_of_a_model_with_its_first_layer_dense():
    """Layers with a kind of their own stay; amendments of keys of what is replaced go; a block without a channel has none."""
    raw = to_dict(small(hidden=7))
    at = {
        0: {"channel": {"kind": "gelu", "hidden": 5}},
        2: {"channel": {"hidden": 9}, "mixer": None},
        1: {"channel": None},
    }
    config = model_config({**raw, "at": at})
    found = control(config, "low_rank", to=9000, activation="swiglu", seq_len=16).config
    kinds = [block.channel.kind if block.channel else None for block in found.layers()]
    assert kinds == ["gelu", None, "structured_ffn", None]
    assert found.layers()[2].mixer is None
    assert found.blocks["a"].channel.activation == "swiglu"
    bare = model_config({**raw, "blocks": {"a": {"mixer": ATTENTION}}, "pattern": []})
    with pytest.raises(UserError, match="no block of this model has a channel to replace"):
        control(bare, "dense")
    with pytest.raises(UserError, match=r"unknown control 'low-rank'; did you mean 'low_rank'\?"):
        control(config, "low-rank")


# -- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = str(write_config(tmp_path, to_dict(ffn(rank=3))))
    two = str(write_config(tmp_path, to_dict(ffn(rank=7)), "two"))
    assert main(["match", one, "--to", two, "--vary", "channel.rank", "--seq-len", "8"]) == 0
    assert capsys.readouterr().out == "channel.rank=7\nparams 1,176, target 1,176: +0 (+0.000%)\n"
    flops = meta_model(ffn(rank=7)).cost(8).flops_per_token
    assert main(["match", one, "--to", f"{flops:,.0f}", "--on", "flops", "--vary", "channel.rank"]) == 0
    assert capsys.readouterr().out.startswith("channel.rank=7\nflops ")
    assert main(["match", two, "--controls"]) == 0
    said = capsys.readouterr().out
    for line in (
        "equal params at T=32",
        "  channel: {hidden: 21, kind: gelu}",
        "  channel: {kind: structured_ffn, form: low_rank, rank: 4}",
        "equal flops at T=32",
    ):
        assert line in said.splitlines(), said
    assert "hidden: 24" not in said
    assert main(["match", two, "--controls", "--on", "flops", "--activation", "swiglu"]) == 0
    assert "params" not in capsys.readouterr().out
    for words, why in (
        ([one, "--to", "nowhere.yaml"], "no file 'nowhere.yaml'"),
        ([one, "--to", "1e12", "--vary", "channel.rank"], "out of reach"),
        ([one, "--to", "5000", "--vary", "channel.rnk"], "did you mean 'channel.rank'?"),
    ):
        assert main(["match", *words]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith("error: ")
        assert why in err


def test_the_help_is_true(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["match", "--help"])
    examples = [line.strip() for line in capsys.readouterr().out.partition("examples:")[2].splitlines() if line]
    assert len(examples) == 3
    monkeypatch.chdir(ROOT)
    for example in examples:
        assert main(example.removeprefix("python -m models ").split()) == 0
