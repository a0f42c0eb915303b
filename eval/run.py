"""Open what is to be judged: a run folder, or a model in Hugging Face format."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import Tokenizer, load_tokenizer
from models import LM, UserError, zoo
from models.errors import nearest
from models.folder import MANIFEST, load_model, run_config, sha256

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class LoadedRun:
    """A model in eval mode with its tokenizer; a run on a synthetic task has `Ids`. ``config``: plain ``config.yaml`` of the run
    ({} if exported)."""

    model: LM
    tokenizer: Tokenizer
    dir: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    checkpoint: str = ""  # names the weights: equal only for equal bytes
    progress: float | None = None  # where it is not that of the weights

    @property
    def trained_length(self) -> int | None:
        """The sequence length the run was trained at, if its config says."""
        found = (self.config.get("data") or {}).get("seq_len")
        return int(found) if found else None

    @property
    def task(self) -> str | None:
        """The kind of synthetic task that the run was trained on in place of text."""
        return ((self.config.get("data") or {}).get("synthetic") or {}).get("kind")


class Ids(Tokenizer):
    """Shows the ids of a task as numbers; there is nothing to encode."""

    kind = "ids"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.bos_id = self.eos_id = 0

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f" {i}" for i in ids)

    def token_text(self, token: int) -> str:
        return str(token)

    def json(self) -> str:
        return f'{{"ids": {self.vocab_size}}}'


def open_run(
    path: Path | str,
    device: torch.device | str = "auto",
    dtype: torch.dtype | str | None = None,
    step: int | None = None,
    allow_foreign: bool = False,
    progress: float | None = None,
    tables: str | None = None,
    tasks: bool = False,
) -> LoadedRun:
    """The newest whole checkpoint of a run folder (or that of ``step``), or an exported Hugging Face folder.

    ``dtype`` defaults to that of the stored weights. ``progress`` in [0, 1]: as if training had come that far, for parts that follow
    it (a temperature); default: as far as it had. ``tables``: the kind of store of its tables (`models.folder.with_tables`).
    ``tasks``: also a run that was trained on a synthetic task.
    Raises UserError or DataError, one line each, for anything that is missing, torn or does not fit together.
    """
    path = Path(path)
    if progress is not None and not 0 <= progress <= 1:
        raise UserError(f"progress must lie in [0, 1], got {progress:g}")
    where, kind = pick_device(device), pick_dtype(dtype)
    if allow_foreign:
        zoo.allow_foreign()
    if (path / "config.json").is_file() and not (path / "config.yaml").is_file():
        run = _open_exported(path, where, kind, step, tables)
    else:
        config = run_config(path)
        task = (config.get("data") or {}).get("synthetic")
        if task and not tasks:
            raise UserError(
                f"{path}: trained on the task '{task.get('kind')}', which is no text; python -m eval.recall judges it"
            )
        model, folder = load_model(path, where, kind, step, tables)
        tokenizer = Ids(model.cfg.vocab_size) if task else load_tokenizer(path / "tokenizer")
        found = int(folder.name.removeprefix("step_"))
        mark = sha256(folder / MANIFEST)
        run = LoadedRun(model, tokenizer, path, path.resolve().name, config, found, mark)
    if progress is not None:
        run.model.progress.fill_(progress)
        run = replace(run, progress=progress, checkpoint=f"{run.checkpoint} at progress {progress:g}")
    if run.tokenizer.vocab_size > run.model.cfg.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {run.tokenizer.vocab_size} ids, the model only {run.model.cfg.vocab_size}"
        )
    return run


def _open_exported(
    path: Path, device: torch.device, dtype: torch.dtype | None, step: int | None, tables: str | None
) -> LoadedRun:
    from models.hf import load_pretrained

    if step:
        raise UserError(f"{path} is an exported model: it has no checkpoint of step {step}")
    model, tokenizer = load_pretrained(path, device, dtype, tables)
    digest = hashlib.sha256()
    for file in sorted([path / "config.json", *path.glob("*.safetensors")]):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return LoadedRun(model, load_tokenizer(tokenizer), path, path.resolve().name, {}, 0, digest.hexdigest())


def pick_device(name: torch.device | str) -> torch.device:
    """``auto``: the GPU if there is one. Raises UserError for a device that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' is not usable here: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name; None keeps that of the weights."""
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise UserError(f"unknown dtype '{name}'{nearest(name, DTYPES)}")
    return DTYPES[name]
