"""The memory cell: published numbers, a model by the book, what may not change and what has to be refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import schema
from models import LM, Batch, build, model_config
from models.channels import gmt_losses
from models.channels.gmt import GMT
from models.errors import UserError
from models.lm import meta_model
from models.types import count_params
from tests import gmt_naive
from tests.tools import assert_close, random_batch, spread, state_hash

ROOT = Path(__file__).resolve().parent.parent
CELL = {"kind": "gmt", "slots": 5, "width": 3}
FIDELITIES = pytest.mark.parametrize("fidelity", ["paper", "corrected"])


def model(d: int = 6, layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> LM:
    cfg = model_config(
        {
            "d_model": d,
            "n_layers": layers,
            "vocab_size": 23,
            "norm": "layernorm",
            "blocks": {"b": {"mixer": {"kind": "attention", "heads": d // 2}, "channel": {**CELL, **options}}},
        }
    )
    return build(cfg, seed=seed, dtype=dtype)


def cells(lm: LM) -> list[GMT]:
    return [part for _, slot, part in lm.parts() if slot == "channel" and isinstance(part, GMT)]


# -- numbers of the paper and of its code


def paper_model(V: int, L: int, d: int, heads: int, n: int, f: int, v: int) -> int:
    block = {
        "mixer": {"kind": "attention", "heads": heads, "rope_theta": None},
        "channel": {"kind": "gmt", "slots": f, "width": v},
    }
    backbone = {"norm": "layernorm", "norm_bias": True, "learned_positions": True, "max_seq_len": L, "vocab_size": V}
    return count_params(meta_model(model_config({"d_model": d, "n_layers": n, "blocks": {"b": block}, **backbone})))


def test_parameters_are_those_of_the_paper():
    assert paper_model(50257, 1024, 768, 12, 16, 128, 128) == 82_213_152
    assert paper_model(64, 8, 16, 4, 2, 8, 4) == 4_132
    assert paper_model(512, 64, 96, 4, 3, 16, 16) == 182_982


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gmt-v7", 82_213_152),
        ("gmt-v7-dense", 102_988_032),
        ("gmt-v7-dense-params", 82_221_312),
        ("gmt-v7-dense-flops", 83_990_784),
    ],
)
def test_shipped_configs(name: str, parameters: int):
    assert count_params(meta_model(schema.load(ROOT / "configs" / f"{name}.yaml").model)) == parameters


def test_the_shipped_rivals_have_the_operations_that_they_claim():
    """Of the cell as the paper writes it: queries, scores, similarities, the hop and both mixtures."""
    for name, d, f, v, rtol in (("gmt-v7", 768, 128, 128, 2e-3), ("gmt-small", 128, 32, 32, 1e-3)):
        published = 2 * (d * v + v * f + d * f + f * f + 2 * f * d)
        dense = schema.load(ROOT / "configs" / f"{name}-dense-flops.yaml").model.blocks["base"].channel
        assert 4 * d * dense.hidden == pytest.approx(published, rel=rtol)
    small, rival = (schema.load(ROOT / "configs" / f"gmt-small{end}.yaml").model for end in ("", "-dense-params"))
    counts = [count_params(meta_model(replace(cfg, vocab_size=257))) for cfg in (small, rival)]
    assert counts[1] == pytest.approx(counts[0], rel=1e-4)


def golden() -> GMT:
    (cell,) = cells(model(d=4, layers=1, dtype=torch.float32, slots=3, width=2))
    with torch.no_grad():
        cell.slots.copy_(torch.eye(3, 4))
        cell.edges.copy_(torch.arange(9.0).view(3, 3) / 4)
        cell.query.weight.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]))
        cell.key.weight.copy_(torch.tensor([[1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0]]))
    return cell


@pytest.mark.parametrize(
    ("x", "source", "target", "move", "y"),
    [
        (
            [1, 2, 3, 4],
            [0.228169, 0.304867, 0.466964],
            [0.830590, 0.169364, 0.000046],
            [1.391194, -0.312923, -1.078271, 0.0],
            [1.137792, -0.255925, -0.881868, 0.0],
        ),
        (
            [0.5, -1, 2, 0.25],
            [0.000790, 0.000320, 0.998890],
            [0.528683, 0.414642, 0.056675],
            None,
            [0.667241, 0.523689, -1.190930, 0.0],
        ),
    ],
)
def test_golden_cell(
    x: list[float], source: list[float], target: list[float], move: list[float] | None, y: list[float]
):
    cell = golden()
    for tables in (cell.tables_of_slots(), cell.tables_of_slots()):
        hop = cell.hop(torch.tensor([x], dtype=torch.float32), tables, torch.tensor(0.5))
        for got, want in ((hop.source, source), (hop.target, target), (hop.y, y)):
            assert torch.allclose(got[0], torch.tensor(want), atol=1e-5, rtol=0)
        if move is not None:
            assert torch.allclose((hop.target - hop.source)[0] @ tables.points, torch.tensor(move), atol=1e-5, rtol=0)
    assert torch.allclose(cell.edge_table()[0], torch.tensor([0.0, 0.437823, 0.562177]), atol=1e-6, rtol=0)


def test_temperature():
    cell = golden()
    wanted = {0: 1.0, 0.1: 0.694121, 0.25: 0.439163, 0.5: 0.239820, 0.75: 0.148597, 0.9: 0.116225, 1: 0.1}
    for progress, temperature in wanted.items():
        assert cell.temperature(torch.tensor(float(progress))).item() == pytest.approx(temperature, abs=1e-6)
    (fixed,) = cells(model(layers=1, temperature=0.3))
    assert fixed.temperature(torch.tensor(0.5)).item() == pytest.approx(0.3)


def test_at_the_start_it_is_as_published():
    """At the paper's width: sources almost uniform, a displacement of norm near 20, edges above their entropy floor."""
    lm = build(
        model_config(
            {
                "d_model": 768,
                "n_layers": 1,
                "vocab_size": 512,
                "norm": "layernorm",
                "norm_bias": True,
                "blocks": {"b": {"mixer": {"kind": "attention", "heads": 12}, "channel": {"kind": "gmt"}}},
            }
        )
    )
    (cell,), batch = cells(lm), random_batch(2, 64, 512)
    with torch.no_grad():
        x = lm.embed(batch.tokens)
        hop = cell.hop(cell.norm(x).flatten(0, 1), cell.tables_of_slots(), torch.tensor(1.0))
        losses = lm(batch, logits="none").losses if torch.is_grad_enabled() else None
    assert losses is None
    assert hop.source.double().mean(0).sum() == pytest.approx(1.0)
    assert torch.special.entr(hop.source).sum(1).mean().item() == pytest.approx(4.851, abs=0.002)
    assert 19 < hop.y.norm(dim=1).mean().item() < 21
    said = lm(batch).losses
    assert said["gmt.edge_entropy"].item() < 0.01
    assert said["gmt.usage"].item() == 0.0
    assert said["gmt.orthogonality"].item() == pytest.approx(1 / 768, rel=0.1)
    assert 0.3 < said["gmt.edge_contrast"].item() < 0.5


