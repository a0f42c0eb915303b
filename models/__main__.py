"""``python -m models CONFIG [key=value ...]``: the model of a run file as a table, without building its weights."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from models import zoo
from models.config import ModelConfig, model_config
from models.errors import UserError, guard
from models.parsing import load_yaml
from models.summary import summary

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BYTES_VOCABULARY = 257  # every byte and the end of text
DEFAULT_SEQ_LEN = 256


@guard
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models",
        description="Print parameters, FLOPs per token and state bytes of every layer of a run file's model.",
        epilog="example: python -m models configs/quickstart.yaml model.n_layers=8 --seq-len 2048",
    )
    parser.add_argument("config", metavar="CONFIG", help="a run's YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="a setting, e.g. model.d_model=512")
    parser.add_argument("--seq-len", type=int, help="T; default: the file's data.seq_len")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the state (default: %(default)s)")
    parser.add_argument("--allow-foreign", action="store_true", help='permit kinds of the form "package.module:Class"')
    args = parser.parse_intermixed_args(argv)
    zoo.allow_foreign(args.allow_foreign)
    raw = load_yaml(args.config, args.overrides)
    seq_len = args.seq_len if args.seq_len is not None else _seq_len(raw)
    if seq_len < 1:
        raise UserError(f"--seq-len must be at least 1, got {seq_len}")
    print(summary(read_model(raw, args.config), seq_len, DTYPES[args.dtype]))


def read_model(raw: dict[str, Any], path: str) -> ModelConfig:
    """The model of a run file's plain data; a vocabulary that is not given is taken from the data's settings."""
    if not isinstance(raw.get("model"), dict):
        raise UserError(f"'{path}': no 'model' section")
    model = dict(raw["model"])
    if not model.get("vocab_size"):
        model["vocab_size"] = _vocabulary(raw)
    return model_config(model)


def _section(raw: Any, name: str) -> dict[str, Any]:
    found = raw.get(name)
    return found if isinstance(found, dict) else {}


def _seq_len(raw: dict[str, Any]) -> int:
    found = _section(raw, "data").get("seq_len") or _section(raw, "model").get("max_seq_len") or DEFAULT_SEQ_LEN
    if not isinstance(found, int):
        raise UserError(f"data.seq_len: expected int, got {found!r}")
    return found


def _vocabulary(raw: dict[str, Any]) -> int:
    synthetic = _section(_section(raw, "data"), "synthetic").get("vocab_size")
    if isinstance(synthetic, int):
        return synthetic
    tokenizer = _section(_section(raw, "data"), "tokenizer")
    kind, size = tokenizer.get("kind", "bytes"), tokenizer.get("vocab_size", 8192)
    if kind == "bytes":
        return BYTES_VOCABULARY
    if kind == "bpe" and isinstance(size, int):
        return size
    raise UserError("the vocabulary of this run is only known once its tokenizer is loaded; give model.vocab_size=N")


if __name__ == "__main__":
    raise SystemExit(main())
