"""Tables split over ranks: two to four gloo ranks are one rank with a whole table, and any number reads what any other wrote."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import models.folder
from eval.decoding import generate
from kernels.row_update import sum_rows
from models import LM, UserError, build, model_config
from models.folder import TABLES, load_model, load_weights, save_tables, save_weights, send_tables, table_blocks
from models.stores import KINDS, StoreConfig, build_store
from models.stores.sharded import Sharded, serving
from tests.runs import IN_STEP, PRELOAD, Fault, losses, metrics, tensors, train, write_config
from tests.tools import gradients, random_batch, rel_err, same_bytes, state_hash
from training import checkpoint
from training.optim import OptimConfig, Optimizer
from training.parallel import World, sync_gradients

ROWS, WIDTH = 211, 6
RULES = ("rowwise", "lazy_adam", "adam")  # sinkhorn is refused
HYPER = (0.02, 0.9, 0.95, 1e-8)  # lr, beta1, beta2, eps
ENGRAM = {"kind": "engram", "heads": 2, "row_width": WIDTH, "base": 61, "compression": "none"}
CPU = torch.device("cpu")


# -- several ranks


def on_ranks(size: int, folder: Path, job: Callable[..., Any], *args: Any) -> list[Any]:
    """``job(rank, *args)`` in as many processes of one gloo group -> what each returned."""
    folder = folder / f"{job.__name__}-{size}-{len(list(folder.iterdir()))}"
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    started = [context.Process(target=_rank, args=(rank, size, folder, job, args)) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    hung = [process for process in started if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, "ranks waited for each other"
    assert [process.exitcode for process in started] == [0] * size
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, folder: Path, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.save(job(rank, *args), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# -- the store


def _store(kind: str, rule: str = "rowwise", rows: int = ROWS) -> Any:
    table = build_store(StoreConfig(kind=kind, rule=rule), rows, WIDTH)
    table.reset(torch.Generator().manual_seed(3))
    return table


def _lookups(rank: int, step: int) -> list[tuple[Tensor, Tensor]]:
    """(rows, gradient) of two micro-batches: a few rows often, the last never; rank 1 has no tokens in odd steps."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    found = []
    for shape in ((4, 5, 3), (7, 2)):
        if rank == 1 and step % 2:
            shape = (0, *shape[1:])
        rows = (torch.rand(shape, generator=generator).pow(3) * (ROWS - 20)).long()
        found.append((rows, torch.randn(*shape, WIDTH, generator=generator)))
    return found


def _advance(rank: int, steps: int) -> dict[str, dict[str, Any]]:
    return {rule: _advance_by(rank, rule, steps) for rule in RULES}


def _advance_by(rank: int, rule: str, steps: int) -> dict[str, Any]:
    """A few steps on one rank -> what it saw, and what it owns."""
    table, seen = _store("sharded", rule), []
    for step in range(steps):
        values = []
        for rows, grad in _lookups(rank, step):
            values.append(table.fetch(rows))
            values[-1].backward(grad)
        table.average_grad()
        norm = table.grad_to_measure()
        rows, grad = table.take_grad()
        seen.append(([v.detach() for v in values], rows, grad.clone(), norm))
        table.step(rows, grad, *HYPER)
        table.clear_grad()
    table.zero_moments(torch.tensor([0, 3, ROWS - 1]))
    return {"seen": seen, "arrays": table.state_dict()}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_are_one_table(tmp_path: Path, size: int):
    """Against a resident table that is given the gradients as the ranks have them: the sum of each, added in their order, divided
    by their number. All bits are the same; those of one sum over all tokens are not, but the numbers are."""
    ranks = on_ranks(size, tmp_path, _advance, 3)
    for rule in RULES:
        _assert_one_table([found[rule] for found in ranks], rule, 3)


