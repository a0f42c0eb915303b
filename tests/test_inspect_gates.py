"""Gates along a text: what a part says, against formulas by hand and what its op is given; tables and curves, against numpy."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.inspection import anypart, gates, gates_pictures
from eval.inspection.text import Text, loss
from models import LM, Batch
from models.mixers import mamba
from models.types import Gates, Part
from tests.test_inspect_any import MOM, RECURRENT, mixer, model_of, story

RULES = [kind for kind in RECURRENT if kind != "mamba"]


def said(model: LM, tokens: Tensor, valid: Tensor | None = None, name: str = "layers.0.mixer") -> Gates:
    """What a part says of its gates in a forward."""
    part, found = model.get_submodule(name), []
    assert isinstance(part, Part)
    handle = part.register_forward_pre_hook(lambda _, args: found.append(part.memory_gates(*args[:2])))
    with torch.no_grad():
        model.features(Batch(tokens, valid=valid))
    handle.remove()
    return found[0]


def normed(model: LM, tokens: Tensor) -> np.ndarray:
    """What the first layer's projections read [T, D], by hand."""
    x = model.embed.weight.detach()[tokens].numpy()
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.cfg.norm_eps)


def array(p: Tensor) -> np.ndarray:
    return p.detach().double().numpy()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def read() -> Tensor:
    return torch.randint(0, 257, (2, 9), generator=torch.Generator().manual_seed(0))


def unlike(model: LM) -> LM:
    """Parameters of gates that start at nothing or alike are something else."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".rule." in name or ".dt." in name:
                p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())))
    return model


# -- what parts say


def test_gated_delta_by_hand():
    model = unlike(model_of(mixer("gated_delta", heads=2, head_dim=8)))
    part, tokens = model.layers[0].mixer, read()
    logits = normed(model, tokens) @ array(part.project.weight)[-4:].T
    found = said(model, tokens)
    want = np.exp(-np.exp(array(part.rule.A_log)) * np.log1p(np.exp(logits[..., 2:] + array(part.rule.dt_bias))))
    np.testing.assert_allclose(found.decay.exp(), want, rtol=1e-9)
    np.testing.assert_allclose(found.write, sigmoid(logits[..., :2]), rtol=1e-9)
    assert 0.1 < want.std() / want.mean() < 2


def test_gla_by_hand():
    model = unlike(model_of(mixer("gla", heads=2, rank=3, temperature=4.0)))
    part, tokens = model.layers[0].mixer, read()
    low = normed(model, tokens) @ array(part.project.weight)[-3:].T
    decay = sigmoid(low @ array(part.rule.up.weight).T + array(part.rule.up.bias)) ** 0.25
    found = said(model, tokens)
    np.testing.assert_allclose(found.decay.exp(), decay.reshape(2, 9, 2, 4), rtol=1e-9)
    assert found.write is None


def test_mamba2_by_hand():
    model = unlike(model_of(mixer("mamba2", head_dim=8, d_state=8)))
    part, tokens = model.layers[0].mixer, read()
    logits = normed(model, tokens) @ array(part.project.weight)[-4:].T
    step = np.log1p(np.exp(logits + array(part.rule.dt_bias)))
    found = said(model, tokens)
    np.testing.assert_allclose(found.write, step, rtol=1e-9)
    np.testing.assert_allclose(found.decay.exp(), np.exp(-np.exp(array(part.rule.A_log)) * step), rtol=1e-9)


@pytest.mark.parametrize("shared_kv", [False, True], ids=["own", "one"])
def test_mom_by_hand(shared_kv: bool):
    """Two of three memories and the shared one, that a token goes to; NaN at the others."""
    rule = {"kind": "gated_delta", "heads": 2, "head_dim": 4}
    model = unlike(model_of(mixer("mom", memories=3, top_k=2, rule=rule, shared_kv=shared_kv)))
    part, tokens = model.layers[0].mixer, read()
    h = normed(model, tokens)
    router = h @ array(part.router.weight).T
    found, loose = said(model, tokens), 1e-5  # the router may choose in fp32
    assert found.memories == 4
    assert found.decay.shape == found.write.shape == (2, 9, 8)
    goes = np.ones((2, 9, 4), dtype=bool)
    np.put_along_axis(goes[..., :3], router.argmin(-1)[..., None], False, axis=-1)
    for m in range(4):
        logits = h @ array(part.kv)[0 if shared_kv else m, -4:].T
        rates = np.exp(array(part.rule.A_log)) * np.log1p(np.exp(logits[..., 2:] + array(part.rule.dt_bias)))
        for gate, want in ((found.decay, -rates), (found.write, sigmoid(logits[..., :2]))):
            here = gate.unflatten(-1, (4, 2))[:, :, m].numpy()
            np.testing.assert_allclose(here, np.where(goes[..., m, None], want, np.nan), rtol=loose)


@pytest.mark.parametrize("kind", RULES)
def test_the_op_is_given_what_is_said(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Every rule: decay and beta as they enter the op; a state-space model writes its step times the value."""
    model, tokens, given = unlike(model_of(mixer(kind, **RECURRENT[kind]))), read(), []
    rule = type(model.layers[0].mixer.rule)
    plain = rule.inputs
    monkeypatch.setattr(
        rule, "inputs", lambda self, q, k, v, *rest: given.append((v, plain(self, q, k, v, *rest))) or given[-1][1]
    )
    found = said(model, tokens)
    ((v, x),) = given
    assert (found.decay is None) == (x.g is None) == (kind in ("linear_attention", "delta"))
    if x.g is not None:
        assert torch.equal(found.decay, x.g.expand(found.decay.shape))
        assert found.decay.shape[:2] == tokens.shape
    if kind == "mamba2":
        torch.testing.assert_close(x.v, v * found.write[..., None])
    else:
        assert (found.write is None) == (x.beta is None) == ("delta" not in kind)
        assert x.beta is None or torch.equal(found.write, x.beta)


