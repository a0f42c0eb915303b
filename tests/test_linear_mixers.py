"""Linear-time mixers beside the contracts: each kind against its paper written out token by token, its published sizes and
initialisation, long sequences, states in training and decode, configs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import models
from eval.decoding import Decoder, run_decoder
from kernels import dispatch
from models import LM, Batch, UserError, meta_model, model_config, zoo
from models import state as states
from models.config import tiny
from models.match import match
from models.mixers.linear import LinearMixer, LinearState
from models.mixers.pieces import Rows, rows_of
from models.mixers.rules import GatedDelta, Heads, Retention, StateSpace
from models.types import Ctx, Site, count_params
from tests.cases import CASES
from tests.linear_naive import by_the_paper
from tests.tools import (
    Case,
    assert_close,
    assert_same_gradients,
    gradients,
    in_pieces,
    random_batch,
    rel_err,
    same_bytes,
    segments,
)

KINDS = [kind for kind in zoo.MIXERS if issubclass(zoo.part_class("mixer", kind), LinearMixer)]
LINEAR = [case for kind in KINDS for case in CASES["mixer", kind]]
each_case = pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
each_kind = pytest.mark.parametrize("kind", KINDS)


def mixer_of(case: Case, **changes: Any) -> LinearMixer:
    part = case.build(**changes).layers[0].mixer
    assert isinstance(part, LinearMixer)
    return part


def test_there_are_six_kinds():
    assert {"linear_attention", "retnet", "gla", "mamba2", "delta", "gated_delta"} <= set(KINDS)


# -- the papers, one token at a time


@each_case
@torch.no_grad()
def test_equals_the_paper(case: Case):
    part, batch = mixer_of(case), random_batch(2, 7)
    ctx, _, _ = case.build().prepare(batch, None)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    y, state, _ = part(x, ctx)
    assert state is None
    dtype = torch.float32 if getattr(part.cfg, "rope_theta", None) else torch.float64  # rotations are tabulated in fp32
    for row in range(2):
        assert_close(y[row], by_the_paper(part, part.norm(x[row])), "forms", dtype)


def test_retention_in_parallel_form():
    """(Q K^T * D) V with D_nm = gamma^(n-m) (arXiv:2307.08621, eq. 5) for the first head, without rotation."""
    rule = Retention(Heads(2, 2, 4, 6), rope_theta=None)
    q, k, v = (torch.randn(1, 9, 2, n, dtype=torch.float64) for n in (4, 4, 6))
    o, _ = rule(q, k, v, v[..., 0, :0], torch.arange(9)[None])
    n = torch.arange(9, dtype=torch.float64)
    for head, gamma in enumerate((1 - 1 / 32, 1 - 1 / 64)):
        decay = (gamma ** (n[:, None] - n)).tril()
        assert_close(o[0, :, head], (q[0, :, head] @ k[0, :, head].T * decay) @ v[0, :, head] / 2, "forms")


def test_a_norm_after_the_read_cancels_the_normalizer():
    """Linear attention's sum of weights is one positive number per token and head, and RMSNorm does not see its factor."""
    plain, divided = (
        Case("", "mixer", {"kind": "linear_attention", "heads": 2, "normalize": n}).build(norm_eps=1e-12)
        for n in (False, True)
    )
    divided.load_state_dict(plain.state_dict())
    batch = random_batch(2, 9, targets=False)
    assert rel_err(divided(batch).logits, plain(batch).logits) < 1e-6


# -- published sizes and initialisation


def test_mamba2_has_the_published_size():
    """mamba2-130m as released: 24 layers of width 768, a vocabulary of 50288, tied."""
    raw = {"d_model": 768, "n_layers": 24, "vocab_size": 50288, "blocks": {"m": {"mixer": {"kind": "mamba2"}}}}
    assert count_params(meta_model(model_config(raw))) == 128_989_632


def matrices(kind: str, d_model: int = 1024, **options: Any) -> float:
    """Weights of the projections of one mixer, in units of d_model^2, gate logits left out."""
    part = zoo.build("mixer", zoo.parse("mixer", {"kind": kind, **options}, kind), Site(d_model))
    assert isinstance(part, LinearMixer)
    return (sum(part.widths[:2]) + part.out.weight.shape[1]) / d_model