def _assert_one_table(ranks: list[dict[str, Any]], rule: str, steps: int) -> None:
    size = len(ranks)
    table = _store("resident", rule)
    for step in range(steps):
        lookups = [_lookups(rank, step) for rank in range(size)]
        parts = []
        for found, micro in zip(ranks, lookups, strict=True):
            for value, (rows, grad) in zip(found["seen"][step][0], micro, strict=True):
                assert same_bytes(value, table.read(rows))
                table.collect(rows, grad)
            parts.append(table.take_grad())
            table.clear_grad()
        rows, grad = sum_rows(torch.cat([r for r, _ in parts]), torch.cat([g for _, g in parts]))
        grad = grad / size
        assert torch.equal(torch.cat([found["seen"][step][1] for found in ranks]), rows)
        assert torch.equal(torch.cat([found["seen"][step][2] for found in ranks]), grad)
        whole_rows, whole = sum_rows(
            torch.cat([r.flatten() for micro in lookups for r, _ in micro]),
            torch.cat([g.flatten(0, -2) for micro in lookups for _, g in micro]),
        )
        assert torch.equal(whole_rows, rows)
        assert rel_err(grad * size, whole) < 1e-6
        norms = [found["seen"][step][3] for found in ranks]
        assert all(torch.equal(norm, norms[0]) for norm in norms), "ranks must agree to the bit"
        assert rel_err(norms[0], grad.norm()) < 1e-6
        table.step(rows, grad, *HYPER)
    table.zero_moments(torch.tensor([0, 3, ROWS - 1]))
    for name, array in table.state_dict().items():
        assert same_bytes(torch.cat([found["arrays"][name] for found in ranks]), array), name


def test_on_one_rank_it_is_resident():
    assert not dist.is_initialized()
    for rule in RULES:
        sharded, resident = (_store(kind, rule) for kind in ("sharded", "resident"))
        for step in range(3):
            for table in (sharded, resident):
                for rows, grad in _lookups(0, step):
                    table.fetch(rows).backward(grad)
            sharded.average_grad()
            assert same_bytes(sharded.take_grad(), resident.take_grad())
            assert same_bytes(sharded.grad_to_measure(), resident.grad_to_measure())
            for table in (sharded, resident):
                table.step(*table.take_grad(), *HYPER)
                table.clear_grad()
        assert same_bytes(sharded.state_dict(), resident.state_dict())


def _few_rows(rank: int) -> Any:
    table = _store("sharded", rows=3)
    rows = torch.tensor([2, 0, 2, 1])
    values = table.fetch(rows)
    values.sum().backward()
    table.average_grad()
    table.step(*table.take_grad(), *HYPER)
    return values.detach(), table.own, table.read(rows)


def test_more_ranks_than_rows(tmp_path: Path):
    table, rows = _store("resident", rows=3), torch.tensor([2, 0, 2, 1])
    before = table.read(rows)
    table.step(torch.arange(3), torch.tensor([1.0, 1.0, 2.0])[:, None].expand(3, WIDTH).contiguous(), *HYPER)
    for rank, (values, own, after) in enumerate(on_ranks(4, tmp_path, _few_rows)):
        assert same_bytes(values, before)
        assert (own.start, own.stop) == (min(rank, 3), min(rank + 1, 3))
        assert same_bytes(after, table.read(rows))


def _no_lookups(rank: int) -> Any:
    """Nobody looked anything up, then only rank 0 did (the others answer)."""
    table = _store("sharded", "adam")
    table.average_grad()
    nothing = table.take_grad(), table.grad_to_measure()
    with serving({"t": table}):
        if rank == 0:
            table.fetch(torch.tensor([0, ROWS - 1])).sum().backward()
    table.average_grad()
    rows, grad = table.take_grad()
    return nothing, rows, grad, table.grad_to_measure()


def test_a_rank_without_tokens(tmp_path: Path):
    """A row without gradient steps under dense Adam, so ranks that got none must know whether anybody did."""
    ranks = on_ranks(3, tmp_path, _no_lookups)
    assert all(nothing == (None, None) for nothing, *_ in ranks)
    assert [rows.tolist() for _, rows, _, _ in ranks] == [[0], [], [ROWS - 1]]
    for _, rows, grad, norm in ranks:
        assert torch.equal(grad, torch.full((len(rows), WIDTH), 1 / 3))
        assert norm.item() == pytest.approx((2 * WIDTH) ** 0.5 / 3)


