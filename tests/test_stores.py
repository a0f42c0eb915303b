"""Row stores: all kinds give the same bits, all rules do what they say, and nothing of a table is lost or late."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.row_update import sinkhorn_update
from models.config import model_config
from models.errors import UserError
from models.lm import LM, build
from models.parsing import from_dict
from models.stores import StoreConfig, Table, build_store, host
from models.stores import base as stores_base
from models.stores.cache import RowCache
from models.stores.host import Host
from tests.tools import assert_close, random_batch, same_bytes, state_hash
from training import interventions
from training.optim import OptimConfig, Optimizer

ROWS, WIDTH = 211, 6
HYPER = (0.02, 0.9, 0.95, 1e-8)  # lr, beta1, beta2, eps
BY_ROW = ("rowwise", "lazy_adam", "adam")
HOSTS = {
    "host": {},
    "host-lru": {"cache_rows": 40, "cache_policy": "lru"},
    "host-lfu": {"cache_rows": 40, "cache_policy": "lfu"},
    "host-one": {"cache_rows": 1},
    "host-all": {"cache_rows": 1000},
}


def _store(kind: str = "resident", rule: str = "rowwise", rows: int = ROWS, width: int = WIDTH, **changes: Any) -> Any:
    """``kind``: of a store, or of a host store with a cache."""
    cfg = StoreConfig(kind=kind.partition("-")[0], rule=rule, **HOSTS.get(kind, {}), **changes)
    table = build_store(cfg, rows, width)
    table.reset(torch.Generator().manual_seed(3))
    return table


def _addresses(step: int, shape: tuple[int, ...] = (4, 9, 3)) -> Tensor:
    """A few rows often, most rarely, the last ones never."""
    generator = torch.Generator().manual_seed(step)
    return (torch.rand(shape, generator=generator).pow(3) * (ROWS - 10)).long()


def _advance(table: Table, steps: range, device: str = "cpu") -> list[Tensor]:
    """Training as the loop does it: two lookups that are under way together, backward, one step. -> everything seen."""
    seen = []
    for i in steps:
        rows = [_addresses(2 * i).to(device), _addresses(2 * i + 1, (5, 2)).to(device)]
        begun = [table.prefetch(r) for r in rows]
        values = [table.wait(v) for v in begun]
        for v, r in zip(values, rows):
            v.backward(torch.randn(v.shape, generator=torch.Generator().manual_seed(int(r.sum()))).to(device))
        found: Any = table.take_grad()
        table.step(*found, *HYPER)
        table.clear_grad()
        with torch.no_grad():
            seen += [*(v.detach() for v in values), *found, table.fetch(_addresses(99).to(device))]
    return seen


# -- all kinds alike


@pytest.mark.parametrize("rule", BY_ROW)
@pytest.mark.parametrize("kind", [*HOSTS, "far", "far-lfu"])
def test_host_is_resident_to_the_bit(kind: str, rule: str, monkeypatch: pytest.MonkeyPatch):
    """Values, gradients, tables and moments over training, a load, writes from outside, and forgotten moments. ``far``: no
    kernel changes rows where they are, so they travel."""
    if kind.startswith("far"):
        kind = kind.replace("far", "host")
        monkeypatch.setattr(host, "reaches", lambda *_: False)
    monkeypatch.setattr(stores_base, "BLOCK", 64)
    tables = [_store(k, rule) for k in ("resident", kind)]
    assert same_bytes(*(t.state_dict() for t in tables))
    assert same_bytes(*(_advance(t, range(4)) for t in tables))
    for table in tables:
        with torch.inference_mode():
            assert torch.equal(table.read(_addresses(1)), table.state_dict()["values"][_addresses(1)])
        table.zero_moments(torch.tensor([0, 7, 3]))
        table.state_dict()["values"][:5] += 1.0
    assert same_bytes(*(_advance(t, range(4, 6)) for t in tables))
    for table in tables:
        table.load_state_dict(_store(rule=rule).state_dict())
    assert same_bytes(*(_advance(t, range(6, 8)) for t in tables))
    assert same_bytes(*(t.state_dict() for t in tables))


@pytest.mark.cuda
@pytest.mark.parametrize("rule", BY_ROW)
@pytest.mark.parametrize("kind", HOSTS)
def test_host_is_resident_on_a_gpu(kind: str, rule: str):
    """The same beside a model on a GPU, with the stream kept busy: nobody reads values that have not arrived."""
    tables = [_store(k, rule) for k in ("resident", kind)]
    for table in tables:
        table.apply(lambda t: t.cuda())
    assert all(t.is_pinned() for t in tables[1].state_dict().values())
    busy = torch.randn(2048, 2048, device="cuda")
    seen = []
    for table in tables:
        for _ in range(20):
            busy = torch.tanh(busy @ busy)
        seen.append(_advance(table, range(6), "cuda"))
    assert same_bytes(*seen)
    assert same_bytes(*(t.state_dict() for t in tables))


@pytest.mark.parametrize("kind", ["host", "host-lfu"])
def test_a_model_with_a_host_table_is_one_with_a_resident_table(kind: str):
    """Also with recomputed activations, several micro-batches and evaluation between the steps."""
    models = [_model(kind=k) for k in ("resident", kind)]
    assert state_hash(models[0]) == state_hash(models[1])
    said = []
    for model in models:
        optim = Optimizer(model, OptimConfig(lr=0.01))
        model.recompute = model is models[1]
        losses = [_train_step(model, optim, [random_batch(2, 9, seed=2 * i + j) for j in range(2)]) for i in range(4)]
        with torch.no_grad():
            said.append([*losses, model(random_batch(1, 20)).losses["lm"]])
    assert torch.equal(torch.stack(said[0]), torch.stack(said[1]))
    assert state_hash(models[0]) == state_hash(models[1])


def test_initial_rows_are_those_of_one_draw():
    """Block by block, so that no store needs the whole table at once."""
    rows = stores_base.BLOCK + 48
    table = _store(rows=rows, width=3)
    drawn = torch.empty(rows, 3).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(3))
    assert torch.equal(table.state_dict()["values"], drawn)
    assert not table.state_dict()["v"].any()


# -- rules


def test_adam_is_adam():
    """The paper's: an embedding with dense gradients; rows without gradient move on their momentum."""
    table = _store(rule="adam")
    weight = torch.nn.Parameter(table.state_dict()["values"].clone())
    adam = torch.optim.Adam([weight], lr=HYPER[0], betas=HYPER[1:3], eps=HYPER[3])
    for i in range(6):
        rows = _addresses(i)
        grad = torch.randn(*rows.shape, WIDTH)
        table.fetch(rows).backward(grad)
        weight.grad = torch.zeros_like(weight).index_add(0, rows.flatten(), grad.flatten(0, -2))
        before = table.state_dict()["values"].clone()
        found: Any = table.take_grad()
        table.step(*found, *HYPER)
        table.clear_grad()
        adam.step()
        assert_close(table.state_dict()["values"], weight.detach(), "forms", torch.float32)
    rest = torch.ones(ROWS, dtype=torch.bool)
    rest[found[0]] = False
    moved = (table.state_dict()["values"] != before).all(dim=1)
    assert moved[rest & (table.state_dict()["v"] > 0).any(dim=1)].all()
    assert rest[ROWS - 10 :].all()
    assert not moved[ROWS - 10 :].any(), "never touched, so no momentum"


