"""What B'MOJO contains: attention, sliding windows, a state-space mixer alone and stacks of these, each at an exact setting; and
what its theory claims about linear systems, as far as it holds (arXiv:2407.06324, section 3)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models import LM, Batch
from models.mixers.bmojo import BMojo
from tests.bmojo_tools import EVERY_SSM, MAMBA2, MODES, SSMS, build, mixer, stream, whole
from tests.tools import TOLERANCE, Case, assert_close, random_batch, rel_err

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
PLAIN: dict[str, Any] = {"token_shift": 0, "m_f": 0}
HEADS: dict[str, Any] = {"heads": 4, "kv_heads": 2}


def attention_of(model: LM, **options: Any) -> LM:
    """An attention layer with the weights of the layer of B'MOJO."""
    part, dtype = mixer(model), model.embed.weight.dtype
    given = {"heads": part.heads, "kv_heads": part.kv_heads, "rope_theta": None, **options}
    other = Case("", "mixer", {"kind": "attention", **given}).build(dtype, n_layers=1, d_model=model.cfg.d_model)
    names = other.layers[0].mixer.state_dict()  # pyright: ignore[reportAttributeAccessIssue]
    other.layers[0].mixer.load_state_dict({name: part.state_dict()[name] for name in names})  # pyright: ignore
    return other


def attended(model: LM, x: Tensor) -> Tensor:
    ctx, _, _ = model.prepare(Batch(torch.ones(x.shape[:2], dtype=torch.int64)), None)
    return model.layers[0].mixer(x, ctx)[0]  # pyright: ignore


# -- attention


@DTYPES
@EVERY_SSM
@pytest.mark.parametrize("mode", MODES[:3])
def test_a_window_of_the_whole_length_is_causal_attention(mode: str, ssm: str, dtype: torch.dtype):
    """Whatever m_f, m_e and the state-space mixer: the first chunk is the only one, and no memory is before it."""
    x = stream(2, 33, dtype=dtype)
    rope = {"rope_theta": 1e4}
    for window, pos, options in ((33, "nope", {}), (50, "nope", {}), (40, "rope_true", rope), (40, "rope_const", rope)):
        model = build(ssm, dtype, window=window, pos=pos, fading_mode=mode, token_shift=0, **HEADS)
        assert_close(whole(model, x)[0], attended(attention_of(model, **options), x), "forms", dtype)


