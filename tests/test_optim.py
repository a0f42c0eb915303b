"""The composite optimizer, its schedule, freezing, and steps that must not happen."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import models
from models import LM, Batch, UserError, model_config
from models.types import ParamMeta, RowReset
from tests.runs import IN_STEP, PLAIN, TOYS, Fault, metrics, train, write_config
from tests.tools import rel_err
from training import interventions, muon
from training.optim import OptimConfig, Optimizer
from training.schedule import factor

VOCAB = 23


def build(raw: dict = TOYS, seed: int = 0, **optim) -> tuple[LM, Optimizer]:
    model = models.build(model_config({**raw, "vocab_size": VOCAB}), seed)
    return model, Optimizer(model, OptimConfig(**optim))


def backward(model: LM, seed: int, scale: float = 1.0) -> None:
    tokens = torch.randint(VOCAB, (3, 13), generator=torch.Generator().manual_seed(seed))
    out = model(Batch(tokens[:, :-1], tokens[:, 1:]))
    (scale * model.total(out.losses)).backward()


def advance(model: LM, optim: Optimizer, steps: range, lr: float = 1e-2) -> None:
    for step in steps:
        optim.set_lr(lr)
        backward(model, step)
        optim.step()
        optim.zero_grad()


# -- groups


@pytest.mark.parametrize("with_muon", [False, True])
def test_every_parameter_has_one_place(with_muon: bool):
    model, optim = build(muon=with_muon)
    in_adamw = [id(p) for group in optim.adamw.param_groups for p in group["params"]]
    in_muon = [id(optim.params[n]) for n in optim.muon_names]
    assert bool(in_muon) == with_muon
    assert sorted(in_adamw + in_muon) == sorted(id(p) for p in model.parameters())
    assert set(optim.tables) == {"layers.1.memory.table", "layers.2.memory.table"}


def test_groups_follow_the_metadata():
    model, optim = build(weight_decay=0.3, muon=True)
    optim.set_lr(0.2)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optim.adamw.param_groups:
        for name in (names[id(p)] for p in group["params"]):
            meta = optim.meta[name]
            assert group["weight_decay"] == (0.3 if meta.decay else 0.0), name
            assert group["lr"] == pytest.approx(0.2 * meta.lr_mult), name
    by_name = {names[id(p)]: g for g in optim.adamw.param_groups for p in g["params"]}
    assert by_name["layers.0.mixer.rate"]["lr"] == pytest.approx(0.1)
    assert by_name["layers.0.mixer.norm.weight"]["weight_decay"] == 0
    assert by_name["embed.weight"]["weight_decay"] == 0
    assert set(optim.muon_names) >= {"layers.1.mixer.qkv.weight", "layers.0.mixer.value.weight"}
    assert all(model.get_parameter(n).ndim == 2 for n in optim.muon_names)
    assert not {"embed.weight", "layers.1.channel.slots"} & set(optim.muon_names)


def test_adamw_is_torchs():
    model, optim = build(PLAIN, weight_decay=0.1)
    twin, _ = build(PLAIN)
    matrices = [p for n, p in twin.named_parameters() if p.ndim == 2 and n != "embed.weight"]
    others = [p for n, p in twin.named_parameters() if p.ndim != 2 or n == "embed.weight"]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(6):
        advance(model, optim, range(step, step + 1))
        backward(twin, step)
        plain.step()
        plain.zero_grad()
    before, _ = build(PLAIN)
    for (name, p), q, start in zip(model.named_parameters(), twin.parameters(), before.parameters(), strict=True):
        assert rel_err(p, q) < 1e-6, name
        assert rel_err(p, start) > 1e-3, name


def test_a_table_moves_by_its_own_rate():
    """Adam's first step has the size of the rate, whatever the gradient: five times the base for the touched rows."""
    model, optim = build()
    table = optim.tables["layers.1.memory.table"]
    before = table.state_dict()["values"].clone()
    optim.set_lr(1e-3)
    backward(model, 0)
    rows, grad = table.take_grad()
    optim.step()
    moved = table.state_dict()["values"] - before
    touched = torch.zeros(table.rows, dtype=torch.bool)
    touched[rows] = True
    assert not moved[~touched].any()
    strong = grad.abs() > 1e-4
    assert strong.any()
    assert torch.allclose(moved[rows][strong].abs(), torch.tensor(5e-3), rtol=1e-2)


