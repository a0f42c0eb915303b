"""Tables in files: the same bits as in memory, no private memory, read-only; and the files themselves."""

from __future__ import annotations

import copy
import json
import os
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.decoding import generate
from eval.generate import main as generate_main
from eval.run import open_run
from models import LM, UserError, build
from models.folder import TABLES, load_model, with_tables
from models.stores import StoreConfig, build_store
from models.stores.mmap import Mapped
from models.tensorfile import PAGE, Blocks, MappedFile, write_tensors
from tests.runs import ROOT, one_error, train, write_config
from tests.test_eval_runs import tiny_model, write_run
from tests.tools import assert_close, random_batch, same_bytes, spread
from training import checkpoint
from training.optim import OptimConfig, Optimizer

WIDTH = 16
MB = 1 << 20
ENGRAM = {"kind": "engram", "heads": 2, "row_width": WIDTH, "compression": "none"}
PROMPT = [256, *b"def f(x): return x"]


def _shape(base: int = 131, **store: Any) -> dict[str, Any]:
    """A table in the block that repeats, another where a layer is amended."""
    memory = {**ENGRAM, "base": base, "store": {"std": 0.5, **store}}
    return {
        "blocks": {"a": {"memory": memory, "mixer": {"kind": "attention", "heads": 2}}},
        "at": {1: {"memory": {"row_width": 5}}},
        "n_layers": 2,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(_shape(rule="lazy_adam"))
    spread(model)
    return write_run(tmp_path_factory.mktemp("mmap") / "run", model)


def _tables(folder: Path) -> Path:
    (found,) = folder.glob(f"checkpoints/*/{TABLES}")
    return found


def _logits(model: LM) -> Tensor:
    with torch.inference_mode():
        logits = model(random_batch(3, 40, 257, targets=False)).logits
    assert logits is not None
    return logits


# -- the store


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_are_those_of_a_resident_table(tmp_path: Path, dtype: torch.dtype):
    """Repeated rows, all rows, one, none; two lookups under way that end the other way round."""
    resident = build_store(StoreConfig(), 301, 7)
    resident.reset(torch.Generator().manual_seed(1))
    write_tensors({f"a.table/{name}": t for name, t in resident.state_dict().items()}, tmp_path / "f")
    mapped = build_store(StoreConfig(kind="mmap"), 301, 7)
    mapped.load_file(tmp_path / "f", "a.table")
    for table in (resident, mapped):
        table.apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
    generator = torch.Generator().manual_seed(2)
    for shape in ((4, 50, 3), (301,), (1, 1), (), (2, 0, 3)):
        rows = torch.randint(301, shape, generator=generator)
        assert mapped.read(rows).dtype == dtype
        assert same_bytes(mapped.read(rows), resident.read(rows))
    first, second = torch.arange(9), torch.tensor([[300, 0], [7, 300]])
    begun = [mapped.prefetch(first), mapped.prefetch(second)]
    assert same_bytes(mapped.wait(begun[1]), resident.read(second))
    assert same_bytes(mapped.wait(begun[0]), resident.read(first))


def test_a_model_with_mapped_tables_says_the_same(run: Path):
    held, mapped = load_model(run)[0], load_model(run, tables="mmap")[0]
    assert {type(t) for t in mapped.tables().values()} == {Mapped}
    assert len(mapped.tables()) == 2
    assert same_bytes(_logits(mapped), _logits(held))
    assert generate(mapped, [PROMPT], 30) == generate(held, [PROMPT], 30)
    assert same_bytes(
        [t.state_dict() for t in mapped.tables().values()], [t.state_dict() for t in held.tables().values()]
    )


def test_in_another_dtype_too(run: Path):
    held, mapped = (load_model(run, dtype=torch.bfloat16, tables=kind)[0] for kind in (None, "mmap"))
    assert same_bytes(_logits(mapped), _logits(held))


def test_a_copy_and_a_compiled_model_say_the_same(run: Path):
    mapped = load_model(run, tables="mmap")[0]
    expected = _logits(mapped)
    assert same_bytes(_logits(copy.deepcopy(mapped)), expected)
    mapped.compile(backend="eager")
    assert_close(_logits(mapped), expected, "forms", torch.float32)


@pytest.mark.cuda
def test_rows_arrive_on_the_device(run: Path):
    """Gathered in host memory, then sent: the logits are those of a table that is there."""
    held, mapped = (load_model(run, "cuda", tables=kind)[0] for kind in (None, "mmap"))
    batch = random_batch(3, 40, 257, targets=False).to("cuda")
    with torch.inference_mode():
        assert same_bytes(mapped(batch).logits, held(batch).logits)


def test_a_new_model_starts_from_the_rows_of_a_run(run: Path):
    """`--init-from` reads them out of the file, so that no table is in memory twice."""
    source = load_model(run)[0]
    for kind in ("resident", "host", "sharded"):
        model = build(with_tables(source.cfg, kind), seed=5)
        said = checkpoint.init_from(model, str(run))
        assert "0 keep their fresh initialisation" in said
        for name, table in model.tables().items():
            state = table.state_dict()
            assert same_bytes(state["values"], source.tables()[name].state_dict()["values"])
            assert not any(state[moment].any() for moment in ("m", "v", "steps"))


def test_every_kind_reads_the_same_checkpoint(run: Path):
    logits = _logits(load_model(run)[0])
    for kind in ("host", "resident"):
        model = load_model(run, tables=kind)[0]
        assert {t.cfg.kind for t in model.tables().values()} == {kind}
        assert same_bytes(_logits(model), logits)


def test_an_exported_folder_is_mapped_too(run: Path, tmp_path: Path):
    pytest.importorskip("transformers")
    from models.hf import export_run

    export_run(run, tmp_path / "exported")
    opened = open_run(tmp_path / "exported", "cpu", tables="mmap")
    assert {type(t) for t in opened.model.tables().values()} == {Mapped}
    assert same_bytes(_logits(opened.model), _logits(load_model(run)[0]))


def test_commands_take_the_kind(run: Path, capsys: pytest.CaptureFixture[str]):
    said = []
    for more in ([], ["--tables", "mmap"]):
        assert (
            generate_main([str(run), "--prompt", "def", "--greedy", "--max-tokens", "20", "--device", "cpu", *more])
            == 0
        )
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    assert generate_main([str(run), "--tables", "map"]) == 2
    assert "did you mean 'mmap'?" in capsys.readouterr().err


def test_options_of_the_old_kind_are_dropped(run: Path):
    cfg = load_model(run)[0].cfg
    cached = with_tables(tiny_model(_shape(kind="host", cache_rows=9)).cfg, "mmap")
    assert [block.memory.store.kind for block in cached.layers()] == ["mmap", "mmap"]
    assert with_tables(cfg, None) is cfg
    plain = tiny_model().cfg
    assert with_tables(plain, "mmap") == plain


def test_training_is_refused_with_a_way_out(run: Path, tmp_path: Path):
    model = load_model(run, tables="mmap")[0]
    loss = model(random_batch(2, 9, 257)).losses["lm"]
    with pytest.raises(UserError, match=r"read-only.*kind=host"):
        loss.backward()
    optim = Optimizer(model, OptimConfig())
    table = next(iter(model.tables().values()))
    table.set_grad(torch.tensor([3]), torch.ones(1, WIDTH))
    with pytest.raises(UserError, match="read-only"):
        optim.step()
    shape = {"d_model": 16, **_shape(kind="mmap"), "at": {}}
    one_error(train(write_config(tmp_path, shape)), "read-only", "kind=host")


def test_a_table_that_does_not_fit_is_refused(run: Path):
    name, rows = "layers.0.memory.table", load_model(run)[0].tables()["layers.0.memory.table"].rows
    for asked, where, why in ((rows - 1, name, f"{rows}"), (rows, "layers.7.memory.table", "None")):
        with pytest.raises(UserError, match=why):
            build_store(StoreConfig(kind="mmap"), asked, WIDTH).load_file(_tables(run), where)


def test_the_pages_of_a_lookup_are_asked_for_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every page of the rows and no other, neighbours in one request."""
    table = torch.arange(300 * 600, dtype=torch.float32).view(300, 600)  # 2400 bytes a row
    write_tensors({"other": torch.zeros(3), "t": table}, tmp_path / "f")
    file = MappedFile(tmp_path / "f")
    asked: list[tuple[int, int]] = []

    class Spy:
        def madvise(self, _: int, start: int, length: int) -> None:
            asked.append((start, length))

    start = (tmp_path / "f").stat().st_size - table.nbytes
    monkeypatch.setattr(file, "_map", Spy())
    for rows in ([0], [299], [3, 4, 5, 90, 200, 202], list(range(300)), []):
        asked.clear()
        file.read_soon("t", torch.tensor(rows, dtype=torch.int64))
        wanted = {p for r in rows for p in range((start + 2400 * r) // PAGE, (start + 2400 * r + 2399) // PAGE + 1)}
        found = [p for at, length in asked for p in range(at // PAGE, (at + length) // PAGE)]
        assert sorted(found) == sorted(wanted)
        assert all(a + n < b for (a, n), (b, _) in pairwise(asked)), "neighbours were not joined"


# -- larger than memory


def serve(folder: str, kind: str, room: int) -> None:
    """In a process of its own: load a run and generate, with ``room`` bytes of data memory more than the imports take."""
    torch.set_num_threads(1)
    generate(tiny_model(), [PROMPT], 2)  # what first use allocates
    seen = [_private()]
    limit = seen[0]["VmData"] + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    model, _ = load_model(folder, tables=kind)
    seen.append(_private())
    logits = _logits(model)
    made = generate(model, [PROMPT], 20)
    seen.append(_private())
    most = {name: max(s[name] for s in seen) - seen[0][name] for name in seen[0]}
    print(json.dumps({"logits": logits.flatten().view(torch.int32).tolist(), "made": made, "private": most}))


def _private() -> dict[str, int]:
    """Bytes of this process that are nobody else's: reserved for data, and in use."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":") for line in lines)
    return {name: int(values[name].split()[0]) << 10 for name in ("VmData", "RssAnon")}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and limits data memory")
def test_a_table_larger_than_memory_serves(tmp_path: Path):
    """Under a limit on data memory (one on address space would count the mapping) that a resident table breaks."""
    room = 40 * MB
    shape = {**_shape(base=MB // 2), "at": {}, "n_layers": 1}
    run = write_run(tmp_path / "run", tiny_model(shape))
    assert _tables(run).stat().st_size > 3 * room
    held = load_model(run)[0]
    command = "import sys; from tests.test_store_mmap import serve; serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))"

    def served(kind: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", command, str(run), kind, str(room)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    found = served("mmap")
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout.splitlines()[-1])
    print("private memory beyond the imports, bytes:", said["private"], "table:", _tables(run).stat().st_size)
    assert said["logits"] == _logits(held).flatten().view(torch.int32).tolist()
    assert said["made"] == generate(held, [PROMPT], 20)
    assert max(said["private"].values()) < room / 2
    refused = served("resident")
    assert refused.returncode != 0
    assert "allocate" in refused.stderr or "MemoryError" in refused.stderr, refused.stderr


# -- the files


def _all_kinds() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    found = {str(d): torch.randn(5, 3, generator=generator).to(d) for d in floats}
    found |= {
        str(d): torch.randint(100, (7,), generator=generator).to(d) for d in (torch.int64, torch.int32, torch.uint8)
    }
    odd = {"flag": torch.tensor([True, False, True]), "scalar": torch.tensor(2.5), "none": torch.empty(0, 4)}
    return {**odd, "turned": torch.randn(4, 6, generator=generator).t(), **found}


def test_files_are_those_of_safetensors(tmp_path: Path):
    tensors = _all_kinds()
    write_tensors(tensors, tmp_path / "ours")
    save_file({name: t.contiguous() for name, t in tensors.items()}, str(tmp_path / "theirs"), {"format": "pt"})
    for found in (load_file(str(tmp_path / "ours")), *(_mapped(tmp_path / name) for name in ("ours", "theirs"))):
        assert found.keys() == tensors.keys()
        assert all(same_bytes(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())


def _mapped(path: Path) -> dict[str, Tensor]:
    file = MappedFile(path)
    return {name: file.tensor(name) for name in file.names()}


def test_blocks_must_be_the_whole(tmp_path: Path):
    whole = torch.arange(12.0).view(6, 2)
    write_tensors({"a": Blocks(whole.dtype, (6, 2), iter([whole[:4], whole[4:]]))}, tmp_path / "f")
    assert same_bytes(load_file(str(tmp_path / "f")), {"a": whole})
    with pytest.raises(ValueError, match="whole"):
        write_tensors({"a": Blocks(whole.dtype, (6, 2), iter([whole[:4]]))}, tmp_path / "f")


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "missing"])
def test_damaged_files_are_one_line(tmp_path: Path, damage: str):
    path = tmp_path / "f"
    write_tensors({"a": torch.ones(3000)}, path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[:5000], "text": b"not a tensor in sight", "missing": b""}[damage])
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        MappedFile(path)


def test_batches_are_not_looked_up_alone(run: Path):
    """Rows of a batch are each read once, in the order of the file."""
    mapped = next(iter(load_model(run, tables="mmap")[0].tables().values()))
    asked: list[Tensor] = []
    mapped._file.read_soon = lambda name, rows: asked.append(rows)
    rows = torch.tensor([[9, 2, 9], [400, 2, 0]])
    assert mapped.read(rows).shape == (2, 3, WIDTH)
    assert [r.tolist() for r in asked] == [[0, 2, 9, 400]]
