"""A model on disk: folders that are whole or not there, weights without pickled code, and the newest good checkpoint.

A run folder holds ``config.yaml`` (with a resolved ``model`` section), ``tokenizer/`` and
``checkpoints/step_XXXXXXXX/{model.safetensors, ..., manifest.json}``. The manifest is written last, with the size and
SHA-256 of every other file, inside a temporary folder that is then renamed: a torn checkpoint has no valid manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from models.config import BlockConfig, ModelConfig, model_config
from models.errors import UserError, nearest
from models.lm import LM, meta_model
from models.parsing import choice, to_dict
from models.stores import KINDS, with_kind
from models.tensorfile import Blocks, MappedFile, ordered, write_tensors
from models.types import SLOTS

MANIFEST = "manifest.json"
NEWER = "written by a newer version of this program"
TABLES = "tables.safetensors"
FORMAT = 1  # of checkpoints; raised when an older reader could misread a newer file


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Write into the yielded folder; it becomes ``path``, with a manifest, only if everything was written.

    Raises UserError when the disk refuses (full, read-only); nothing half-written stays behind.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": manifest}, indent=1))
        for p in [*files, temporary / MANIFEST, temporary]:
            _fsync(p)
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def verify_folder(path: Path) -> str | None:
    """Why a folder made by `atomic_folder` cannot be trusted; None if every byte is as written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] > FORMAT:
            return f"{NEWER} ({manifest['format']}; this one reads {FORMAT})"
        for name, expected in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256(file) != expected["sha256"]:
                return f"{name} is corrupt (checksum differs)"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- weights


def save_weights(model: LM, folder: Path, tables: Mapping[str, Blocks] | None = None) -> None:
    """``model.safetensors`` (parameters and model memory) and, with row stores, ``tables.safetensors``."""
    write_tensors(model.state_dict(), folder / "model.safetensors")
    save_tables(model, folder, tables)


def load_weights(model: LM, folder: Path) -> None:
    """Into a model of the same config; raises UserError naming the first tensor that does not fit."""
    load_state(model, load_file(str(folder / "model.safetensors")), str(folder))
    load_tables(model, folder)


def table_blocks(model: LM) -> dict[str, Blocks]:
    """What `save_tables` writes: the arrays of every table, block by block.

    Rows of a table that is split over ranks travel to rank 0 as it takes them, so the other ranks `send_tables` meanwhile.
    """
    found = {f"{name}/{k}": t for name, table in model.tables().items() for k, t in table.blocks_to_save().items()}
    return ordered(found)


def send_tables(tables: Mapping[str, Blocks]) -> None:
    """Run `table_blocks` to their end: on ranks that do not write, and on the one that does when its disk has refused."""
    for array in tables.values():
        for _ in array.blocks:
            pass


def save_tables(model: LM, folder: Path, tables: Mapping[str, Blocks] | None = None) -> None:
    """Row stores are no parameters, so they travel in a file of their own; nothing is written where there are none."""
    tables = table_blocks(model) if tables is None else tables
    if tables:
        write_tensors(tables, folder / TABLES)


def load_tables(model: LM, folder: Path) -> None:
    """What `save_tables` wrote; raises UserError for a table that is not there."""
    stores, file = model.tables(), folder / TABLES
    found = {name.rpartition("/")[0] for name in MappedFile(file).names()} if stores and file.is_file() else set()
    for name, store in stores.items():
        if name not in found:
            raise UserError(f"{folder}: table '{name}' is missing{nearest(name, found)}")
        store.load_file(file, name)


def with_tables(cfg: ModelConfig, kind: str | None) -> ModelConfig:
    """The same model with its tables, if it has any, in stores of another kind (`models.stores`); None: as they are."""
    if kind is None:
        return cfg
    choice("kind of tables", kind, tuple(KINDS))
    blocks = {
        name: BlockConfig(**{slot: with_kind(getattr(block, slot), kind) for slot in SLOTS})
        for name, block in cfg.blocks.items()
    }
    layers = cfg.layers()
    at = {i: {slot: to_dict(with_kind(getattr(layers[i], slot), kind)) for slot in cfg.at[i] or ()} for i in cfg.at}
    return replace(cfg, blocks=blocks, at=at)


def load_state(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy tensors into parameters and buffers of the same names and shapes; every one must be there."""
    own = module.state_dict()
    for name in [*own, *tensors]:
        if name not in tensors:
            raise UserError(f"{where}: tensor '{name}' is missing{nearest(name, tensors)}")
        if name not in own:
            raise UserError(f"{where}: tensor '{name}' is not in the model{nearest(name, own)}")
        shape, wanted = tuple(tensors[name].shape), tuple(own[name].shape)
        if shape != wanted:
            raise UserError(f"{where}: '{name}' has shape {shape}, the model {wanted}")
    module.load_state_dict(tensors)


# -- runs


def run_config(run: Path) -> dict[str, Any]:
    """The plain data of ``config.yaml``."""
    run = Path(run)
    if not run.is_dir():
        siblings = [p.name for p in run.parent.glob("*") if p.is_dir()] if run.parent.is_dir() else []
        raise UserError(f"no run at '{run}'{nearest(run.name, siblings)}")
    try:
        raw = yaml.safe_load((run / "config.yaml").read_text())
        raw["model"]
    except (OSError, TypeError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"'{run}' is not a run folder (no config.yaml with a model)") from error
    return raw


def checkpoints(run: Path) -> list[Path]:
    """All checkpoint folders, oldest first, not verified."""
    return sorted((Path(run) / "checkpoints").glob("step_*"))


def latest_checkpoint(run: Path, step: int | None = None) -> Path:
    """The newest checkpoint that is whole (or that of ``step``). Torn ones are named on stderr and passed over."""
    found = checkpoints(run)
    if step is not None:
        found = [p for p in found if int(p.name.removeprefix("step_")) == step]
        if not found:
            steps = ", ".join(str(int(p.name.removeprefix("step_"))) for p in checkpoints(run))
            raise UserError(f"{run}: no checkpoint of step {step}; there are: {steps or 'none'}")
    for path in reversed(found):
        why = verify_folder(path)
        if why and why.startswith(NEWER):
            raise UserError(f"{path}: {why}")
        if why is None:
            return path
        print(f"warning: checkpoint {path} is not whole: {why}; it is passed over", file=sys.stderr)
    raise UserError(f"{run}: no usable checkpoint" + (f" of {len(found)}" if found else ""))


def load_model(
    run: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    step: int | None = None,
    tables: str | None = None,
) -> tuple[LM, Path]:
    """-> (the model of a run with its newest good weights, in eval mode; the checkpoint folder used).

    ``tables``: see `with_tables`.
    """
    run = Path(run)
    cfg = with_tables(model_config(run_config(run)["model"]), tables)
    folder = latest_checkpoint(run, step)
    model = meta_model(cfg).to_empty(device=device)
    load_weights(model, folder)
    if dtype is not None:
        model = model.to(dtype)
    return model.eval(), folder