# -- Muon


@pytest.mark.parametrize("shape", [(8, 8), (24, 6), (6, 24), (40, 40)])
def test_orthogonalize(shape: tuple[int, int]):
    g = torch.randn(2, *shape, dtype=torch.float64)
    found = muon.orthogonalize(g).double()
    assert found.shape == g.shape
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.25
    assert values.median() > 0.65
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    core = u.mT @ found @ vt.mT
    assert rel_err(core, torch.diag_embed(torch.diagonal(core, dim1=-2, dim2=-1))) < 1e-3
    kept = s / s.amax(dim=-1, keepdim=True) > 0.05
    assert torch.diagonal(core, dim1=-2, dim2=-1)[kept].min() > 0.4


def reference_muon(p: Tensor, grads: list[Tensor], lr: float, decay: float, momentum: float) -> Tensor:
    """Written out for one matrix [R, C] (arXiv:2502.16982, algorithm 1 with Nesterov's momentum as an average)."""
    m = torch.zeros_like(p)
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        update = momentum * m + (1 - momentum) * g
        x = update / (update.norm() + 1e-7)
        x = x.T if p.shape[0] > p.shape[1] else x
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
        x = x.T if p.shape[0] > p.shape[1] else x
        p = p * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(p.shape)) * x
    return p


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_muon_is_the_written_out_form(shape: tuple[int, int]):
    start, grads = torch.randn(shape), [torch.randn(shape) for _ in range(4)]
    p = start.clone().requires_grad_()
    optimizer = muon.Muon(0.9)
    for g in grads:
        p.grad = g
        optimizer.step({"p": p}, {}, {"p": 0.1}, {"p": 0.2})
    assert rel_err(p, reference_muon(start, grads, 0.1, 0.2, 0.9)) < 1e-4


def test_muon_treats_stacks_and_splits_one_by_one():
    """q|k|v in one matrix, a stack of experts, and the same matrices alone: equal updates, in one batched call or many."""
    parts = [torch.randn(4, 6), torch.randn(2, 6), torch.randn(2, 6)]
    grads = [torch.randn_like(p) * 10**i for i, p in enumerate(parts)]
    alone = {str(i): p.clone().requires_grad_() for i, p in enumerate(parts)}
    fused = torch.cat(parts).requires_grad_()
    stack = torch.stack(parts[1:]).requires_grad_()
    for i, g in enumerate(grads):
        alone[str(i)].grad = g
    fused.grad, stack.grad = torch.cat(grads), torch.stack(grads[1:])
    together = {"fused": fused, "stack": stack}
    muon.Muon().step(alone, {}, dict.fromkeys(alone, 0.1), dict.fromkeys(alone, 0.0))
    muon.Muon().step(together, {"fused": (4, 2, 2)}, dict.fromkeys(together, 0.1), dict.fromkeys(together, 0.0))
    assert rel_err(fused, torch.cat(list(alone.values()))) < 1e-5
    assert rel_err(stack, torch.stack([alone["1"], alone["2"]])) < 1e-5
    whole = torch.cat(parts).requires_grad_()
    whole.grad = torch.cat(grads)
    muon.Muon().step({"w": whole}, {}, {"w": 0.1}, {"w": 0.0})
    assert rel_err(whole, fused) > 1e-2


def test_muon_uses_the_splits_of_the_parts():
    model, optim = build(muon=True)
    assert optim.meta["layers.1.mixer.qkv.weight"].splits == (16, 16, 16)
    twin, _ = build()
    backward(model, 0)
    qkv = model.get_parameter("layers.1.mixer.qkv.weight")
    assert qkv.grad is not None
    g, start = qkv.grad.clone(), twin.get_parameter("layers.1.mixer.qkv.weight").detach()
    optim.set_lr(0.05)
    optim.step()
    expected = [reference_muon(p, [u], 0.05, 0.1, 0.95) for p, u in zip(start.split(16), g.split(16), strict=True)]
    assert rel_err(qkv, torch.cat(expected)) < 1e-4