def test_published_widths():
    """q, k, v, gate and output of each kind's defaults, against the sums in the papers."""
    with torch.device("meta"):
        assert matrices("linear_attention") == matrices("delta") == 4
        assert matrices("retnet") == 8  # arXiv:2307.08621, section 3.1: 8 d^2
        assert matrices("gla") == 4  # arXiv:2312.06635, section 4.4: 4 d^2, as attention
        assert matrices("gated_delta", 1536) == 6  # arXiv:2412.06464, released configs
        assert matrices("mamba2") == pytest.approx(6, abs=0.3)  # arXiv:2405.21060: 6 d^2, and B and C
        assert matrices("gated_delta", heads=4, head_dim=256, expand_v=1.0) == 5


@torch.no_grad()
def test_initial_decays():
    """A in the published range, step sizes log-uniform in [1e-3, 1e-1], on average in its middle."""
    heads = Heads(4096, 4096, 1, 1)
    for rule, low, high in ((GatedDelta(heads), 0.0, 16.0), (StateSpace(heads), 1.0, 16.0)):
        rule.reset_parameters(torch.Generator().manual_seed(0), 0.02)
        a, dt = rule.A_log.exp(), F.softplus(rule.dt_bias)
        assert low <= a.min()
        assert a.max() <= high
        assert float(a.mean()) == pytest.approx((low + high) / 2, rel=0.05)
        assert dt.min() >= 1e-3 * 0.999
        assert dt.max() <= 1e-1 * 1.001
        assert float(dt.log().mean()) == pytest.approx(math.log(1e-2), rel=0.02)
        assert {m.optimizer for m in rule.meta().values()} == {"adamw"}
        assert not any(m.decay for m in rule.meta().values())


@each_case
@torch.no_grad()
def test_initialisation_and_splits(case: Case):
    model = models.build(case.config(d_model=64, n_layers=8), seed=3)
    part, meta = model.layers[0].mixer, model.meta()
    assert isinstance(part, LinearMixer)
    assert float(part.project.weight.std()) == pytest.approx(0.02, rel=0.1)
    assert float(part.out.weight.std()) == pytest.approx(0.02 / 4, rel=0.1)
    if part.conv is not None:
        bound = case.part.get("conv", 4) ** -0.5
        assert 0.8 * bound < part.conv.weight.abs().max() <= bound
        assert meta["layers.0.mixer.conv.weight"].optimizer == "adamw"
    splits = meta["layers.0.mixer.project.weight"].splits
    assert splits[:3] == part.heads.widths
    assert len(splits) == 3 + part.cfg.gate + len(part.rule.logits)


# -- many chunks


@each_case
@torch.no_grad()
def test_long_sequences(case: Case):
    """Longer than any chunk: token by token, in pieces, packed and padded are one function."""
    model, T = case.build(n_layers=1), 150
    tokens = random_batch(2, T).tokens
    whole, _, _ = model.features(Batch(tokens))
    pieces, state, _ = in_pieces(model, tokens, [64, 1, 63, 22], T)
    steps, once, _ = in_pieces(model, tokens, [1] * T, T)
    assert_close(pieces, whole, "forms")
    assert_close(steps, whole, "forms")
    assert_close(state, once, "forms")
    packed, _, _ = model.features(Batch(tokens, cu_seqlens=segments([[1, 64, 0, 85], [65, 66, 19]], T, pad_to=10)))
    for row, part in ((0, slice(1, 65)), (0, slice(65, 150)), (1, slice(65, 131))):
        assert_close(packed[row : row + 1, part], model.features(Batch(tokens[row : row + 1, part]))[0], "forms")
    padded = F.pad(tokens, (40, 0))
    valid = F.pad(torch.ones_like(tokens, dtype=torch.bool), (40, 0))
    valid[1, 70:80] = False
    out, end, _ = in_pieces(model, padded, [70, 120], T + 40, valid=valid)
    assert_close(out[0, 40:], whole[0], "forms")
    short = model.features(Batch(padded[1:][valid[1:]][None]))[0]
    assert_close(out[1][valid[1]], short[0], "forms")
    assert end.seen.tolist() == [150, 140]


# -- rows


def context(valid: Tensor | None, cu_seqlens: Tensor | None = None) -> Ctx:
    B, T = (1, 4) if valid is None else valid.shape
    tokens = torch.zeros(B, T, dtype=torch.int64)
    return Ctx(tokens, tokens, cu_seqlens, valid, torch.zeros(()), {}, {})


