"""One run's whole state on disk: weights, model memory, optimizer, every generator, the loader's position."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.errors import UserError
from models.folder import atomic_folder, checkpoints, latest_checkpoint, load_weights, save_weights, write_tensors
from models.lm import LM
from training.optim import Optimizer
from training.parallel import World, broadcast_object, gather_objects


def save(run: Path, step: int, model: LM, optim: Optimizer, state: dict[str, Any], w: World, keep: int) -> Path | None:
    """Write ``checkpoints/step_XXXXXXXX`` on rank 0 and drop all but the newest ``keep``. ``state`` is plain JSON.

    Raises UserError on every rank when the disk refuses; the checkpoints before stay as they were.
    """
    generators = gather_objects(_generators(w), w)
    path, failure = None, None
    if w.is_main:
        path = run / "checkpoints" / f"step_{step:08d}"
        plain = {"step": step, "world_size": w.size, "optimizer": optim.scalars(), **state}
        try:
            with atomic_folder(path) as folder:
                save_weights(model, folder)
                write_tensors(optim.state_dict(), folder / "optim.safetensors")
                write_tensors({f"{r}/{k}": t for r, g in enumerate(generators) for k, t in g.items()}, folder / "rng.safetensors")
                (folder / "state.json").write_text(json.dumps(plain, indent=1))
        except UserError as error:
            failure = str(error)
        else:
            for old in checkpoints(run)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
    failure = broadcast_object(failure, w)
    if failure:
        raise UserError(failure)
    return path


def restore(run: Path, model: LM, optim: Optimizer, w: World) -> dict[str, Any]:
    """Load the newest whole checkpoint; -> its plain state. Says what is lost when the number of ranks changed."""
    folder = Path(broadcast_object(str(latest_checkpoint(run)) if w.is_main else None, w))
    state = json.loads((folder / "state.json").read_text())
    load_weights(model, folder)
    optim.load_state_dict(load_file(str(folder / "optim.safetensors")), state["optimizer"])
    generators = load_file(str(folder / "rng.safetensors"))
    if state["world_size"] == w.size:
        _set_generators({k.split("/", 1)[1]: t for k, t in generators.items() if k.startswith(f"{w.rank}/")}, w)
    elif w.is_main:
        print(
            f"warning: saved on {state['world_size']} ranks, resumed on {w.size}: data order and weights continue exactly, "
            "random generators (dropout) start anew and sums over ranks may differ in the last bits",
            file=sys.stderr,
        )
    return state


def _generators(w: World) -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    if w.device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(w.device)
    return found


def _set_generators(states: dict[str, Tensor], w: World) -> None:
    torch.set_rng_state(states["cpu"])
    if w.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], w.device)


def init_from(model: LM, source: dict[str, Tensor], where: str) -> tuple[int, list[str]]:
    """Copy the weights of another model; -> (tensors copied, names of tensors that keep their fresh initialisation).

    The model may have more parts than the source (a memory added to a pretrained backbone), never fewer.
    """
    own = model.state_dict()
    missing = sorted(set(source) - set(own))
    if missing:
        raise UserError(f"{where}: the model has no place for '{missing[0]}' ({len(missing)} such tensors)")
    for name, tensor in source.items():
        if own[name].shape != tensor.shape:
            raise UserError(f"{where}: '{name}' has shape {tuple(tensor.shape)}, the model {tuple(own[name].shape)}")
    fresh = sorted(set(own) - set(source))
    with torch.no_grad():
        for name, tensor in source.items():
            if name != "progress":
                own[name].copy_(tensor)
    return len(source), fresh