# -- norm and clipping


def test_norm_and_clip_include_tables():
    model, optim = build(clip=0.01)
    backward(model, 0, scale=3.0)
    backward(model, 1, scale=3.0)
    parameters = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    rows = []
    for table in optim.tables.values():
        dense = torch.zeros(table.rows, table.width)
        for r, g in table._pending:
            dense.index_add_(0, r, g)
        rows.append(dense.flatten())
    assert all(r.any() for r in rows)
    expected = torch.cat(parameters + rows).double().norm()
    before = torch.cat(parameters + rows).clone()
    norm = optim.grad_norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    assert norm.item() > torch.cat(parameters).norm().item()
    optim.clip(norm)
    assert optim.grad_norm().item() == pytest.approx(0.01, rel=1e-3)
    after = torch.cat(
        [
            *parameters,
            *(torch.zeros(t.rows, t.width).index_add(0, *t.take_grad()).flatten() for t in optim.tables.values()),
        ]
    )
    assert rel_err(after, before * 0.01 / norm) < 1e-3


def test_clip_leaves_small_gradients_alone():
    for clip in (0.0, 1e6):
        model, optim = build(clip=clip)
        backward(model, 0)
        before = [g.clone() for g in optim.grads()]
        optim.clip(optim.grad_norm())
        assert all(torch.equal(a, b) for a, b in zip(before, optim.grads(), strict=True))


# -- rows


def test_zero_rows():
    model, optim = build(muon=True)
    advance(model, optim, range(3))
    names = {"slots": "layers.1.channel.slots", "muon": "layers.1.mixer.qkv.weight", "table": "layers.1.memory.table"}
    rows = torch.tensor([0, 3])
    before = {k: t.clone() for k, t in optim.state_dict().items()}
    held = {k: t.clone() for k, t in optim.tables[names["table"]].state_dict().items()}
    optim.zero_rows([RowReset(name, rows) for name in names.values()])
    zeroed = {f"{names['slots']}/exp_avg", f"{names['slots']}/exp_avg_sq", f"{names['muon']}/momentum"}
    for key, tensor in optim.state_dict().items():
        if key in zeroed:
            assert before[key][rows].any()
            assert not tensor[rows].any()
            tensor[rows] = before[key][rows]
        assert torch.equal(tensor, before[key]), key
    for key, tensor in optim.tables[names["table"]].state_dict().items():
        rest = torch.ones(len(tensor), dtype=torch.bool)
        rest[rows] = key == "values"
        assert torch.equal(tensor[rest], held[key][rest]), key
        if key != "values":
            assert not tensor[rows].any()
    with pytest.raises(ValueError, match=r"layers\.1\.channel\.slotz.*layers\.1\.channel\.slots"):
        optim.zero_rows([RowReset("layers.1.channel.slotz", rows)])


# -- state


@pytest.mark.parametrize("with_muon", [False, True])
def test_a_step_shows_in_the_version_of_what_it_changed(with_muon: bool):
    """Caches of what follows from parameters alone are keyed on it; torch's fused AdamW leaves it as it was."""
    model, optim = build(muon=with_muon)
    before = {n: (p._version, p.detach().clone()) for n, p in optim.params.items()}
    advance(model, optim, range(1))
    changed = {n for n, p in optim.params.items() if not torch.equal(p, before[n][1])}
    assert changed
    assert all(optim.params[n]._version > before[n][0] for n in changed)


