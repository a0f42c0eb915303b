"""Whole checkpoints: a Hugging Face folder to a run, a run to a Hugging Face folder, and either opened in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from models.config import ModelConfig, model_config
from models.errors import UserError, nearest
from models.folder import (
    MANIFEST,
    atomic_folder,
    load_model,
    load_state,
    load_tables,
    save_tables,
    save_weights,
    with_tables,
    write_tensors,
)
from models.hf import config as llama
from models.hf import fla, weights
from models.hf.tokenizer import export_tokenizer, import_tokenizer
from models.lm import LM, meta_model
from models.parsing import to_dict

FORMATS = ("auto", "llama", "loci")


class Reader(NamedTuple):
    """Of native checkpoints of one kind."""

    config: Callable[[dict[str, Any]], ModelConfig]  # their config.json as ours
    pieces: weights.Pieces
    modern: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict  # tensors of early versions as those of today


READERS = {  # by model_type
    **dict.fromkeys(llama.FAMILIES, Reader(llama.from_hf, weights.llama_pieces)),
    **dict.fromkeys(fla.FAMILIES, Reader(fla.from_hf, fla.pieces, fla.modern)),
}
AUTO_MAP = {"AutoConfig": "modeling_loci.LociConfig", "AutoModelForCausalLM": "modeling_loci.LociForCausalLM"}
SHIM = '''"""Where transformers finds the model's code with trust_remote_code=True: in the loci-lm package."""

try:
    from models.hf.modeling import LociConfig, LociForCausalLM  # noqa: F401
except ImportError as error:
    raise ImportError("this checkpoint needs loci-lm: install it, or put its repository on PYTHONPATH") from error
'''


def import_run(source: Path | str, run: Path | str, dtype: torch.dtype = torch.float32) -> LM:
    """A checkpoint folder as a new run with one checkpoint, of step 0. -> the model.

    Raises UserError for anything that is not supported; then no run is left behind.
    """
    source, run = Path(source), Path(run)
    _must_be_new(run)
    raw = _read_config(source)
    model = _open(source, raw, dtype)
    with atomic_folder(run) as folder:
        import_tokenizer(source, folder / "tokenizer", raw)
        config = {"model": to_dict(model.cfg), "imported_from": str(source)}
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        with atomic_folder(folder / "checkpoints" / "step_00000000") as checkpoint:
            save_weights(model, checkpoint)
    (run / MANIFEST).unlink()  # a run grows, so only its checkpoints carry a manifest
    return model


def export_run(
    run: Path | str,
    folder: Path | str,
    form: str = "auto",
    step: int | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """The newest checkpoint of a run (or that of ``step``) as a Hugging Face folder. -> its architecture.

    ``form``: ``llama`` writes a native Llama, Mistral or Qwen3 and refuses what these cannot express, ``loci`` the
    registered class, ``auto`` the first where possible. ``dtype``: of the weights; default as in the checkpoint.
    """
    run, folder = Path(run), Path(folder)
    if form not in FORMATS:
        raise UserError(f"unknown format '{form}'{nearest(form, FORMATS)}")
    _must_be_new(folder)
    model, _ = load_model(run, dtype=dtype, step=step)
    config = _config(model, form)
    config["dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    with atomic_folder(folder) as target:
        ends = export_tokenizer(run / "tokenizer", target, model.cfg.max_seq_len)
        config |= ends
        if config["model_type"] == "loci":
            named = {f"{weights.PREFIX}{name}": tensor for name, tensor in model.state_dict().items()}
            save_tables(model, target)
            write_shim(target)
        else:
            named = weights.to_native(model, weights.llama_pieces)
        write_tensors(named, target / "model.safetensors")
        (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (target / "generation_config.json").write_text(json.dumps(ends, indent=1) + "\n")
    return config["architectures"][0]


def load_pretrained(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    tables: str | None = None,
) -> tuple[LM, Path]:
    """An exported folder, or a native checkpoint that we can read, as our own model. ``tables``: see `models.folder.with_tables`.

    -> (the model in eval mode, the folder of its tokenizer).
    """
    folder = Path(folder)
    model = _open(folder, _read_config(folder), dtype, tables)
    return model.to(device), folder


def loci_config(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of the registered class: our own config, and the few facts that tools look for."""
    known_length = {"max_position_embeddings": cfg.max_seq_len} if cfg.max_seq_len else {}
    return {
        "architectures": ["LociForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": "loci",
        "model": to_dict(cfg),
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "tie_word_embeddings": cfg.tied,
        "use_cache": True,
        **known_length,
    }


def write_shim(folder: Path) -> None:
    (folder / f"{AUTO_MAP['AutoConfig'].partition('.')[0]}.py").write_text(SHIM)


def _config(model: LM, form: str) -> dict[str, Any]:
    if form == "llama":
        return llama.to_hf(model)
    if form == "auto":
        try:
            return llama.to_hf(model)
        except UserError:
            pass
    return loci_config(model.cfg)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}'")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{folder}' is not a Hugging Face checkpoint (no config.json with a model_type)") from error
    return raw


def _open(folder: Path, raw: dict[str, Any], dtype: torch.dtype | None, tables: str | None = None) -> LM:
    """A native checkpoint is read in fp32 unless ``dtype`` says otherwise, one of our own as it is stored."""
    tensors = weights.read_tensors(folder)
    if raw["model_type"] == "loci":
        model = meta_model(with_tables(model_config(raw.get("model") or {}), tables))
        dtypes = {name: dtype if dtype and t.is_floating_point() else t.dtype for name, t in tensors.items()}
        tensors = {name.removeprefix(weights.PREFIX): t.to(dtypes[name]) for name, t in tensors.items()}
    else:
        try:
            reader = _reader(raw["model_type"])
            model = meta_model(reader.config(raw))
            tensors = weights.from_native(reader.modern(tensors), model, reader.pieces, dtype or torch.float32)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
    stored = tensors.get("embed.weight", torch.empty(0)).dtype
    model = model.to(stored).to_empty(device="cpu")
    load_state(model, tensors, str(folder))
    load_tables(model, folder)
    return model.eval()


def _reader(kind: Any) -> Reader:
    if kind not in READERS:
        why = f": {llama.KNOWN_MISFITS[kind]}" if kind in llama.KNOWN_MISFITS else nearest(kind, READERS)
        raise UserError(f"config.json: model_type '{kind}' is not supported{why}")
    return READERS[kind]


def _must_be_new(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"'{path}' already exists; give a new folder")