def test_rows_put_padding_last():
    valid = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    rows = rows_of(context(valid), None)
    assert rows.order is not None
    assert rows.cu_seqlens is not None
    assert rows.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert rows.order.tolist() == [1, 3, 8, 9, 10, 0, 2, 4, 5, 6, 7, 11]
    x = torch.randn(3, 4, 2, 5)
    assert rows.pack(x).shape == (1, 12, 2, 5)
    assert torch.equal(rows.unpack(rows.pack(x), 3), x)
    assert torch.equal(rows.pack(x)[0, :5], x[valid])


def test_rows_stay_where_nothing_is_masked():
    whole = torch.ones(2, 4, dtype=torch.bool)
    assert rows_of(context(None), None) == rows_of(context(whole), None) == Rows()
    cu_seqlens = torch.tensor([0, 2, 4])
    assert rows_of(context(None, cu_seqlens), None) == Rows(cu_seqlens)
    one = rows_of(context(torch.tensor([[True], [False]])), ())
    assert one.index is not None
    assert one.index.tolist() == [[0], [-1]]


# -- states


@each_kind
def test_gradients_flow_through_the_state(kind: str):
    """A sequence cut in two, the state passed with its graph: the gradients of the whole, also where the rest is one token."""
    case = CASES["mixer", kind][0]
    tokens = random_batch(2, 9).tokens
    for sizes in ([5, 4], [8, 1]):
        model, weight = case.build(), torch.randn(2, sizes[1], 16, dtype=torch.float64)
        (model.features(Batch(tokens))[0][:, sizes[0] :] * weight).sum().backward()
        whole = gradients(model)
        out, _, _ = in_pieces(model, tokens, sizes, 9)
        (out[:, sizes[0] :] * weight).sum().backward()
        assert_same_gradients(gradients(model), whole)


@each_kind
def test_a_donated_state_is_written_in_place(kind: str):
    model = CASES["mixer", kind][-1].build(torch.float32).eval()
    tokens = random_batch(2, 4).tokens
    with torch.no_grad():
        _, state, _ = in_pieces(model, tokens[:, :3], [3], 4)
        before = states.clone(state)
        _, kept, _ = model.features(Batch(tokens[:, 3:]), state)
        assert same_bytes(state, before)
        _, reused, _ = model.features(Batch(tokens[:, 3:]), state, donate=True)
    assert reused is not None
    assert same_bytes(reused, kept)
    old, new = state.layers[0]["mixer"], reused.layers[0]["mixer"]
    assert isinstance(new, LinearState)
    assert new.memory.data_ptr() == old.memory.data_ptr()
    if torch.is_tensor(new.conv) and new.conv.numel():
        assert new.conv.data_ptr() == old.conv.data_ptr()
    with torch.enable_grad():  # what autograd may still need is not overwritten
        _, recorded, _ = model.features(Batch(tokens[:, 3:]), kept, donate=True)
    assert recorded is not None
    assert kept is not None
    assert recorded.layers[0]["mixer"].memory.data_ptr() != kept.layers[0]["mixer"].memory.data_ptr()


@each_kind
@torch.no_grad()
def test_which_ops_run(kind: str):
    """Many tokens go through the chunked op, one through the recurrent step; never the other way round."""
    model = CASES["mixer", kind][0].build(torch.float32).eval()
    scans = {"gated_delta_rule", "decay_linear_attention", "gla"}

    def ran(T: int) -> set[str]:
        before = dispatch.counts.copy()
        model.features(random_batch(1, T, targets=False), model.init_state(1, T))
        return {op for op, _ in dispatch.counts - before} & (scans | {"recurrent_step"})

    assert ran(1) == {"recurrent_step"}
    assert len(ran(2) & scans) == len(ran(2)) == 1


@each_kind
def test_the_memory_stays_wide(kind: str):
    """bf16 activations, an fp32 memory; fp64 throughout where the model is fp64."""
    model = CASES["mixer", kind][0].build(torch.bfloat16).eval()
    _, state, _ = in_pieces(model, random_batch(2, 6).tokens, [4, 1, 1], 6)
    mixer = state.layers[0]["mixer"]
    assert mixer.memory.dtype == torch.float32
    assert not torch.is_tensor(mixer.conv) or mixer.conv.dtype == torch.bfloat16
    assert model.double().init_state(1, 1).layers[0]["mixer"].memory.dtype == torch.float64


