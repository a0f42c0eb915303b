"""Structured matrices against the dense ones that they stand for, built entry by entry; the channel against a loop over tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models import UserError, meta_model, model_config
from models.channels import structured
from models.channels.structured import BlockShuffle, Butterfly, Structured, StructuredFFN, StructuredFFNConfig
from models.types import Site, count_params
from tests.tools import assert_close, assert_same_gradients, rel_err
from training.muon import Muon

FORMS: dict[str, dict[str, Any]] = {
    "low_rank": {"rank": 3},
    "block_dense": {"rank": 6, "blocks": 2},
    "block_shuffle": {"blocks": 4},
    "butterfly": {"products": 3},
}
SHAPES = [(8, 20), (20, 8), (12, 12), (16, 4)]


def build(form: str, d_in: int, d_out: int, **options: Any) -> Structured:
    """With weights of N(0, 1)."""
    cfg = StructuredFFNConfig(form=form, **{**FORMS[form], **options})
    made = structured.FORMS[form](d_in, d_out, cfg, Site(d_in)).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_()
    return made


def channel(form: str, d: int = 12, dtype: torch.dtype = torch.float64, **options: Any) -> StructuredFFN:
    cfg = StructuredFFNConfig(form=form, **{**FORMS[form], **options})
    part = StructuredFFN(cfg, Site(d, n_layers=3, slot="channel")).to(dtype)
    part.reset_parameters(torch.Generator().manual_seed(0), depth=3)
    return part


# -- the dense matrix, from the definition


def naive(m: Structured) -> Tensor:
    """W [out, in], entry by entry."""
    if isinstance(m, Butterfly):
        return naive_butterfly(m)
    u, v = m.u, m.v
    assert isinstance(u, Tensor)
    assert isinstance(v, Tensor)
    rows = []
    for o in range(m.d_out):
        entries = []
        for i in range(m.d_in):
            if v.ndim == 2:
                entries.append((u[o] * v[:, i]).sum())
                continue
            B, q, width = v.shape
            b, column = i // width, v[i // width, :, i % width]
            if u.ndim == 2:
                entries.append(sum(u[o, b * q + j] * column[j] for j in range(q)))
            else:
                inner = (b * q + j for j in range(q))  # of the entries between the products, those that see input i
                entries.append(
                    sum(
                        u[f % B, o // B, f // B] * column[f - b * q] if f % B == o % B else 0.0 * column[0]
                        for f in inner
                    )
                )
        rows.append(torch.stack(entries))
    return torch.stack(rows)


def naive_butterfly(m: Butterfly) -> Tensor:
    """The explicit product of sparse factors."""
    stacks = []
    for twiddle in m.twiddle:
        W = torch.eye(m.n, dtype=torch.float64)
        for i, product in enumerate(twiddle):
            order = list(enumerate(product))
            for level, pairs in order if i % 2 == 0 else order[::-1]:
                stride, factor = 2**level, [[torch.zeros((), dtype=torch.float64)] * m.n for _ in range(m.n)]
                for k, mix in enumerate(pairs):
                    first = k // stride * 2 * stride + k % stride
                    for a in (0, 1):
                        for b in (0, 1):
                            factor[first + a * stride][first + b * stride] = mix[a, b]
                W = torch.stack([torch.stack(row) for row in factor]) @ W
        stacks.append(W)
    return torch.cat(stacks)[: m.d_out, : m.d_in]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_its_dense_matrix(form: str, shape: tuple[int, int]):
    """Outputs, gradients of input and weights, and `dense`, on inputs with any number of leading dimensions."""
    m = build(form, *shape, **({"rank": 4} if shape == (16, 4) and form != "butterfly" else {}))
    W = naive(m)
    assert_close(m.dense(), W, "forms")
    x = torch.randn(2, 3, shape[0], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, shape[1], dtype=torch.float64)
    assert_close(m(x), x @ W.T, "forms")
    assert_close(m(x[0, 0]), W @ x[0, 0], "forms")
    found = torch.autograd.grad((m(x) * weight).sum(), [x, *m.parameters()])
    wanted = torch.autograd.grad((x @ W.T * weight).sum(), [x, *m.parameters()])
    assert_close(found, wanted, "gradient")


@pytest.mark.parametrize("activation", ["gelu", "relu2", "swiglu"])
@pytest.mark.parametrize("form", FORMS)
def test_the_channel_token_by_token(form: str, activation: str):
    part = channel(form, activation=activation, bias=True, hidden=20)
    with torch.no_grad():
        for p in part.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    maps: dict[str, Any] = {name: (naive(m), m.bias) for name, m in part.maps().items()}
    weight: Any = part.norm.weight
    x = torch.randn(2, 3, 12, dtype=torch.float64)

    def token(x: Tensor) -> Tensor:
        h = x / (x.square().mean() + 1e-5).sqrt() * weight
        wide = {name: W @ h + bias for name, (W, bias) in maps.items() if name != "down"}
        up = wide["up"]
        a = {
            "gelu": lambda: up * (1 + torch.erf(up / 2**0.5)) / 2,
            "relu2": lambda: torch.where(up > 0, up * up, 0.0),
            "swiglu": lambda: wide["gate"] / (1 + torch.exp(-wide["gate"])) * up,
        }[activation]()
        W, bias = maps["down"]
        return W @ a + bias

    y, _, _ = part(x, None)  # pyright: ignore[reportArgumentType]
    wanted = torch.stack([torch.stack([token(t) for t in row]) for row in x])
    assert_close(y, wanted, "forms")
    seed, names = torch.randn_like(y), [n for n, _ in part.named_parameters()]
    found, expected = (torch.autograd.grad((out * seed).sum(), list(part.parameters())) for out in (y, wanted))
    assert_same_gradients(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))


# -- sizes


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"form": "low_rank", "rank": 128}, 0.625),
        ({"form": "low_rank", "rank": 64}, 0.3125),
        ({"form": "low_rank"}, 0.625),  # half of d_model by default
        ({"form": "block_shuffle", "blocks": 2}, 0.625),
        ({"form": "block_shuffle", "blocks": 4}, 0.3125),
        ({"form": "block_dense", "rank": 128, "blocks": 2}, 5 * 128 * 256 * (1 + 1 / 2) / (8 * 256**2)),
        ({"form": "block_dense", "rank": 64, "blocks": 8}, 5 * 64 * 256 * (1 + 1 / 8) / (8 * 256**2)),
        ({"form": "butterfly"}, (4 * 2 * 256 * 8 + 2 * 1024 * 10) / (8 * 256**2)),
    ],
    ids=str,
)
def test_share_of_the_dense_size(options: dict[str, Any], share: float):
    """Of d -> 4 d -> d, d = 256 (the figures of the paper), in weights and in products."""
    d = 256
    raw = {"d_model": d, "n_layers": 1, "vocab_size": 5}
    model = meta_model(model_config({**raw, "blocks": {"a": {"channel": {"kind": "structured_ffn", **options}}}}))
    [(_, _, part)] = model.parts()
    assert isinstance(part, StructuredFFN)
    assert part.cost(7) == (share * 8 * d * d + d, share * 8 * d * d + d, 2 * share * 8 * d * d, 0)
    assert count_params(part) == share * 8 * d * d + d


def test_a_butterfly_is_small():
    """512 -> 2048: four stacks of 9,216 against 1,048,576."""
    with torch.device("meta"):
        m = Butterfly(512, 2048, StructuredFFNConfig(form="butterfly"), Site(512))
    assert m.weights == m.twiddle.numel() == 4 * 9216


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"form": "low_rank", "rank": 13},
            r"layer 2, channel: rank=13 is above that of a 24 x 12 matrix; nearest: rank=12",
        ),
        ({"form": "low_rank", "hidden": 5}, r"rank=6 is above that of a 5 x 12 matrix; nearest: rank=5"),
        (
            {"form": "block_shuffle", "blocks": 5},
            "blocks=5 does not divide the input of 12 and the output of 24; nearest: blocks=4",
        ),
        (
            {"form": "block_shuffle", "blocks": 3, "hidden": 25},
            "blocks=3 does not divide the output of 25; nearest: blocks=1",
        ),
        ({"form": "block_dense", "rank": 9, "blocks": 4}, "blocks=4 does not divide rank=9; nearest: blocks=3"),
        (
            {"form": "block_dense", "rank": 8, "blocks": 8},
            "blocks=8 does not divide the input of 12; nearest: blocks=4",
        ),
        ({"form": "low-rank"}, "unknown form 'low-rank'; did you mean 'low_rank'?"),
        ({"activation": "gleu"}, "unknown activation 'gleu'; did you mean 'gelu'?"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"form": "butterfly", "products": 0}, "products must be at least 1, got 0"),
    ],
    ids=str,
)
def test_what_is_refused(options: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        StructuredFFN(StructuredFFNConfig(**{"ratio": 2.0, **options}), Site(12, layer=2, slot="channel"))
    assert said in str(error.value)


# -- the shuffle


def test_the_shuffle_is_part_of_the_matrix():
    """Every output sees every input. Block-diagonal factors multiplied without the shuffles are another matrix, with zeros."""
    m = build("block_shuffle", 8, 24, blocks=2)
    assert isinstance(m, BlockShuffle)
    W, plain = m.dense(), torch.block_diag(*m.u) @ torch.block_diag(*m.v)
    assert W.count_nonzero() == W.numel()
    assert plain.count_nonzero() == W.numel() / 2
    assert rel_err(plain, W) > 0.5
    middle = torch.arange(8).reshape(4, 2).T.flatten()  # entry f to block f mod 2
    last = torch.arange(24).reshape(2, 12).T.flatten()
    by_hand = (torch.block_diag(*m.u) @ torch.block_diag(*m.v)[middle])[last]
    assert_close(W, by_hand, "forms")


# -- initial values


@pytest.mark.parametrize("shape", [(64, 256), (256, 64)], ids=str)
def test_low_rank_starts_as_the_best_approximation(shape: tuple[int, int]):
    """Both factors share the leading singular values of a Gaussian matrix evenly; at full rank it is that matrix."""
    d_in, d_out = shape
    for rank in (64, 16):
        m = structured.LowRank(*shape, StructuredFFNConfig(rank=rank), Site(d_in)).double()
        m.reset_parameters(torch.Generator().manual_seed(3), std=0.02)
        drawn = torch.empty(d_out, d_in, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(3)) * 0.02
        u, s, vt = torch.linalg.svd(drawn, full_matrices=False)
        assert_close(m.dense(), u[:, :rank] * s[:rank] @ vt[:rank], "forms")
        assert_close(m.u.T @ m.u, torch.diag(s[:rank]), "forms")
        assert_close(m.v @ m.v.T, torch.diag(s[:rank]), "forms")


@pytest.mark.parametrize("form", ["block_dense", "block_shuffle"])
def test_blocks_start_orthogonal(form: str):
    part = channel(form, d=24, hidden=96, dtype=torch.float32, **({"rank": 8} if form == "block_dense" else {}))
    for m in part.maps().values():
        for p in m.parameters():
            for block in p if p.ndim == 3 else [p]:
                gram = block @ block.T if block.shape[0] <= block.shape[1] else block.T @ block
                assert (gram - torch.eye(len(gram))).abs().max() < 1e-5
    values = torch.linalg.svdvals(part.up.dense())  # a product of isometries
    rank = 8 if form == "block_dense" else 24
    assert (values[:rank] - 1).abs().max() < 1e-5
    assert values[rank:].abs().max() < 1e-5 if rank < 24 else len(values) == rank


def test_the_last_matrix_of_low_rank_is_smaller():
    """As in the dense channels, by the root of twice the depth; the model's standard deviation scales both."""
    part = channel("low_rank", d=48, hidden=192, rank=48)
    assert part.up.dense().std().item() == pytest.approx(0.02, rel=0.05)
    assert part.down.dense().std().item() == pytest.approx(0.02 / math.sqrt(2 * 3), rel=0.05)