@pytest.mark.parametrize("with_muon", [False, True])
def test_state_goes_round_to_the_bit(with_muon: bool):
    model, optim = build(muon=with_muon)
    advance(model, optim, range(3))
    twin, other = build(seed=1, muon=with_muon)
    advance(twin, other, range(7, 9))
    twin.load_state_dict(model.state_dict())
    for name, table in optim.tables.items():
        other.tables[name].load_state_dict(table.state_dict())
    other.load_state_dict({k: t.clone() for k, t in optim.state_dict().items()})
    advance(model, optim, range(3, 5))
    advance(twin, other, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    ours, theirs = optim.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[k]) for k, t in ours.items())


def test_state_of_another_model():
    """A model that gained a part keeps the moments of the rest; anything else that does not match is an error."""
    model, optim = build(PLAIN)
    advance(model, optim, range(2))
    grown = {**PLAIN, "at": {1: {"memory": {"kind": "tests.toy_memory:ToyHash"}}}}
    _, more = build(grown)
    more.load_state_dict(optim.state_dict())
    assert more.state_dict().keys() == optim.state_dict().keys()
    _, less = build({**PLAIN, "n_layers": 1})
    with pytest.raises(UserError, match=r"'layers\.1\.channel.*belongs to no parameter"):
        less.load_state_dict(optim.state_dict())
    less.load_state_dict(optim.state_dict(), strict=False)
    assert 0 < len(less.state_dict()) < len(optim.state_dict())
    _, other = build(PLAIN, muon=True)
    with pytest.raises(UserError, match=r"optim\.muon"):
        other.load_state_dict(optim.state_dict())
    other.load_state_dict(optim.state_dict(), strict=False)
    assert not any(k.endswith("momentum") for k in other.state_dict())


# -- schedule


def test_schedule_values():
    def cosine(s: int) -> float:
        return factor(s, 101, "cosine", 10, 0.2, 0.1)

    def wsd(s: int) -> float:
        return factor(s, 100, "wsd", 10, 0.2, 0.0)

    assert [cosine(s) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert cosine(10) == 1.0
    assert cosine(55) == pytest.approx(0.55)
    assert cosine(100) == pytest.approx(0.1)
    assert [wsd(s) for s in (9, 10, 79, 80)] == [1.0] * 4
    assert wsd(99) == 0.0
    assert wsd(90) == pytest.approx(9 / 19)
    assert {factor(s, 50, "constant", 0, 0.2, 0.1) for s in range(50)} == {1.0}
    for kind in ("cosine", "wsd"):
        later = [factor(s, 60, kind, 5, 0.3, 0.2) for s in range(5, 60)]
        assert later == sorted(later, reverse=True)
        assert later[-1] == pytest.approx(0.2)
        assert math.isfinite(factor(0, 1, kind, 0, 0.2, 0.1))


def test_rate_reads_warmup_as_steps_or_share():
    assert OptimConfig(lr=2.0, warmup=0.1).rate(4, 100) == pytest.approx(1.0)
    assert OptimConfig(lr=2.0, warmup=20).rate(4, 100) == pytest.approx(0.5)
    assert OptimConfig(lr=2.0, warmup=0).rate(0, 100) == 2.0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"schedule": "cosin"}, "cosine"),
        ({"lr": 0.0}, "optim.lr"),
        ({"betas": (0.9,)}, "two numbers"),
        ({"betas": (0.9, 1.0)}, "two numbers"),
        ({"clip": -1.0}, "optim.clip"),
        ({"floor": 2.0}, "optim.floor"),
        ({"lr": float("nan")}, "optim.lr"),
    ],
)
def test_bad_settings(wrong: dict, words: str):
    with pytest.raises(UserError, match=words):
        OptimConfig(**wrong)


# -- freezing


def test_freeze():
    model, optim = build(muon=True)
    frozen = interventions.freeze(optim, ["layers.*.mixer.*", "layers.1.memory.table"])
    mixers = {n: p for n, p in model.named_parameters() if ".mixer." in n}
    assert frozen == sum(p.numel() for p in mixers.values()) + 31 * 4
    before = {n: p.clone() for n, p in model.named_parameters()}
    tables = {n: t.state_dict()["values"].clone() for n, t in optim.tables.items()}
    backward(model, 0)
    assert len(optim.grads()) == len(before) - len(mixers) + 1
    optim.step()
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert still == set(mixers)
    moved = {n for n, t in optim.tables.items() if not torch.equal(t.state_dict()["values"], tables[n])}
    assert moved == {"layers.2.memory.table"}
    interventions.set_learning(optim, ["layers.1.memory.table"], True)
    assert not optim.frozen