@DTYPES
@pytest.mark.parametrize("window", [1, 8, 64])
@pytest.mark.parametrize("pos", ["nope", "rope_true"])
def test_with_room_for_everything_selection_is_invisible(pos: str, window: int, dtype: torch.dtype):
    """Full causal attention through the eidetic path: m_e of the length, de-duplicated, so that no token is ever dropped."""
    T = 150
    x = stream(2, T, dtype=dtype)
    options = {} if pos == "nope" else {"rope_theta": 1e4}
    for score in ("innov", "random"):
        model = build(dtype=dtype, window=window, m_e=T, pos=pos, score=score, **PLAIN, **HEADS)
        want = attended(attention_of(model, **options), x)
        assert_close(whole(model, x)[0], want, "forms", dtype)
    twice = build(dtype=dtype, window=window, m_e=T, pos=pos, dedup=False, **PLAIN, **HEADS)
    assert window == 1 or rel_err(whole(twice, x)[0], want) > 1e-2
    less = build(dtype=dtype, window=window, m_e=T // 4, pos=pos, **PLAIN, **HEADS)
    assert rel_err(whole(less, x)[0], want) > 1e-2


@DTYPES
@pytest.mark.parametrize("window", [1, 5, 16])
@pytest.mark.parametrize("pos", ["nope", "rope_true"])
def test_without_memory_it_is_sliding_window_attention(pos: str, window: int, dtype: torch.dtype):
    """And the state-space mixer has no say."""
    x, options = stream(2, 37, dtype=dtype), {} if pos == "nope" else {"rope_theta": 1e4}
    model = build(dtype=dtype, window=window, m_e=0, pos=pos, **PLAIN, **HEADS)
    before, _ = whole(model, x)
    assert_close(before, attended(attention_of(model, window=window, **options), x), "forms", dtype)
    with torch.no_grad():
        for p in mixer(model).ssm.parameters():
            p.normal_()
    assert torch.equal(whole(model, x)[0], before)


@pytest.mark.parametrize("mode", MODES)
def test_no_eidetic_tokens_is_bmojo_f(mode: str):
    """To the bit: no slot for them, or slots that nothing ever enters."""
    x = stream(2, 37)
    without = build(m_e=0, fading_mode=mode)
    with_ = build(m_e=5, fading_mode=mode)
    with_.load_state_dict(without.state_dict())
    assert rel_err(whole(with_, x)[0], whole(without, x)[0]) > 1e-3
    mixer(with_)._score = lambda *_: (torch.full((2, 37), -float("inf")), ())  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(whole(with_, x)[0], whole(without, x)[0])


# -- the state-space mixer alone, and stacks


def alone(ssm: dict[str, Any]) -> dict[str, Any]:
    """A token sees its own output only: softmax over one key is 1."""
    return {"kind": "bmojo", "ssm": ssm, "heads": 2, "window": 0, "m_e": 0, "fading_mode": "self", "fading_norm": False}


@torch.no_grad()
def transparent(model: LM) -> None:
    """W_V and W_O of layers without a window: identities."""
    for _, _, part in model.parts():
        if isinstance(part, BMojo) and not part.cfg.window:
            for linear in (part.qkv, part.out):
                linear.weight.copy_(torch.eye(len(linear.weight)))


@DTYPES
@EVERY_SSM
def test_one_key_is_the_state_space_mixer_alone(ssm: str, dtype: torch.dtype):
    model = Case("", "mixer", alone(SSMS[ssm])).build(dtype, n_layers=1, d_model=8)
    plain = Case("", "mixer", SSMS[ssm]).build(dtype, n_layers=1, d_model=8)
    weights = mixer(model).state_dict()
    inner = {name.removeprefix("ssm."): w for name, w in weights.items() if name.startswith("ssm.")}
    plain.layers[0].mixer.load_state_dict({**inner, "norm.weight": weights["norm.weight"]})  # pyright: ignore
    x = stream(2, 37, dtype=dtype)
    y = attended(plain, x)
    assert_close(whole(model, x)[0], y @ mixer(model).qkv.weight.T @ mixer(model).out.weight.T, "forms", dtype)
    transparent(model)
    assert torch.equal(whole(model, x)[0], y)


STACKS: dict[str, dict[str, Any]] = {  # the second layer's window
    "jamba": {"window": None},
    "samba": {"window": 5},
}


@DTYPES
@pytest.mark.parametrize("stack", STACKS)
def test_stacked_hybrids_are_patterns(stack: str, dtype: torch.dtype):
    """Layers that are the mixer alone between layers that are attention, over everything (Jamba) or a window (Samba, Griffin)."""
    T, window = 30, STACKS[stack]["window"]
    channel = {"kind": "swiglu", "hidden": 12}
    attention = {"kind": "attention", "heads": 4, "kv_heads": 2, "rope_theta": None, "window": window}
    bmojo = {"kind": "bmojo", "ssm": MAMBA2, **HEADS, "window": window or T, "m_e": 0, **PLAIN}
    shape = {"d_model": 8, "n_layers": 4, "pattern": ["ssm", "attention"]}

    def of(ssm: dict[str, Any], other: dict[str, Any]) -> LM:
        blocks = {"ssm": {"mixer": ssm, "channel": channel}, "attention": {"mixer": other, "channel": channel}}
        return Case("", model={**shape, "blocks": blocks}).build(dtype)

    hybrid, ours = of(MAMBA2, attention), of(alone(MAMBA2), bmojo)
    transparent(ours)
    found = dict(ours.state_dict())
    for name, weight in hybrid.state_dict().items():
        layer = name.split(".")[1] if name.startswith("layers") else ""
        inner = name.replace("mixer.", "mixer.ssm.") if layer in ("0", "2") and ".mixer.norm." not in name else name
        assert found[inner].shape == weight.shape, name
        found[inner] = weight
    ours.load_state_dict(found)
    batch = random_batch(2, T, targets=False)
    assert_close(ours(batch).logits, hybrid(batch).logits, "forms", dtype)


# -- linear systems: one form for all, x_t = A x_{t-1} + b u_t


def companion(a: Tensor) -> Tensor:
    """The shift with a last row -(a_N .. a_1): w_t = u_t - sum_k a_k w_{t-k}."""
    A = torch.diag(torch.ones(len(a) - 1, dtype=a.dtype), 1)
    A[-1] = -a.flip(0)
    return A


def polynomial(roots: Tensor) -> Tensor:
    """prod_i (1 - r_i z) -> its coefficients from z^0 on."""
    found = torch.ones(1, dtype=roots.dtype)
    for root in roots:
        found = torch.cat((found, found[:1] * 0)) - root * torch.cat((found[:1] * 0, found))
    return found


def canonical(poles: Tensor, residues: Tensor) -> tuple[Tensor, Tensor]:
    """Companion form of sum_i r_i / (1 - p_i z) -> (A, read-out)."""
    others = [torch.cat((poles[:i], poles[i + 1 :])) for i in range(len(poles))]
    numerator = torch.stack([r * polynomial(p) for r, p in zip(residues, others, strict=True)]).sum(0)
    return companion(polynomial(poles)[1:]), numerator.flip(0)


def outputs(systems: list[tuple[Tensor, Tensor, Tensor]], u: Tensor) -> Tensor:
    """(A, b, c) of each step -> y_t = c x_t."""
    x, found = torch.zeros_like(systems[0][1]), []
    for (A, b, c), value in zip(systems, u, strict=True):
        x = A @ x + b * value
        found.append(c @ x)
    return torch.stack(found)


def diagonal_and_companion(poles: Tensor, residues: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Poles and residues [T, N] of each step, in both forms."""
    last = torch.zeros_like(poles[0])
    last[-1] = 1
    forms = [canonical(p, r) for p, r in zip(poles, residues, strict=True)]
    diagonal = [(torch.diag(p), torch.ones_like(p), r) for p, r in zip(poles, residues, strict=True)]
    return outputs(diagonal, u), outputs([(A, last, c) for A, c in forms], u)


def test_constant_coefficients_have_a_companion_form():
    poles, residues = torch.tensor([0.9, -0.5, 0.7, 0.2], dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    u = torch.randn(80, dtype=torch.float64)
    diagonal, other = diagonal_and_companion(poles.expand(80, 4), residues.expand(80, 4), u)
    assert_close(other, diagonal, "forms")


def test_without_its_last_row_the_companion_form_is_a_window():
    """Nilpotent: the state is the last N inputs, and anything older is gone exactly, as it is for attention of that span."""
    A = companion(torch.zeros(4, dtype=torch.float64))
    assert not torch.linalg.matrix_power(A, 4).any()
    assert torch.linalg.matrix_power(A, 3).any()
    u, last = torch.randn(20, dtype=torch.float64), torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    for n, row in enumerate(torch.eye(4, dtype=torch.float64)):
        seen = outputs([(A, last, row)] * 20, u)
        assert torch.equal(seen[3:], u[n : n + 17])


def test_varying_coefficients_have_none_point_by_point():
    """With one state the forms agree also where coefficients vary with the input; with more, taking the companion matrix of the
    poles of the moment is another system. Nobody should mend this by loosening a tolerance."""
    T = 80
    u = torch.randn(T, dtype=torch.float64)
    poles, residues = 0.3 + 0.6 * torch.rand(T, 4, dtype=torch.float64), torch.randn(T, 4, dtype=torch.float64)
    diagonal, other = diagonal_and_companion(poles[:, :1], residues[:, :1], u)
    assert_close(other, diagonal, "forms")
    diagonal, other = diagonal_and_companion(poles, residues, u)
    assert rel_err(other, diagonal) > 0.1
    assert rel_err(other, diagonal) > 1e6 * TOLERANCE["forms", torch.float64]