def test_mamba_says_what_its_scan_is_given(monkeypatch: pytest.MonkeyPatch):
    """Padded rows too."""
    model, tokens, given = unlike(model_of(mixer("mamba", d_state=4))), read(), []
    plain = mamba.selective_scan
    monkeypatch.setattr(mamba, "selective_scan", lambda *x, **how: given.append(x[:3]) or plain(*x, **how))
    found = said(model, tokens)
    ((_, delta, rates),) = given
    assert torch.equal(found.write, delta)
    np.testing.assert_allclose(found.decay.exp(), np.exp(array(delta)[..., None] * array(rates)), rtol=1e-12)
    alone = said(model, tokens[1:, :5])
    padded = said(model, tokens, torch.arange(9) < torch.tensor([[9], [5]]))
    torch.testing.assert_close(padded.write[1:, :5], alone.write)
    torch.testing.assert_close(padded.decay[:1], found.decay[:1])


def test_invalid_tokens_go_to_no_memory():
    model, tokens = model_of(mixer(**MOM)), read()
    found = said(model, tokens, torch.arange(9) < torch.tensor([[9], [5]])).write
    assert found[1, 5:].isnan().all()
    torch.testing.assert_close(found[0], said(model, tokens).write[0], equal_nan=True)
    assert (found[1, :5].isfinite().sum(-1) == 2).all()


def test_attention_and_channels_say_nothing():
    model = model_of()
    assert said(model, read(), name="layers.2.mixer") is None
    assert said(model, read(), name="layers.0.channel") is None


# -- what is made of it


def plainly(model: LM, text: Text, name: str) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """-> (decays [T, H, K], writes [T, H]) window by window."""
    found = [said(model, torch.tensor([w[:-1]]), name=name) for w in text.windows]
    decays = [g.decay[0].exp().numpy() for g in found]
    decays = [d if d.ndim == 3 else d[..., None] for d in decays]
    return decays, [None if g.write is None else g.write[0].numpy() for g in found]