@torch.no_grad()
def test_a_long_context_costs_nothing_at_decode():
    """State bytes and the work of one more token are the same after 64 tokens and after 16384; the text goes on as the whole
    forward says."""
    model = recurrent_model().eval()
    assert model.cost(1024).state_bytes == model.cost(1 << 20).state_bytes
    work, size = [], []
    for T in (64, 16384):
        prompt = random_batch(1, T, targets=False).tokens
        decoder = Decoder(model, [prompt[0].tolist()], 4)
        with FlopCounterMode(display=False) as counter:
            made = run_decoder(decoder, 4)[0]
        work.append(counter.get_total_flops())
        size.append(states.nbytes(decoder.state))
        tokens = torch.cat((prompt, torch.tensor([made])), dim=1)
        expected = model(Batch(tokens)).logits[0, T - 1 : -1].argmax(-1)
        assert made == expected.tolist()
    assert work[0] == work[1]
    assert size[0] == size[1] == model.cost(64).state_bytes


def recurrent_model() -> LM:
    blocks = {
        "a": {"mixer": {"kind": "gated_delta", "heads": 2}, "channel": {"kind": "swiglu", "hidden": 16}},
        "b": {"mixer": {"kind": "mamba2", "head_dim": 8, "d_state": 8}},
    }
    return Case("", model={"blocks": blocks, "pattern": ["a", "b"]}).build(torch.float32)


# -- configs


@each_case
def test_tiny(case: Case):
    """Shrunk to width 64: it builds, runs, and keeps its options."""
    cfg = tiny(case.config(d_model=960, n_layers=1))
    model = models.build(cfg)
    assert model(random_batch(1, 5)).losses["lm"].isfinite()
    part = model.layers[0].mixer
    assert isinstance(part, LinearMixer)
    full = mixer_of(case)
    assert (part.heads.value_heads > part.heads.heads) == (full.heads.value_heads > full.heads.heads)
    for field in ("conv", "gate", "output_norm", "normalize", "allow_neg_eigval", "rope_theta", "expand_v"):
        assert getattr(part.cfg, field, None) == getattr(full.cfg, field, None)


@each_kind
def test_budgets_can_be_matched(kind: str):
    """A state as large as that of attention at 512 tokens, by the width of the memory."""
    vary = "d_state" if kind == "mamba2" else "head_dim"
    base = {"d_model": 64, "n_layers": 2, "vocab_size": 50}
    ours = model_config({**base, "blocks": {"b": {"mixer": {"kind": kind, "head_dim": 16}}}})
    theirs = model_config({**base, "blocks": {"b": {"mixer": {"kind": "attention", "heads": 4}}}})
    unit = 1 if kind == "mamba2" else 2
    found = match(ours, theirs, on="state", vary=f"mixer.{vary}", seq_len=512, multiple_of=unit)
    assert abs(found.relative) < 0.1
    assert meta_model(found.config).cost(512).state_bytes == found.achieved


BAD = {
    "conv must not be negative": {"kind": "delta", "conv": -1},
    "there is no convolution": {"kind": "retnet", "conv_bias": True},
    "heads must be at least 1": {"kind": "gla", "heads": 0},
    "heads=3 does not divide d_model=16": {"kind": "retnet", "heads": 3},
    "heads=5 does not divide 0.75 d_model=12": {"kind": "gated_delta", "heads": 5},
    "heads=2 does not divide value_heads=3": {"kind": "gated_delta", "heads": 2, "value_heads": 3},
    "expand_v=1.3 of head_dim=8 is no whole width": {"kind": "delta", "heads": 2, "expand_v": 1.3},
    "expand_v must be positive": {"kind": "delta", "heads": 2, "expand_v": 0},
    "head_dim=5 must be even": {"kind": "retnet", "heads": 2, "head_dim": 5},
    "unknown feature_map 'exp'": {"kind": "linear_attention", "feature_map": "exp"},
    "weights of feature_map=identity may sum to zero": {
        "kind": "linear_attention",
        "feature_map": "identity",
        "normalize": True,
    },
    "rank must be at least 1": {"kind": "gla", "rank": 0},
    "d_state must be at least 1": {"kind": "mamba2", "d_state": 0},
    "expand must be positive": {"kind": "mamba2", "expand": 0},
    "groups=3 times head_dim=8 does not divide the inner width 32": {"kind": "mamba2", "groups": 3, "head_dim": 8},
    "unknown key 'model.blocks.only.mixer.dstate'": {"kind": "mamba2", "dstate": 3},
}


@pytest.mark.parametrize("why", BAD)
def test_bad_configs_are_refused(why: str):
    with pytest.raises(UserError) as caught:
        Case("", "mixer", BAD[why]).build()
    assert why in str(caught.value)