def _unequal(rank: int, size: int) -> list[Tensor]:
    tables = {name: _store("sharded", rows=rows) for name, rows in (("a", ROWS), ("b", 57))}
    found = []
    for _ in range(2):
        with serving(tables), torch.inference_mode():
            for _ in range((rank * 2) % size):
                found += [table.read(torch.arange(rank, 50)) for table in tables.values()]
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_who_is_through_answers_the_others(tmp_path: Path, size: int):
    whole = [_store("resident", rows=rows) for rows in (ROWS, 57)]
    for rank, found in enumerate(on_ranks(size, tmp_path, _unequal, size)):
        times = 2 * ((rank * 2) % size)
        assert same_bytes(found, [table.read(torch.arange(rank, 50)) for table in whole] * times)


def _out_of_step(rank: int) -> str:
    tables = {name: _store("sharded") for name in "ab"}
    with serving(tables):
        pass
    try:
        tables["ab"[rank]].read(torch.arange(5))
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_at_different_tables_are_told(tmp_path: Path):
    assert all("different tables" in said for said in on_ranks(2, tmp_path, _out_of_step))


# -- all kinds alike


def _every_kind(rank: int, folder: str) -> dict[str, list[Tensor]]:
    """Random rows from tables of all kinds that were loaded from one file."""
    found = {}
    for kind in KINDS:
        table: Any = build_store(StoreConfig(kind=kind), ROWS, WIDTH)
        table.load_file(Path(folder) / TABLES, "t")
        generator = torch.Generator().manual_seed(rank)
        shapes = [(3, 17, 4), (1, 1, 16), (ROWS,), (2, 0, 3)]
        found[kind] = [table.read(torch.randint(ROWS, shape, generator=generator)) for shape in shapes]
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_every_kind_returns_the_same_rows(tmp_path: Path, size: int):
    models.folder.write_tensors({f"t/{k}": t for k, t in _store("resident").state_dict().items()}, tmp_path / TABLES)
    for found in on_ranks(size, tmp_path, _every_kind, str(tmp_path)):
        assert found.keys() == set(KINDS)
        assert all(same_bytes(values, found["resident"]) for values in found.values())
        assert found["resident"][0].count_nonzero()


# -- in a model


def _model(kind: str, recompute: bool = False) -> LM:
    memory = {**ENGRAM, "store": {"kind": kind, "rule": "lazy_adam", "std": 0.5}}
    blocks = {"a": {"memory": memory, "mixer": {"kind": "attention", "heads": 2}}}
    model = build(model_config({"d_model": 16, "n_layers": 2, "vocab_size": 23, "init_std": 0.3, "blocks": blocks}))
    model.recompute = recompute
    return model