def test_freeze_refuses_nonsense():
    _, optim = build()
    with pytest.raises(UserError, match=r"'layers\.\*\.mixr\.\*'"):
        interventions.freeze(optim, ["layers.*.mixr.*"])
    with pytest.raises(UserError, match="nothing is left to learn"):
        interventions.freeze(optim, ["*"])


def test_meta_decides_what_muon_takes():
    """Only matrices whose part leaves the choice open."""
    _, optim = build(muon=True)
    for name, meta in optim.meta.items():
        assert (name in optim.muon_names) == (meta.role == "matrix" and meta.optimizer == "auto"), name
    assert ParamMeta().role == "matrix"


# -- steps that must not happen


@dataclass(frozen=True)
class Poison:
    """Spoils one gradient of step ``at``, and notes a hash of everything that learns or remembers before every step."""

    kind: str
    log: str
    at: int = -1

    def __call__(self, step: int, total: int, model: LM, optim: Optimizer) -> None:
        held = {n: t for n, t in model.state_dict().items() if n != "progress"} | optim.state_dict()
        for name, table in optim.tables.items():
            held |= {f"{name}/{key}": t for key, t in table.state_dict().items()}
        digest = hashlib.sha256()
        for name in sorted(held):
            digest.update(name.encode() + held[name].numpy().tobytes())
        with Path(self.log).open("a") as file:
            file.write(f"{step} {digest.hexdigest()}\n")
        if step == self.at:
            p = model.get_parameter("layers.1.mixer.out.weight")
            handle = p.register_hook(lambda g: handle.remove() or g * float("nan"))


def test_a_nonfinite_step_changes_nothing(tmp_path: Path):
    log = tmp_path / "hashes"
    poison = {"kind": "tests.test_optim:Poison", "at": 3, "log": str(log)}
    section = {"steps": 8, "interventions": [poison], "save_every": 100}
    config = write_config(tmp_path, TOYS, train=section, optim={"muon": True})
    result = train(config, "--allow-foreign", fault=Fault(IN_STEP, 5, "after", number=15))
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "small"
    result = train("--resume", run, "--allow-foreign")
    assert result.code == 0, result.err
    assert "1 non-finite steps were skipped" in result.err
    hashes = dict(line.split() for line in log.read_text().splitlines())
    assert len(hashes) == 8
    assert hashes["4"] == hashes["3"], "the spoiled step changed something"
    assert len(set(hashes.values())) == 7, "another step changed nothing"
    lines = [line for line in metrics(run) if "loss" in line]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [line["grad_norm"] is None for line in lines] == [False] * 3 + [True] + [False] * 4, "null stands for NaN"


def test_interventions_are_checked(tmp_path: Path):
    with pytest.raises(UserError, match="did you mean 'unfreeze'"):
        interventions.build([{"kind": "unfreze"}])
    with pytest.raises(UserError, match="No module named 'nowhere'"):
        interventions.build([{"kind": "nowhere:Thing"}])
    with pytest.raises(UserError, match="unknown key"):
        interventions.build([{"kind": "unfreeze", "when": 3}])
    model, optim = build()
    (late,) = interventions.build([{"kind": "unfreeze", "pattern": "layers.0.*", "at": 2}])
    for step, learns in ((0, False), (1, False), (2, True)):
        late(step, 5, model, optim)
        assert all(p.requires_grad == (learns or not n.startswith("layers.0.")) for n, p in model.named_parameters())
    (lost,) = interventions.build([{"kind": "unfreeze", "pattern": "nothing.*"}])
    with pytest.raises(UserError, match="no parameter matches"):
        lost(0, 5, model, optim)
