"""Mamba beside the contracts: the paper written out token by token, transformers' mixer, initialisation, states, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from models import LM, Batch, UserError, meta_model, model_config, zoo
from models.config import tiny
from models.match import match
from models.mixers.mamba import Mamba, MambaConfig, MambaState
from models.types import Site
from tests.cases import CASES
from tests.linear_naive import by_the_paper
from tests.tools import Case, assert_close, in_pieces, random_batch, same_bytes

pytestmark = pytest.mark.usefixtures("poison")


def mixer_of(model: LM) -> Mamba:
    part = model.layers[0].mixer  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(part, Mamba)
    return part


def alone(part: Mamba, x: Tensor, model: LM) -> Tensor:
    ctx, _, _ = model.prepare(Batch(torch.ones(x.shape[:2], dtype=torch.int64)), None)
    return part(x, ctx)[0]


# -- the same function elsewhere


@pytest.mark.parametrize("case", CASES["mixer", "mamba"], ids=lambda case: case.name)
@torch.no_grad()
def test_equals_the_paper(case: Case):
    model = case.build()
    part, x = mixer_of(model), torch.randn(2, 7, 16, dtype=torch.float64)
    y = alone(part, x, model)
    for row in range(2):
        assert_close(y[row], by_the_paper(part, part.norm(x[row])), "forms")


HF_NAMES = {
    "in_proj.weight": "project.weight",
    "conv1d.weight": "conv.weight",
    "conv1d.bias": "conv.bias",
    "x_proj.weight": "select.weight",
    "dt_proj.weight": "dt.weight",
    "dt_proj.bias": "dt.bias",
    "A_log": "ssm.A_log",
    "D": "ssm.D",
    "out_proj.weight": "out.weight",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_equals_transformers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """The same weights in its MambaMixer, whose plain path casts to fp32 here and there: in fp64 that is lifted."""
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    if dtype == torch.float64:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = modeling.MambaConfig(hidden_size=32, state_size=6, num_hidden_layers=1, vocab_size=11)
    other = modeling.MambaMixer(config, layer_idx=0).to(dtype).eval()
    model = Case("", "mixer", {"kind": "mamba", "d_state": 6}).build(dtype, n_layers=1, d_model=32)
    ours = mixer_of(model)
    found = {name: p for name, p in ours.state_dict().items() if name != "norm.weight"}
    theirs = {name: found[mine].reshape(other.state_dict()[name].shape) for name, mine in HF_NAMES.items()}
    other.load_state_dict(theirs)
    assert len(theirs) == len(found)
    x = torch.randn(2, 45, 32, dtype=dtype)
    want = other(ours.norm(x))
    limit = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(alone(ours, x, model), want, rtol=limit, atol=limit * float(want.abs().max()))


# -- initialisation, meta, sizes


@torch.no_grad()
def test_initialisation():
    """Step sizes log-uniform in [1e-3, 1e-1], A = -(1, ..., N), D = 1; the map to step sizes within 1 / sqrt(rank)."""
    part = zoo.build("mixer", MambaConfig(), Site(512))
    part.reset_parameters(torch.Generator().manual_seed(0), 4)
    assert isinstance(part, Mamba)
    dt = F.softplus(part.dt.bias)
    assert 1e-3 * 0.999 <= float(dt.min()) < 1.3e-3
    assert 0.08 < float(dt.max()) <= 0.1 * 1.001
    assert float(dt.log().mean()) == pytest.approx(-4.6, abs=0.15)
    torch.testing.assert_close(part.ssm.A_log.exp(), torch.arange(1.0, 17).expand(1024, -1))
    assert (part.ssm.D == 1).all()
    assert part.dt.weight.shape == (1024, 32)
    assert 0.99 * 32**-0.5 < float(part.dt.weight.abs().max()) <= 32**-0.5
    assert float(part.project.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(part.out.weight.std()) == pytest.approx(0.02 / 8**0.5, rel=0.02)


def test_rates_do_not_decay():
    meta = mixer_of(Case("", "mixer", {"kind": "mamba"}).build()).meta()
    assert {name for name, m in meta.items() if m.decay} == {
        "project.weight", "select.weight", "dt.weight", "out.weight", "conv.weight"
    }  # fmt: skip
    assert {name for name, m in meta.items() if m.optimizer == "auto"} == {
        "project.weight", "select.weight", "dt.weight", "out.weight"
    }  # fmt: skip
    assert meta["project.weight"].splits == (32, 32)
    assert meta["select.weight"].splits == (1, 16, 16)


def test_ranks_are_rounded_up():
    for d_model, rank in ((16, 1), (17, 2), (768, 48), (1000, 63)):
        part = zoo.build("mixer", MambaConfig(), Site(d_model))
        assert isinstance(part, Mamba)
        assert part.dt.in_features == rank


def test_sizes_are_solved_and_shrunk():
    raw = {"d_model": 64, "n_layers": 2, "vocab_size": 97, "blocks": {"m": {"mixer": {"kind": "mamba"}}}}
    target = meta_model(model_config(raw)).cost(8).params
    narrow = model_config({**raw, "blocks": {"m": {"mixer": {"kind": "mamba", "d_state": 4}}}})
    assert match(narrow, target, vary="mixer.d_state").config.layers()[0].mixer.d_state == 16
    shrunk = tiny(model_config({**raw, "d_model": 768, "blocks": {"m": {"mixer": {"kind": "mamba", "dt_rank": 48}}}}))
    assert shrunk.layers()[0].mixer.dt_rank == 4


# -- states


def test_a_state_does_not_grow_and_is_as_said():
    model = Case("", "mixer", {"kind": "mamba"}).build(torch.bfloat16)
    state = model.init_state(3, 9).layers[0]["mixer"]
    assert isinstance(state, MambaState)
    assert (state.conv.shape, state.memory.shape) == ((3, 3, 32), (3, 32, 16))
    assert (state.conv.dtype, state.memory.dtype) == (torch.bfloat16, torch.float32)
    sizes = {mixer_of(model).cost(n, torch.bfloat16).state_bytes for n in (1, 100, 65536)}
    assert sizes == {3 * 32 * 2 + 32 * 16 * 4}


@torch.no_grad()
def test_a_donated_state_is_written_in_place():
    model = Case("", "mixer", {"kind": "mamba"}).build(torch.float32)
    tokens = random_batch(2, 6, targets=False).tokens
    want, once, _ = model.features(Batch(tokens), model.init_state(2, 8))
    _, state, _ = in_pieces(model, tokens[:, :5], [5], max_len=8)
    held = [layer["mixer"].memory.data_ptr() for layer in state.layers]
    h, state, _ = model.features(Batch(tokens[:, 5:]), state, donate=True)
    assert state is not None
    assert [layer["mixer"].memory.data_ptr() for layer in state.layers] == held
    assert_close(h, want[:, 5:], "forms", torch.float32)
    assert_close(state.layers, once.layers, "forms", torch.float32)  # pyright: ignore[reportOptionalMemberAccess]


def test_ops_that_ran(monkeypatch: pytest.MonkeyPatch):
    """A sequence is one scan, a token one step; the same bytes when asked for the reference forms."""
    monkeypatch.setattr(dispatch, "counts", type(dispatch.counts)())
    model = Case("", "mixer", {"kind": "mamba"}).build(torch.float32, n_layers=1)
    batch = random_batch(1, 5, targets=False)
    h, _, _ = model.features(batch)
    model.features(Batch(batch.tokens[:, :1]), model.init_state(1, 2))
    assert dispatch.counts["selective_scan", "reference"] == 1
    assert dispatch.counts["recurrent_step", "reference"] == 1
    with dispatch.use("reference"):
        assert same_bytes(model.features(batch)[0], h)


BAD: dict[str, dict[str, Any]] = {
    "d_state must be at least 1": {"d_state": 0},
    "conv must be at least 1": {"conv": 0},
    "dt_rank must be at least 1": {"dt_rank": 0},
    "expand must be positive": {"expand": 0},
    "expand=0.3 of d_model=16 is no whole width": {"expand": 0.3},
    "unknown key 'model.blocks.only.mixer.dstate'": {"dstate": 3},
}


@pytest.mark.parametrize("message", BAD)
def test_refused(message: str):
    with pytest.raises(UserError, match=message):
        Case("", "mixer", {"kind": "mamba", **BAD[message]}).build()