# -- by the book


@FIDELITIES
@pytest.mark.parametrize("displacement", [None, "none"])
def test_equals_the_book(fidelity: str, displacement: str | None):
    """Output and every loss, with the gradients of the stream and of every parameter."""
    options = {"fidelity": fidelity, "displacement": displacement, "target_usage_weight": 0.2, "temperature": 0.4}
    # Targets that are missed, so that no pressure is zero.
    lm = model(layers=1, usage_target=5, edge_entropy_floor=1.4, **options)
    spread(lm, 0)
    (cell,) = cells(lm)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    ctx, _, _ = lm.prepare(Batch(torch.zeros(2, 4, dtype=torch.int64), valid=valid), None)
    y, _, aux = cell.train()(x, ctx)
    want, losses = gmt_naive.run(cell, x.flatten(0, 1), 0.4, valid.flatten().tolist())
    assert_close(y.flatten(0, 1), want, "forms")
    assert aux.losses.keys() == losses.keys()
    assert_close(aux.losses, losses, "forms")
    dy = torch.randn_like(want)
    names = ["x", *(n for n, _ in cell.named_parameters())]
    leaves = [x, *cell.parameters()]
    for said, function in ((y.flatten(0, 1) * dy, want * dy), *((aux.losses[n], losses[n]) for n in losses)):
        got, ref = (
            torch.autograd.grad(t.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            for t in (said, function)
        )
        assert_close(dict(zip(names, got, strict=True)), dict(zip(names, ref, strict=True)), "gradient")
    assert all(loss > 0 for name, loss in losses.items() if name != "edge_entropy")


def test_tracking_pulls_where_it_should():
    """Through the weights at everything upstream, and never at the state that is tracked."""
    lm = model(layers=1, momentum=0.5)
    spread(lm, 0)
    (cell,) = cells(lm.train())
    out = lm(random_batch(2, 5))
    out.losses["gmt.tracking"].backward()
    for name in ("slots", "norm_slots.weight", "write_momentum", "norm.weight"):
        grad = cell.get_parameter(name).grad
        assert grad is not None
        assert grad.count_nonzero(), name
    for name in ("gate", "edges", "query.weight", "norm_move.weight"):
        grad = cell.get_parameter(name).grad
        assert grad is None or not grad.any(), name


def test_losses_without_weight_are_not_computed():
    weights: dict[str, Any] = {f"{name}_weight": 0.0 for name in gmt_losses.LOSSES}
    lm = model(**weights)
    assert set(lm(random_batch(2, 5)).losses) == {"lm"}


def test_no_gradient_is_lost_at_a_weight_of_zero():
    """A source that has underflowed, and the edge that no slot has to itself, leave every gradient finite."""
    cold: dict[str, Any] = {
        "temperature": 0.003,
        "edges": "logprob",
        "target_usage_weight": 0.3,
        "edge_entropy_floor": 9.0,
    }
    lm = model(layers=1, dtype=torch.float32, **cold)
    spread(lm, 0)
    lm.train()
    out = lm(random_batch(2, 5))
    lm.total(out.losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lm.parameters())


# -- purity


@FIDELITIES
def test_nothing_but_a_commit_changes_the_model(fidelity: str):
    """The published code writes in every forward, of validation and benchmarks too."""
    lm, batch = model(fidelity=fidelity), random_batch(2, 9)
    before = state_hash(lm)
    for train in (True, False):
        out = lm.train(train)(batch)
        lm.total(out.losses).backward()
        lm.zero_grad()
    with torch.no_grad():
        first = lm(batch, logits="all").logits
        state = lm.init_state(2, 9)
        for i in range(9):
            state = lm(Batch(batch.tokens[:, i : i + 1]), state, donate=True, logits="none").state
        again = lm(batch, logits="all").logits
        assert first is not None
        assert again is not None
        assert torch.equal(again, first)
    assert state_hash(lm) == before
    assert not lm.eval()(batch).writes


@FIDELITIES
def test_earlier_logits_do_not_depend_on_what_was_read(fidelity: str):
    lm = model(fidelity=fidelity, dtype=torch.float32).eval()
    batch, other = random_batch(2, 9), random_batch(2, 9)
    with torch.no_grad():
        want = lm(Batch(batch.tokens), logits="all").logits
        lm(Batch(other.tokens), logits="all")
        mixed = torch.cat([batch.tokens[:, :5], other.tokens[:, 5:]], dim=1)
        got = lm(Batch(mixed), logits="all").logits
    assert want is not None
    assert got is not None
    assert torch.equal(got[:, :5], want[:, :5])


def test_writes_change_no_gradient():
    lm, batch = model(), random_batch(2, 9)
    found = []
    for train in (True, False):
        out = lm.train(train)(batch)
        assert bool(out.writes) == train
        lm.total(out.losses).backward()
        found.append({n: p.grad for n, p in lm.named_parameters()})
        lm.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "autocast"])