def test_a_butterfly_keeps_the_mean_square():
    m = structured.Butterfly(64, 64, StructuredFFNConfig(form="butterfly", products=2), Site(64)).double()
    total = 0.0
    for seed in range(200):
        m.reset_parameters(torch.Generator().manual_seed(seed), std=0.02)
        total += m(torch.ones(64, dtype=torch.float64)).square().mean().item() / 200
    assert total == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize("n", [2, 8, 16])
def test_butterflies_that_have_a_name(n: int):
    m = Butterfly(n, n, StructuredFFNConfig(form="butterfly"), Site(n)).double()
    with torch.no_grad():
        m.twiddle.copy_(torch.eye(2))
        assert torch.equal(m.dense(), torch.eye(n, dtype=torch.float64))
        m.twiddle.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        hadamard = torch.ones(1, 1, dtype=torch.float64)
        while len(hadamard) < n:
            hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
        assert torch.equal(m.dense(), hadamard)


# -- what the optimizer is told


def test_roles():
    meta = channel("butterfly", bias=True).meta()
    assert (meta["up.twiddle"].optimizer, meta["up.twiddle"].decay) == ("adamw", False)
    for form in ("low_rank", "block_dense", "block_shuffle"):
        meta = channel(form, bias=True, activation="swiglu", hidden=20).meta()
        for name in ("gate", "up", "down"):
            for factor in ("u", "v"):
                assert (meta[f"{name}.{factor}"].role, meta[f"{name}.{factor}"].optimizer) == ("matrix", "auto")
            assert meta[f"{name}.bias"].optimizer == "adamw"


def test_muon_takes_each_block_as_a_matrix():
    m = build("block_shuffle", 8, 24, blocks=2)
    assert isinstance(m, BlockShuffle)
    alone = {f"{i}": block.detach().clone().requires_grad_() for i, block in enumerate(m.v)}
    grad = torch.randn_like(m.v)
    m.v.grad = grad.clone()
    for i, block in enumerate(alone.values()):
        block.grad = grad[i].clone()
    for params in ({"v": m.v}, alone):
        Muon().step(dict(params), {}, dict.fromkeys(params, 0.1), dict.fromkeys(params, 0.0))
    assert_close(m.v, torch.stack(list(alone.values())), "same", torch.float32)