def test_sinkhorn_balances_the_whole_table():
    table, momentum = _store(rule="sinkhorn"), torch.zeros(ROWS, WIDTH)
    values = table.state_dict()["values"].clone()
    for i in range(3):
        rows = _addresses(i)
        table.fetch(rows).sum().backward()
        dense = torch.zeros(ROWS, WIDTH).index_add(0, rows.flatten(), torch.ones(rows.numel(), WIDTH))
        found: Any = table.take_grad()
        table.step(*found, *HYPER)
        table.clear_grad()
        sinkhorn_update(values, momentum, dense, HYPER[0])
    assert same_bytes(table.state_dict(), {"values": values, "m": momentum})
    table.zero_moments(torch.arange(ROWS))
    assert not table.state_dict()["m"].any()
    with pytest.raises(UserError, match="balances a whole table in one place"):
        StoreConfig(kind="host", rule="sinkhorn")


@pytest.mark.parametrize("kind", ["resident", "host-lru"])
@pytest.mark.parametrize("rule", ["rowwise", "lazy_adam"])
def test_lazy_rules_leave_the_other_rows_alone(kind: str, rule: str):
    table = _store(kind, rule)
    _advance(table, range(3))
    before = {k: t.clone() for k, t in table.state_dict().items()}
    table.fetch(torch.tensor([5, 5, 8])).sum().backward()
    found: Any = table.take_grad()
    table.step(*found, *HYPER)
    for name, t in table.state_dict().items():
        changed = (t != before[name]).view(ROWS, -1).any(dim=1)
        assert changed.nonzero().flatten().tolist() == [5, 8], name


