"""``python -m models CONFIG [key=value ...]``: the model of a run file as a table, without building its weights;
``python -m models match CONFIG --to OTHER``: the width that makes it as large as another; ``--controls``: its
rivals; ``--rho``: experts or tables."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import yaml

from models import zoo
from models.allocation import allocate
from models.config import ModelConfig, model_config
from models.errors import UserError, guard
from models.match import BUDGETS, CONTROLS, control, match
from models.parsing import load_yaml, to_dict
from models.summary import summary

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BYTES_VOCABULARY = 257  # every byte and the end of text
DEFAULT_SEQ_LEN = 256


@guard
def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["match"]:
        _match(words[1:])
    else:
        _summary(words)


def _summary(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models",
        description="Print parameters, FLOPs per token and state bytes of every layer of a run file's model.",
        epilog="example: python -m models configs/quickstart.yaml model.n_layers=8 --seq-len 2048; "
        "equal budgets: python -m models match --help",
    )
    args = _arguments(parser, argv)
    print(summary(args.model, args.seq_len, args.dtype))


def _match(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models match",
        description="Find the width, rank or number of heads with which a model is as large or as expensive as another;\n"
        "or the dense and structured channels with which a model is as large and as expensive as it is;\n"
        "or how a mixture of experts shares what its tokens do not touch with n-gram tables.",
        epilog="examples:\n"
        "  python -m models match configs/quickstart.yaml --to configs/cpu-8m.yaml --vary d_model --multiple-of 8\n"
        "  python -m models match configs/quickstart.yaml --controls\n"
        "  python -m models match configs/engram-moe-small.yaml --rho 0.6 0.8 1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--to", metavar="OTHER", help="a run's YAML file, or a number")
    goal.add_argument("--controls", action="store_true", help="other channels in place of the model's own")
    goal.add_argument(
        "--rho",
        metavar="SHARE",
        type=float,
        nargs="+",
        help="of the sparse parameters that stay with experts, the others become rows of tables",
    )
    parser.add_argument("--on", choices=BUDGETS, help="what is to be equal (default: params; for controls also flops)")
    parser.add_argument("--vary", metavar="FIELD", default="channel.hidden", help="what is free (default: %(default)s)")
    parser.add_argument("--multiple-of", type=int, default=1, help="of what the value must be one (default: 1)")
    parser.add_argument("--activation", choices=("gelu", "relu2", "swiglu"), default="gelu", help="of the controls")
    args = _arguments(parser, argv)
    if args.controls:
        for on in [args.on] if args.on else ["params", "flops"]:
            _print_controls(args, on)
        return
    if args.rho:
        for rho in args.rho:
            print(allocate(args.model, rho, args.seq_len))
        return
    on = args.on or "params"
    to = _target(args.to)
    found = match(args.model, to, on, args.vary, args.seq_len, args.multiple_of, args.dtype)
    print(f"{args.vary}={found.value}\n{on} {found}")


def _print_controls(args: argparse.Namespace, on: str) -> None:
    print(f"equal {on} at T={args.seq_len}")
    for name in CONTROLS:
        try:
            found = control(args.model, name, on, args.activation, seq_len=args.seq_len)
        except UserError as error:
            print(f"  {name}: {error}")
            continue
        channel = next(block.channel for block in found.config.blocks.values() if block.channel is not None)
        print(f"  channel: {_settings(channel)}\n    {found}")


def _settings(part: Any) -> str:
    """A part's config as YAML in one line, without what it says by default; its kind and form are always said."""
    default = to_dict(type(part)())
    said = {k: v for k, v in to_dict(part).items() if k in ("kind", "form") or v != default[k]}
    return yaml.safe_dump(said, default_flow_style=True, sort_keys=False, width=1000).strip()


def _arguments(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The command's options, and those that both commands have; ``model``, ``seq_len`` and ``dtype`` are filled in."""
    parser.add_argument("config", metavar="CONFIG", help="a run's YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="a setting, e.g. model.d_model=512")
    parser.add_argument("--seq-len", type=int, help="T; default: the file's data.seq_len")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the state (default: %(default)s)")
    parser.add_argument("--allow-foreign", action="store_true", help='permit kinds of the form "package.module:Class"')
    args = parser.parse_intermixed_args(argv)
    zoo.allow_foreign(args.allow_foreign)
    raw = load_yaml(args.config, args.overrides)
    args.seq_len = args.seq_len if args.seq_len is not None else _seq_len(raw)
    if args.seq_len < 1:
        raise UserError(f"--seq-len must be at least 1, got {args.seq_len}")
    args.model, args.dtype = read_model(raw, args.config), DTYPES[args.dtype]
    return args


def _target(text: str) -> ModelConfig | float:
    """Of ``--to``: a number, or the model in a file."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return read_model(load_yaml(text), text)


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