def test_keeps_less_for_the_backward_than_a_swiglu(narrow: bool):
    """Of both with their losses, at the paper's width; a SwiGLU of 4 d, as in its own paper."""

    def kept(channel: dict[str, Any]) -> int:
        raw = {
            "d_model": 768,
            "n_layers": 1,
            "vocab_size": 9,
            "norm": "layernorm",
            "blocks": {"b": {"channel": channel}},
        }
        lm, sizes = build(model_config(raw)).train(), dict[int, int]()
        own = {p.data_ptr() for p in lm.parameters()}

        def note(t: torch.Tensor) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in own:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)
            return t

        alive: list[torch.Tensor] = []  # or an address would count for two
        batch = random_batch(2, 512, 9)
        x, ctx = lm.embed(batch.tokens).detach().requires_grad_(), lm.prepare(batch, None)[0]
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=narrow),
        ):
            y, _, aux = lm.layers[0].channel(x, ctx)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            total = y.float().sum() + sum(aux.losses.values())
        assert total.requires_grad
        return sum(sizes.values())

    assert kept({"kind": "gmt"}) < 0.6 * kept({"kind": "swiglu"})


# -- tables for inference


def test_tables_are_made_once_and_never_stale():
    lm = model(layers=1)
    (cell,) = cells(lm)

    @torch.no_grad()
    def fresh() -> bool:
        pairs = zip(cell.tables_of_slots(), cell._make_tables(), strict=True)
        return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    with torch.no_grad():
        assert cell.tables_of_slots() is cell.tables_of_slots()
        changes: list[Any] = [
            lambda: cell.slots.mul_(2.0),
            lambda: cell.gate.add_(1.0),
            lambda: lm.load_state_dict({n: t + 0.5 for n, t in lm.state_dict().items()}),
            lambda: setattr(cell.edges, "data", torch.randn(5, 5, dtype=torch.float64)),
            lambda: lm.to(torch.float32),
            lambda: lm.to(torch.bfloat16),
        ]
        for change in changes:
            kept = cell.tables_of_slots()
            change()
            assert cell.tables_of_slots() is not kept
            assert fresh()
    with torch.inference_mode():
        assert fresh()
    assert cell.tables_of_slots().points.requires_grad