def test_zeroed_moments_begin_anew():
    """A row that was replaced steps like one that was never touched, under every rule."""
    for rule in BY_ROW:
        table = _store(rule=rule)
        _advance(table, range(5))
        table.zero_moments(torch.tensor([2]))
        before = table.state_dict()["values"][2].clone()
        table.step(torch.tensor([2]), torch.full((1, WIDTH), 0.3), *HYPER)
        moved = table.state_dict()["values"][2] - before
        assert_close(moved, torch.full((WIDTH,), -HYPER[0]), "forms", torch.float32)


def test_narrow_tables_are_read_and_do_not_learn():
    """In bf16 a step of 1e-3 of a value is lost; moments keep fp32, so that a table can come back."""
    for kind in ("resident", "host"):
        table = _store(kind)
        wide = table.state_dict()["values"].clone()
        table.apply(lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t)
        assert {k: t.dtype for k, t in table.state_dict().items()} == {
            "values": torch.bfloat16,
            "v": torch.float32,
            "steps": torch.int32,
        }
        rows = _addresses(0)
        assert torch.equal(table.fetch(rows), wide.bfloat16()[rows])
        table.fetch(rows).sum().backward()
        found: Any = table.take_grad()
        assert found[1].dtype == torch.float32
        with pytest.raises(UserError, match=r"bfloat16 cannot learn.*keep it in float32"):
            table.step(*found, *HYPER)


def test_wide_tables_learn_in_their_precision():
    table = _store(rule="lazy_adam")
    table.apply(lambda t: t.double() if t.is_floating_point() else t)
    _advance(table, range(2))
    assert {t.dtype for t in table.state_dict().values()} == {torch.float64, torch.int32}


# -- in the model and its optimizer


def _model(kind: str = "resident", rule: str = "rowwise", dtype: torch.dtype = torch.float32) -> LM:
    store = {"kind": kind.partition("-")[0], "rule": rule, **HOSTS.get(kind, {})}
    memory = {"kind": "engram", "heads": 2, "row_width": 4, "base": 17, "compression": "none", "store": store}
    raw = {
        "d_model": 16,
        "n_layers": 3,
        "vocab_size": 23,
        "blocks": {"a": {"mixer": {"kind": "attention", "heads": 2}}},
        "at": {1: {"memory": memory}, 2: {"memory": memory}},
    }
    return build(model_config(raw), dtype=dtype)