def _steps(rank: int, size: int, kind: str, clip: float, recompute: bool = False, steps: int = 3) -> dict[str, Any]:
    """As the loop does it, with two micro-batches of this rank's own rows of the batch."""
    model, w = _model(kind, recompute), World(rank, size, CPU)
    optim = Optimizer(model, OptimConfig(lr=0.02, clip=clip))
    seen = []
    for step in range(steps):
        for part in range(2):
            batch = random_batch(8, 11, seed=step)
            rows = slice(*(8 * (2 * rank + part + i) // (2 * size) for i in range(2)))
            assert batch.targets is not None
            batch = batch._replace(tokens=batch.tokens[rows], targets=batch.targets[rows])
            out = model(batch)
            (model.total(out.losses) / 2).backward()
        sync_gradients(optim, w)
        norm = optim.grad_norm()
        optim.clip(norm)
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        taken: dict[str, Any] = {name: table.take_grad() for name, table in model.tables().items()}
        seen.append((norm, found, {n: (r, g.clone()) for n, (r, g) in taken.items()}, out.losses["lm"].detach()))
        optim.step()
        optim.zero_grad()
    arrays = {f"{name}/{k}": t for name, table in model.tables().items() for k, t in table.state_dict().items()}
    return {"seen": seen, "arrays": arrays, "weights": model.state_dict()}


@pytest.mark.parametrize("size", [2, 4])
def test_a_split_table_trains_like_a_copy_on_every_rank(tmp_path: Path, size: int):
    """To the bit: losses, gradients, weights, rows and moments. The clip is off, since norms are summed in another order."""
    sharded, copied = (on_ranks(size, tmp_path, _steps, size, kind, 0.0) for kind in ("sharded", "resident"))
    for ours, theirs in zip(sharded, copied, strict=True):
        assert same_bytes(ours["weights"], theirs["weights"])
        for (norm, grads, _, loss), (other_norm, other_grads, _, other_loss) in zip(ours["seen"], theirs["seen"]):
            assert same_bytes((grads, loss), (other_grads, other_loss))
            assert rel_err(norm, other_norm) < 1e-6
    for step in range(3):
        for name, (rows, grad) in copied[0]["seen"][step][2].items():
            found = [rank["seen"][step][2][name] for rank in sharded]
            assert torch.equal(torch.cat([r for r, _ in found]), rows)
            assert torch.equal(torch.cat([g for _, g in found]), grad)
    for name, array in copied[0]["arrays"].items():
        assert same_bytes(torch.cat([rank["arrays"][name] for rank in sharded]), array)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_are_one_rank_with_the_whole_batch(tmp_path: Path, size: int):
    """Norm, clipped gradients and what three steps make of the table, against one process with a resident table."""
    one = _steps(0, 1, "resident", clip=0.1)
    ranks = on_ranks(size, tmp_path, _steps, size, "sharded", 0.1)
    norm, grads, rows, _ = one["seen"][0]
    assert norm > 0.2
    for found in ranks:
        assert rel_err(found["seen"][0][0], norm) < 1e-5
        assert all(rel_err(found["seen"][0][1][name], grad) < 1e-5 for name, grad in grads.items())
    for name, (touched, grad) in rows.items():
        parts = [found["seen"][0][2][name] for found in ranks]
        assert torch.equal(torch.cat([r for r, _ in parts]), touched)
        assert rel_err(torch.cat([g for _, g in parts]), grad) < 1e-5
    values = [name for name in one["arrays"] if name.endswith("/values")]
    assert len(values) == 2
    for name in values:
        assert rel_err(torch.cat([found["arrays"][name] for found in ranks]), one["arrays"][name]) < 1e-3
    everything = [*grads.values(), *(g for _, g in rows.values())]
    assert torch.cat([g.flatten() for g in everything]).norm().item() == pytest.approx(0.1, rel=1e-4)


def test_recomputation_looks_nothing_up_again(tmp_path: Path):
    plain, again = (on_ranks(2, tmp_path, _steps, 2, "sharded", 0.0, recompute) for recompute in (False, True))
    assert same_bytes([r["weights"] for r in plain], [r["weights"] for r in again])
    assert same_bytes([r["arrays"] for r in plain], [r["arrays"] for r in again])


def test_a_model_on_one_rank_is_that_with_resident_tables():
    ours, theirs = _model("sharded"), _model("resident")
    assert state_hash(ours) == state_hash(theirs)
    for model in (ours, theirs):
        model(random_batch(2, 9)).losses["lm"].backward()
    assert same_bytes(gradients(ours), gradients(theirs))


# -- on disk


def _rewrite(rank: int, source: str, target: str) -> int:
    """Load on these ranks, and write what they then hold. -> the most rows that this one had of a table."""
    model = _model("sharded")
    load_weights(model, Path(source))
    if rank == 0:
        save_tables(model, Path(target))
    else:
        send_tables(table_blocks(model))
    return max(len(table.state_dict()["values"]) for table in model.tables().values())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_ranks_reads_and_writes_the_file(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch):
    model = _model("resident")
    for i, table in enumerate(model.tables().values()):
        table.step(torch.arange(9) * 3, torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(i)), *HYPER)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    save_weights(model, source)
    held = on_ranks(size, tmp_path, _rewrite, str(source), str(target))
    assert (target / TABLES).read_bytes() == (source / TABLES).read_bytes()
    assert max(held) == -(-max(table.rows for table in model.tables().values()) // size)


def _refused(rank: int, run: str, size: int) -> tuple[str, bool]:
    """The disk of rank 0 is full in the middle of a table; then there is room again."""
    model, w = _model("sharded"), World(rank, size, CPU)
    optim = Optimizer(model, OptimConfig())
    write = models.folder.write_tensors

    def full(found: Any, path: Path) -> None:
        if path.name != TABLES:
            write(found, path)
            return
        next(next(iter(found.values())).blocks)
        raise OSError(28, "No space left on device")

    models.folder.write_tensors = full
    try:
        checkpoint.save(Path(run), 1, model, optim, {}, w, keep=2)
        said = ""
    except UserError as error:
        said = str(error)
    models.folder.write_tensors = write
    checkpoint.save(Path(run), 2, model, optim, {}, w, keep=2)
    return said, (Path(run) / "checkpoints" / "step_00000002" / TABLES).is_file()


def test_a_disk_that_refuses_leaves_no_rank_waiting(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    for said, saved in on_ranks(3, tmp_path, _refused, str(run), 3):
        assert "No space left" in said
        assert saved
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000002"]


# -- whole runs


def _config(folder: Path, kind: str) -> Path:
    memory = {**ENGRAM, "base": 997, "store": {"kind": kind, "rule": "lazy_adam"}}
    shape = {
        "d_model": 16,
        "n_layers": 2,
        "blocks": {"a": {"memory": memory, "mixer": {"kind": "attention", "heads": 2}}},
    }
    sections = {"train": {"steps": 8, "val_every": 4, "save_every": 4, "val_tokens": 420}, "optim": {"clip": 0.0}}
    return write_config(folder, shape, kind, **sections)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(its config, the run of a split table on two ranks)."""
    config = _config(tmp_path_factory.mktemp("split"), "sharded")
    result = train(config, "name=split", ranks=2)
    assert result.code == 0, result.err
    return config, result.run


def test_a_run_is_that_of_copied_tables(split: tuple[Path, Path]):
    """Validation and samples, which one rank makes, included."""
    config, run = split
    copied = train(_config(config.parent, "resident"), "name=copied", ranks=2)
    assert copied.code == 0, copied.err
    ours, theirs = metrics(run), metrics(copied.run)
    norms = [[line.pop("grad_norm") for line in lines if "grad_norm" in line] for lines in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert ours == theirs
    assert (run / "samples.txt").read_text() == (copied.run / "samples.txt").read_text()
    found, expected = tensors(run, 8), tensors(copied.run, 8)
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


def test_one_process_reads_it_with_any_store(split: tuple[Path, Path]):
    _, run = split
    own, _ = load_model(run)
    assert {type(t) for t in own.tables().values()} == {Sharded}
    batch = random_batch(2, 30, own.cfg.vocab_size, targets=False)
    made = generate(own, batch.tokens, 8)
    for kind in ("resident", "host", "mmap"):
        other, _ = load_model(run, tables=kind)
        with torch.no_grad():
            assert same_bytes(other(batch).logits, own(batch).logits)
        assert generate(other, batch.tokens, 8) == made


@pytest.mark.slow
def test_resume_on_other_numbers_of_ranks(split: tuple[Path, Path]):
    """On as many ranks to the bit, on others the same but for the order of sums."""
    config, run = split
    expected = losses(run)
    for ranks in (2, 1, 4):
        stopped = train(config, f"name=to-{ranks}", ranks=2, fault=Fault(IN_STEP, 4, number=15))
        resumed = train("--resume", stopped.run, ranks=ranks)
        assert resumed.code == 0, resumed.err
        assert losses(stopped.run) == (expected if ranks == 2 else pytest.approx(expected, rel=1e-4))
        if ranks == 2:
            ours, theirs = tensors(stopped.run, 8), tensors(run, 8)
            assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


def _given_values(rank: int) -> dict[str, Tensor]:
    table = build_store(StoreConfig(kind="sharded"), 7, WIDTH)
    table.reset(torch.Generator().manual_seed(0))
    table.state_dict()["v"].fill_(1.0)
    table.load_values(torch.arange(7.0 * WIDTH).view(7, WIDTH))
    return table.state_dict()


def test_every_rank_takes_its_rows_of_given_values(tmp_path: Path):
    found = on_ranks(2, tmp_path, _given_values)
    assert [len(arrays["values"]) for arrays in found] == [4, 3]
    assert torch.equal(torch.cat([arrays["values"] for arrays in found]), torch.arange(7.0 * WIDTH).view(7, WIDTH))
    assert not any(arrays[moment].any() for arrays in found for moment in ("v", "steps"))