@pytest.mark.parametrize("kind", ["gated_delta", "gla", "mamba2", "mamba", "retnet"])
def test_tables_and_curves_against_numpy(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Windows of 24, 24, 24, 24 and 4 tokens, five to a place."""
    monkeypatch.setattr(gates, "PLACES", 5)
    monkeypatch.setattr(gates, "HEADS", 3)
    model, text = unlike(model_of(mixer(kind, **RECURRENT[kind]))), story()
    found = gates.measure(model, text)
    assert found["places"] == [5, 10, 15, 20, 24]
    assert found["tokens"] == [text.shown(i) for i in text.windows[0][:-1]]
    (one,) = found["parts"]
    assert (one["name"], one["layer"], one["kind"], one["memories"], one["seen"]) == ("layers.0.mixer", 0, kind, 1, 1)
    decays, writes = plainly(model, text, "layers.0.mixer")
    heads, features = decays[0].shape[1:]
    assert (one["heads"], one["features"]) == (heads, features)
    every = np.concatenate(decays)
    rates = -np.log(every).mean(0)
    np.testing.assert_allclose(one["decay"]["half_life"], np.log(2) / np.quantile(rates, [0.9, 0.5, 0.1]), rtol=1e-4)
    assert one["decay"]["below_half"] == pytest.approx((every.mean(-1) < 0.5).mean())
    by_head = every.mean((0, 2))
    shown = [*range(heads)] if heads <= 3 else np.argsort(by_head)[np.round(np.linspace(0, heads - 1, 3)).astype(int)]
    assert one["shown"] == [str(n) for n in shown]
    pairs: list[tuple[dict, list[Any]]] = [(one["decay"], [d.mean(-1) for d in decays])]
    if one["write"] is None:
        assert writes[0] is None
    else:
        pairs.append((one["write"], writes))
    for said_of, values in pairs:
        every = np.concatenate(values)
        assert said_of["mean"] == pytest.approx(every.mean(), rel=1e-5)
        np.testing.assert_allclose(said_of["heads"], np.quantile(every.mean(0), [0.1, 0.5, 0.9]), rtol=1e-5)
        for place, end in enumerate(found["places"]):
            here = np.concatenate([v[5 * place : end] for v in values])
            assert said_of["along"][place] == pytest.approx(here.mean(), rel=1e-5)
            want = np.quantile(here.mean(0), [0.1, 0.5, 0.9])
            np.testing.assert_allclose([band[place] for band in said_of["band"]], want, rtol=1e-5)
        np.testing.assert_allclose(said_of["first"], values[0][:, shown], rtol=1e-5)


def test_a_half_life_halves():
    """Retention keeps 1 - 2^-5 of the first head at every token: after 21.8 of them a half is left."""
    model = model_of(mixer("retnet", heads=1))
    (one,) = gates.measure(model, story())["parts"]
    assert one["decay"]["half_life"] == pytest.approx([math.log(0.5) / math.log(1 - 2**-5)] * 3, rel=1e-5)
    assert one["decay"]["mean"] == pytest.approx(31 / 32)
    assert one["write"] is None


def test_memories_count_their_own_tokens():
    model, text = unlike(model_of(mixer(**MOM))), story()
    (one,) = gates.measure(model, text)["parts"]
    assert (one["memories"], one["heads"], one["shown"]) == (4, 1, ["0.0", "1.0", "2.0", "3.0"])
    assert one["seen"] == pytest.approx(2 / 4)
    decays, writes = plainly(model, text, "layers.0.mixer")
    decay, write = np.concatenate(decays)[..., 0], np.concatenate([w for w in writes if w is not None])
    assert one["decay"]["mean"] == pytest.approx(np.nanmean(decay), rel=1e-5)
    assert one["write"]["mean"] == pytest.approx(np.nanmean(write), rel=1e-5)
    rates = np.nanmean(-np.log(decay), axis=0)
    np.testing.assert_allclose(one["decay"]["half_life"], np.log(2) / np.quantile(rates, [0.9, 0.5, 0.1]), rtol=1e-4)
    first = np.array(one["write"]["first"], dtype=float)
    assert np.isfinite(first).sum(1).tolist() == [2] * len(first)


def test_a_hybrid_and_a_nested_mixer():
    """One row for each part that has gates, none for attention, channels, and linear attention, which forgets nothing."""
    assert [one["name"] for one in gates.measure(model_of(), story())["parts"]] == ["layers.0.mixer", "layers.1.mixer"]
    ssm = {"kind": "mamba2", "head_dim": 8, "d_state": 4}
    model = unlike(model_of(mixer("bmojo", heads=2, window=4, m_f=1, m_e=2, ssm=ssm)))
    (one,) = gates.measure(model, story())["parts"]
    assert (one["name"], one["kind"], one["heads"]) == ("layers.0.mixer.ssm", "mamba2", 4)
    inner = model.layers[0].mixer.ssm
    h = np.concatenate([normed(model, torch.tensor(w[:-1])) for w in story().windows])
    steps = np.log1p(np.exp(h @ array(inner.project.weight)[-4:].T + array(inner.rule.dt_bias)))
    assert one["write"]["mean"] == pytest.approx(steps.mean(), rel=1e-5)
    for kind, settings in (("attention", {"heads": 2}), ("linear_attention", {"heads": 2})):
        found = gates.measure(model_of(mixer(kind, **settings)), story())
        assert found["parts"] == []


def test_another_part_is_picked_up(monkeypatch: pytest.MonkeyPatch):
    """Whatever kind of part says its gates."""
    model = model_of()
    channel = type(model.layers[0].channel)
    monkeypatch.setattr(channel, "memory_gates", lambda self, x, ctx: Gates(write=x[..., :3].sigmoid()))
    (one,) = [one for one in gates.measure(model, story())["parts"] if one["name"] == "layers.2.channel"]
    assert (one["decay"], one["heads"], one["features"]) == (None, 3, 1)
    assert 0 < one["write"]["mean"] < 1


def test_looking_changes_nothing():
    model, text = model_of(dtype=torch.float32), story()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    hooks, output = [len(m._forward_pre_hooks) for m in model.modules()], loss(model, text)
    found = gates.measure(model, text)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())
    assert loss(model, text) == output


# -- shown (the command on a hybrid: `tests.test_inspect_any`)


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
def test_a_diverged_model_and_one_gate_alone_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    model = model_of(mixer("mom", memories=2, top_k=1, router_norm="none", rule={"kind": "delta", "heads": 2}))
    assert all(one["decay"] is None for one in gates.measure(model, story())["parts"])
    for make in (gates_pictures.along, gates_pictures.tokens):
        make(gates.measure(model, story())).savefig(str(tmp_path / "delta.png"))
    with torch.no_grad():
        model.embed.weight.fill_(math.nan)
    found = gates.measure(model, story())
    assert found["parts"][0]["write"]["mean"] is None
    assert gates.table(found).count("\n") == 2
    for make in (gates_pictures.along, gates_pictures.tokens):
        make(found).savefig(str(tmp_path / "nan.png"))


def test_summary_of_a_model_without_gates_has_no_table():
    found = anypart.measure_all(model_of(mixer("attention", heads=2)), story(tokens=24), at=[5])
    assert "half-life" not in anypart.summary_all(found)