def _train_step(model: LM, optim: Optimizer, batches: list[Any]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = model(batch).losses["lm"] / len(batches)
        loss.backward()
        total += loss.detach()
    optim.clip(optim.grad_norm())
    optim.step()
    optim.zero_grad()
    return total


@pytest.mark.parametrize("rule", BY_ROW)
def test_tables_learn_five_times_as_fast_without_decay_or_muon(rule: str):
    model = _model(rule=rule)
    optim = Optimizer(model, OptimConfig(lr=1e-3, weight_decay=0.5, muon=True))
    tables = model.tables()
    assert set(tables) == {"layers.1.memory.table", "layers.2.memory.table"}
    assert not set(tables) & {*optim.muon_names, *optim.params}
    assert all((t.meta.lr_mult, t.meta.decay) == (5.0, False) for t in tables.values())
    before = {n: t.state_dict()["values"].clone() for n, t in tables.items()}
    optim.set_lr(1e-3)
    model(random_batch(2, 9)).losses["lm"].backward()
    grads = {n: t.take_grad() for n, t in tables.items()}
    optim.step()
    for name, (rows, grad) in grads.items():
        moved = tables[name].state_dict()["values"] - before[name]
        rest = torch.ones(len(moved), dtype=torch.bool)
        rest[rows] = False
        assert not moved[rest].any()
        size = grad.square().mean(dim=1).sqrt() if rule == "rowwise" else grad.abs()
        expected = -5e-3 * grad / size.view(len(rows), -1)  # the first step of Adam
        strong = (size > 1e-5).view(len(rows), -1).all(dim=1)
        assert strong.any()
        assert torch.allclose(moved[rows][strong], expected[strong], rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("kind", ["resident", "host-lfu"])
def test_a_compiled_model_reads_and_learns_the_same(kind: str):
    """The compiler must not reorder, repeat or forget what happens in a store."""
    plain, compiled = (_model(kind) for _ in range(2))
    compiled.compile(backend="eager")
    optims = [Optimizer(m, OptimConfig(lr=2e-3)) for m in (plain, compiled)]
    for i in range(6):
        losses = [_train_step(m, o, [random_batch(2, 9, seed=i)]) for m, o in zip((plain, compiled), optims)]
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    for name, table in plain.tables().items():
        assert torch.equal(table.state_dict()["steps"], compiled.tables()[name].state_dict()["steps"])


@pytest.mark.parametrize("kind", ["resident", "host-lfu"])
def test_micro_batches_are_one_batch(kind: str):
    """Twenty steps of four micro-batches = of one batch; one row's gradients come from several of them. In fp64, because the first
    steps of Adam and the slope of the gate at zero make something of the last bits."""
    whole, parts = (_model(kind, dtype=torch.float64) for _ in range(2))
    optims = [Optimizer(m, OptimConfig(lr=2e-3)) for m in (whole, parts)]
    for i in range(20):
        batch = random_batch(4, 9, seed=i)
        pieces = [type(batch)(*(None if t is None else t[j : j + 1] for t in batch)) for j in range(4)]
        losses = _train_step(whole, optims[0], [batch]), _train_step(parts, optims[1], pieces)
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-9)
    for name, table in whole.tables().items():
        ours, theirs = (t.state_dict() for t in (table, parts.tables()[name]))
        assert torch.equal(ours["steps"], theirs["steps"])
        assert_close(ours["values"], theirs["values"], "forms", torch.float32)


def test_frozen_tables_stay():
    model = _model()
    optim = Optimizer(model, OptimConfig())
    interventions.freeze(optim, ["layers.1.memory.table"])
    before = {n: t.state_dict()["values"].clone() for n, t in model.tables().items()}
    _train_step(model, optim, [random_batch(2, 9)])
    same = {n: torch.equal(t.state_dict()["values"], before[n]) for n, t in model.tables().items()}
    assert same == {"layers.1.memory.table": True, "layers.2.memory.table": False}


def test_gradients_are_summed_once_a_step(monkeypatch: pytest.MonkeyPatch):
    """Norm, clip and step look at the same sums; what comes later is added to them."""
    from models import rows as module

    calls, real = [], module.sum_rows
    monkeypatch.setattr(module, "sum_rows", lambda *args: calls.append(1) or real(*args))
    table = _store()
    for rows in ([4, 1, 4], [4, 2]):
        table.fetch(torch.tensor(rows)).sum().backward()
        first, second = table.take_grad(), table.take_grad()
        assert first is second
    assert len(calls) == 2
    rows, grad = table.take_grad()
    assert (rows.tolist(), grad[:, 0].tolist()) == ([1, 2, 4], [1.0, 1.0, 3.0])


# -- the cache


def test_cache_keeps_the_recent_or_the_frequent():
    """Against a cache that looks at one row after the other."""
    for policy in ("lru", "lfu"):
        cache = RowCache(8, 2, policy, torch.float32, torch.device("cpu"))
        table = torch.randn(60, 2)
        held: dict[int, tuple[int, int]] = {}  # row: (uses, last)
        generator = torch.Generator().manual_seed(1)
        for clock in range(1, 60):
            rows = (torch.rand(3, generator=generator).square() * 60).long().unique()
            slots = cache.find(rows)
            assert [s >= 0 for s in slots.tolist()] == [r in held for r in rows.tolist()]
            assert torch.equal(cache.values[slots[slots >= 0]], table[rows[slots >= 0]])
            new = [r for r in rows.tolist() if r not in held]
            for r in set(rows.tolist()) - set(new):
                held[r] = held[r][0] + 1, clock
            cache.look(slots[slots >= 0], rows[slots < 0], table[rows[slots < 0]])
            while len(held) + len(new) > 8:
                worth = {r: (last,) if policy == "lru" else (uses, last) for r, (uses, last) in held.items()}
                least = min(worth.values())
                tied = [r for r, w in worth.items() if w == least]
                gone = set(tied) - set(cache.rows.tolist())  # rows that came in one lookup are worth the same
                assert gone, (policy, least)
                del held[gone.pop()]
            held |= dict.fromkeys(new, (1, clock))
            assert set(held) == {r for r in cache.rows.tolist() if r < 60}
            changed = rows[:1]
            table[changed] += 1
            cache.refresh(changed, table.__getitem__)


def test_measured_traffic():
    """Bytes of distinct rows that the cache did not have, and the hits among them."""
    plain, cached = _store("host"), _store("host-all")
    rows = [torch.tensor([[3, 3, 4]]), torch.tensor([[4, 5, 5, 5]])]
    with torch.no_grad():
        for table in (plain, cached):
            for r in rows:
                table.fetch(r)
    row = WIDTH * 4
    assert plain.stats()["bytes_to_device"] == 4 * row
    found = cached.stats()
    assert found["wait_s"] >= 0
    assert {k: v for k, v in found.items() if k != "wait_s"} == {
        "lookups": 7,
        "distinct": 4,
        "hits": 1,
        "hit_rate": 0.25,
        "bytes_to_device": 3 * row,
        "bytes_to_host": 0,
    }
    assert _store("host").stats()["hit_rate"] == 0
    cached.step(torch.tensor([3, 9]), torch.ones(2, WIDTH), *HYPER)
    found = cached.stats()
    assert (
        found["bytes_to_device"] == 3 * row + 2 * (row + 4 + 4) + row
    )  # both with v and steps; the one that the cache holds
    assert found["bytes_to_host"] == 2 * (row + 4 + 4)


# -- in the background


class _Gate:
    """Holds the background thread until it is opened."""

    def __init__(self, table: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, fill = threading.Event(), table._fill
        self.jobs: list[str] = []
        learn = table._learn

        def slow(*args: Any) -> None:
            assert self.open.wait(30)
            self.jobs.append("fill")
            fill(*args)

        def noted(*args: Any) -> None:
            self.jobs.append("learn")
            learn(*args)

        monkeypatch.setattr(table, "_fill", slow)
        monkeypatch.setattr(table, "_learn", noted)


def test_a_prefetch_does_not_hold_up_its_caller(monkeypatch: pytest.MonkeyPatch):
    """Whoever asked goes on; who waits gets the values; jobs are done in the order in which they were asked for."""
    table = _store("host")
    expected = table.state_dict()["values"].clone()
    gate = _Gate(table, monkeypatch)
    rows = torch.tensor([1, 2])
    values = table.prefetch(rows)
    table.update(rows, torch.ones(2, WIDTH), "rowwise", stores_base.Hyper(*HYPER))
    later = table.prefetch(rows)
    assert not gate.jobs
    threading.Timer(0.05, gate.open.set).start()
    assert torch.equal(table.wait(values), expected[rows])
    assert table.stats()["wait_s"] > 0
    assert gate.jobs == ["fill", "learn", "fill"]
    assert_close(table.wait(later).detach(), expected[rows] - HYPER[0], "forms", torch.float32)
    assert table.wait(later) is later, "a second wait finds nothing to wait for"


def test_errors_in_the_background_arrive(monkeypatch: pytest.MonkeyPatch):
    table = _store("host")
    with pytest.raises(IndexError):
        table.fetch(torch.tensor([ROWS]))
    table = _store("host")
    table.update(torch.tensor([ROWS]), torch.ones(1, WIDTH), "rowwise", stores_base.Hyper(*HYPER))
    with pytest.raises((IndexError, RuntimeError)):
        table.state_dict()


def test_copies_do_not_share():
    """A copy taken while work is under way is a table of its own, finished."""
    table = _store("host-lfu")
    table.update(torch.tensor([1]), torch.ones(1, WIDTH), "rowwise", stores_base.Hyper(*HYPER))
    twin = copy.deepcopy(table)
    assert same_bytes(table.state_dict(), twin.state_dict())
    _advance(twin, range(1))
    assert not same_bytes(table.state_dict(), twin.state_dict())


# -- config and checkpoints


def test_tables_follow_the_model():
    """Made on meta without memory, then real; a host table stays on the host."""
    for kind in ("resident", "host"):
        with torch.device("meta"):
            table = build_store(StoreConfig(kind=kind), 10**9, 64)
        assert all(t.is_meta for t in table.state_dict().values())
        with torch.device("meta"):
            table = build_store(StoreConfig(kind=kind), ROWS, WIDTH)
        table.apply(lambda t: torch.empty_like(t, device="cpu"))
        table.reset(torch.Generator().manual_seed(3))
        assert same_bytes(table.state_dict(), _store().state_dict())


def test_states_that_do_not_fit():
    table = _store()
    with pytest.raises(UserError, match="has 'm', which rule=rowwise does not know"):
        table.load_state_dict(_store(rule="lazy_adam").state_dict())
    with pytest.raises(UserError, match="has no 'm', which rule=lazy_adam needs"):
        _store(rule="lazy_adam").load_state_dict(table.state_dict())
    with pytest.raises(UserError, match=r"'values' has shape \[5, 6\], the table \[211, 6\]"):
        table.load_state_dict(_store(rows=5).state_dict())


@pytest.mark.parametrize("kind", ["resident", "host-all"])
def test_values_of_another_rule(kind: str):
    """What another run learned, without its moments."""
    source, table = _store(rule="lazy_adam"), _store(kind)
    for t in (source, table):
        _advance(t, range(2))
    table.load_values(source.state_dict()["values"])
    found = table.state_dict()
    assert torch.equal(found["values"], source.state_dict()["values"])
    assert torch.equal(table.read(_addresses(0)), found["values"][_addresses(0)])
    assert not found["v"].any()
    assert not found["steps"].any()


def test_config_errors_name_the_nearest():
    for raw, words in {
        ("kind", "residnet"): "unknown store kind 'residnet'; did you mean 'resident'",
        ("rule", "lazy-adam"): "unknown store rule 'lazy-adam'; did you mean 'lazy_adam'",
        ("cache_policy", "lru2"): "did you mean 'lru'",
        ("lr_mult", -1): "lr_mult must not be negative",
        ("cache_rows", 5): "a resident table has no cache",
        ("rules", "adam"): "unknown key 'store.rules'; did you mean 'rule'",
    }.items():
        with pytest.raises(UserError, match=words):
            from_dict(StoreConfig, dict([raw]), "store")