@pytest.mark.parametrize("swaps", [1, 2])
def test_a_swapped_parameter_cannot_hide_behind_an_address(swaps: int):
    """Memory of a tensor that is gone may be given to the next."""
    (cell,) = cells(model(layers=1))
    with torch.no_grad():
        for _ in range(20):
            cell.tables_of_slots()
            for _ in range(swaps):
                cell.slots.data = torch.randn(5, 6, dtype=torch.float64)
            assert torch.equal(cell.tables_of_slots().points, cell._make_tables().points)


# -- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, "layer 0, channel: gmt needs dropout=0"),
        ({"branches": 2}, "layer 0, channel: gmt needs branches=1"),
    ],
)
def test_blocks_that_would_mislead_it_are_refused(changes: dict[str, Any], message: str):
    raw = {"d_model": 8, "n_layers": 1, "vocab_size": 9, "blocks": {"b": {"channel": CELL}}, **changes}
    with pytest.raises(UserError, match=message):
        build(model_config(raw))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fidelity": "papr"}, "fidelity.*paper"),
        ({"edges": "probs"}, "edges.*prob"),
        ({"slots": 1}, "at least 2 slots"),
        ({"momentum": 1.0}, "momentum must lie strictly between 0 and 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"tracking_weight": -1.0}, "tracking_weight must not be negative"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        model(**options)


def test_presets_are_switches():
    def chosen(**options: Any) -> Any:
        return cells(model(**options))[0].cfg

    paper, corrected, mixed = (
        chosen(fidelity="paper"),
        chosen(fidelity="corrected"),
        chosen(fidelity="corrected", edges="prob"),
    )
    assert (paper.edges, paper.write_norm, paper.displacement, paper.target_usage_weight) == (
        "prob",
        "raw",
        "layernorm",
        0.0,
    )
    assert (corrected.edges, corrected.write_norm, corrected.displacement) == ("logprob", "unit", "rms")
    assert corrected.target_usage_weight > 0
    assert (mixed.edges, mixed.displacement) == ("prob", "rms")
