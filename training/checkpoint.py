"""One run's whole state on disk: weights, model memory, optimizer, every generator, the loader's position."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.errors import UserError
from models.folder import (
    atomic_folder,
    checkpoints,
    latest_checkpoint,
    load_model,
    load_weights,
    save_weights,
    send_tables,
    table_blocks,
    write_tensors,
)
from models.lm import LM
from training.optim import Optimizer
from training.parallel import World, gather_objects, on_main

TORN = "torn_"  # before the name of a checkpoint that was found damaged; the next good one removes it


def save(run: Path, step: int, model: LM, optim: Optimizer, state: dict[str, Any], w: World, keep: int) -> Path:
    """Write ``checkpoints/step_XXXXXXXX`` on rank 0 and drop all but the newest ``keep``. ``state`` is plain JSON.

    Raises UserError on every rank when the disk refuses; the checkpoints before stay as they were.
    """
    tables = table_blocks(model)
    generators = gather_objects(_generators(w), w)
    rng = {f"{rank}/{kind}": t for rank, found in enumerate(generators) for kind, t in found.items()}
    plain = {"step": step, "world_size": w.size, **state}

    def write() -> Path:
        path = run / "checkpoints" / f"step_{step:08d}"
        try:
            with atomic_folder(path) as folder:
                save_weights(model, folder, tables)
                write_tensors(optim.state_dict(), folder / "optim.safetensors")
                write_tensors(rng, folder / "rng.safetensors")
                (folder / "state.json").write_text(json.dumps(plain, indent=1))
        finally:
            send_tables(tables)  # of a disk that refused: the other ranks are still sending
        for old in [*checkpoints(run)[:-keep], *path.parent.glob(f"{TORN}*")]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    if not w.is_main:
        send_tables(tables)
    return on_main(write, w)


def restore(run: Path, model: LM, optim: Optimizer, w: World) -> dict[str, Any]:
    """Load the newest whole checkpoint; -> its plain state. Says what is lost when the number of ranks changed."""
    folder = on_main(lambda: _newest_whole(run), w)
    state = json.loads((folder / "state.json").read_text())
    load_weights(model, folder)
    optim.load_state_dict(load_file(str(folder / "optim.safetensors")))
    generators = load_file(str(folder / "rng.safetensors"))
    if state["world_size"] == w.size:
        _set_generators({k.split("/", 1)[1]: t for k, t in generators.items() if k.startswith(f"{w.rank}/")}, w)
    elif w.is_main:
        print(
            f"warning: saved on {state['world_size']} ranks, resumed on {w.size}: data order and weights continue "
            "exactly, random generators (dropout) start anew and sums over ranks may differ in the last bits",
            file=sys.stderr,
        )
    return state


def _newest_whole(run: Path) -> Path:
    """The checkpoint to go on from. Newer ones, which are torn, are set aside, so that they do not count as the newest
    to keep; remains of a process that was killed while it wrote are removed."""
    folder = latest_checkpoint(run)
    for path in checkpoints(run):
        if path.name > folder.name:
            aside = path.with_name(f"{TORN}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.rename(aside)
    for path in folder.parent.glob(".*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    return folder


def _generators(w: World) -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    if w.device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(w.device)
    return found


def _set_generators(states: dict[str, Tensor], w: World) -> None:
    torch.set_rng_state(states["cpu"])
    if w.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], w.device)


def init_from(model: LM, source: str) -> str:
    """Take the weights of a run or of a Hugging Face folder, without moments; -> a sentence that says what was taken.

    The model may have more parts than the source (a memory added to a pretrained backbone), never fewer; what is new
    keeps its fresh initialisation. Raises UserError for a tensor that does not fit.
    """
    path = Path(source)
    if (path / "config.json").is_file() and not (path / "config.yaml").is_file():
        from models.hf import load_pretrained

        other, _ = load_pretrained(path, tables="mmap")
    else:
        other, _ = load_model(path, tables="mmap")
    given = {name: p for name, p in other.state_dict().items() if not _follows_from_config(name)}
    own = {name: p for name, p in model.state_dict().items() if not _follows_from_config(name)}
    _must_fit(source, {n: tuple(t.shape) for n, t in given.items()}, {n: tuple(t.shape) for n, t in own.items()})
    tables, stores = other.tables(), model.tables()
    _must_fit(
        source, {n: (t.rows, t.width) for n, t in tables.items()}, {n: (t.rows, t.width) for n, t in stores.items()}
    )
    for name, addressing in other.addressing.items():
        model.addressing[name].must_agree(addressing)  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)
    for name, table in tables.items():
        stores[name].load_values(table.state_dict()["values"])
    fresh = sorted({*own, *stores} - {*given, *tables})
    names = f" ({', '.join(fresh[:3])}{', ...' if len(fresh) > 3 else ''})" if fresh else ""
    return f"{len(given) + len(tables)} tensors from {source}; {len(fresh)} keep their fresh initialisation{names}"


def _follows_from_config(name: str) -> bool:
    """Neither learned nor remembered: the share of training done, and the integers of the addressings."""
    return name == "progress" or name.startswith("addressing.")


def _must_fit(source: str, given: dict[str, tuple[int, ...]], own: dict[str, tuple[int, ...]]) -> None:
    missing = sorted(given.keys() - own.keys())
    if missing:
        raise UserError(f"{source}: the model has no place for '{missing[0]}' ({len(missing)} such tensors)")
    for name, shape in given.items():
        if own[name] != shape:
            raise UserError(f"{source}: '{name}' has shape {shape}, the model {own[name]}")
