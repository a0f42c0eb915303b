"""Small real runs: a text corpus, a config, and `train.py` in processes of its own that can be made to fail.

The processes are forked from a server that has imported everything once, so one costs little more than its steps.
"""

from __future__ import annotations

import importlib
import json
import keyword
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
WORDS = keyword.kwlist
PRELOAD = ["train", "tests.toy_memory", "torch._dynamo"]  # building a model on meta imports the last, in seconds
SWIGLU = {"kind": "swiglu", "hidden": 24}
PLAIN = {
    "d_model": 16,
    "n_layers": 2,
    "blocks": {"only": {"mixer": {"kind": "attention", "heads": 2}, "channel": SWIGLU}},
}
# Everything a part may do: state, losses, stats, writes, row resets, shared addresses, row stores. Losses that are not
# linear in the batch have no weight here, so that one large batch equals several small ones.
TOYS = {
    "d_model": 16,
    "n_layers": 4,
    "blocks": {
        "delta": {"mixer": {"kind": "gated_delta", "heads": 2}},
        "local": {
            "mixer": {"kind": "attention", "heads": 2, "window": 8},
            "channel": {"kind": "tests.toys:ToySlots", "balance_weight": 0.0},
        },
        "ema": {"mixer": {"kind": "tests.toys:ToyEMA", "spread_weight": 0.0}, "channel": SWIGLU},
    },
    "pattern": ["ema", "local", "ema", "delta"],
    "at": {1: {"memory": {"kind": "tests.toy_memory:ToyHash"}}, 2: {"memory": {"kind": "tests.toy_memory:ToyHash"}}},
}


def write_text(folder: Path, documents: int = 64, seed: int = 0) -> Path:
    """Documents of 4 to 10 lines, less than 500 bytes, of Python-like words."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for i in range(documents):
        lines = (" ".join(rng.choices(WORDS, k=rng.randint(2, 7))) for _ in range(rng.randint(4, 10)))
        (folder / f"{i:03d}.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_config(folder: Path, model: dict[str, Any] = PLAIN, name: str = "small", **sections: dict[str, Any]) -> Path:
    """A run of 12 steps on text in ``folder``; ``sections`` add to those of the file. -> its YAML."""
    text = folder / "text"
    if not text.exists():
        write_text(text)
    raw: dict[str, Any] = {
        "out_dir": str(folder / "runs"),
        "model": model,
        "data": {
            "sources": [{"path": str(text)}],
            "seq_len": 32,
            "val_fraction": 0.1,
            "cache_dir": str(folder / "cache"),
        },
        "optim": {"lr": 5e-3},
        "train": {
            "steps": 12,
            "batch_size": 8,
            "val_every": 6,
            "val_tokens": 500,
            "save_every": 3,
            "sample_tokens": 6,
            "precision": "fp32",
            "device": "cpu",
        },
        "log": {"every": 1},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


# -- processes


@dataclass(frozen=True)
class Fault:
    """What goes wrong at the n-th call of a function, named by ``package.module:attribute`` (all of one object).

    ``before`` and ``after`` that call the process gets ``number``; ``half``: after it, with the file it wrote cut in
    half. Some signals are handled: then the process goes on. ``twice``: the signal comes again after a second.
    ``rank``: only there.
    """

    targets: tuple[str, ...]
    call: int
    when: str = "before"
    number: int = signal.SIGKILL
    twice: bool = False
    rank: int | None = None


IN_STEP = ("training.optim:Optimizer.step",)
IN_WRITE = ("models.folder:write_tensors", "training.checkpoint:write_tensors")
IN_FSYNC = ("models.folder:_fsync",)
IN_RENAME = ("os:rename",)


@dataclass(frozen=True)
class Result:
    code: int  # negative: the signal that ended it
    out: str
    err: str

    @property
    def run(self) -> Path:
        """The run folder that the last line of the output names."""
        return Path(self.out.strip().splitlines()[-1].split()[-1])


def train(*argv: str | Path, fault: Fault | None = None, ranks: int = 1, spy: tuple[str, Path] | None = None) -> Result:
    """``train.py ARGV``, on ``ranks`` gloo ranks. -> what the first of them said; the others must end alike.

    ``spy``: a function, named like a fault's target, that every rank calls with its number and this folder at first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    words = [str(a) for a in argv]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp())
    places = [(r, ranks, port) for r in range(ranks)]
    started = [context.Process(target=_child, args=(words, folder, fault, p, spy)) for p in places]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    out, err = ((folder / f"{name}-0").read_text() for name in ("out", "err"))
    shutil.rmtree(folder)
    codes = [p.exitcode for p in started]
    assert len(set(codes)) == 1, f"ranks ended with {codes}: {err}"
    assert codes[0] is not None
    return Result(codes[0], out, err)


def _child(
    argv: list[str], folder: Path, fault: Fault | None, place: tuple[int, int, int], spy: tuple[str, Path] | None
) -> None:
    rank, ranks, port = place
    for name, fd in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    if ranks > 1:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {k: str(v) for k, v in where.items()}
    import train as command

    if fault and fault.rank in (None, rank):
        _arm(fault)
    if spy:
        _resolve(spy[0])[2](rank, spy[1])
    try:
        code = command.main(argv)
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    sys.stdout.flush()
    sys.exit(code)


def _arm(fault: Fault) -> None:
    """Wrap the faulty function wherever it is bound."""
    calls = 0
    original = _resolve(fault.targets[0])[2]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != fault.call:
            return original(*args, **kwargs)
        if fault.when == "before":
            _strike(fault)
        found = original(*args, **kwargs)
        if fault.when == "half":
            path = args[1]
            os.truncate(path, os.path.getsize(path) // 2)
        if fault.when != "before":
            _strike(fault)
        return found

    for target in fault.targets:
        owner, name, _ = _resolve(target)
        setattr(owner, name, wrapped)


def _strike(fault: Fault) -> None:
    os.kill(os.getpid(), fault.number)
    if fault.twice:
        time.sleep(1)
        os.kill(os.getpid(), fault.number)


def _resolve(target: str) -> tuple[Any, str, Callable[..., Any]]:
    module, _, dotted = target.partition(":")
    owner: Any = importlib.import_module(module)
    *path, name = dotted.split(".")
    for step in path:
        owner = getattr(owner, step)
    return owner, name, getattr(owner, name)


# -- what a run left behind


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "mfu")} for line in lines]


def losses(run: Path) -> list[float]:
    """Of every logged step."""
    return [line["loss"] for line in metrics(run) if "loss" in line]


def steps_saved(run: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in (run / "checkpoints").glob("step_*"))


def tensors(run: Path, step: int, names: Iterable[str] = ("model", "optim", "tables", "rng")) -> dict[str, Tensor]:
    """Everything in a checkpoint: weights, model memory, moments, tables, generators."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    files = [folder / f"{name}.safetensors" for name in names]
    return {f"{f.stem}:{k}": t for f in files if f.exists() for k, t in load_file(str(f)).items()}


def assert_same_run(run: Path, reference: Path, step: int) -> None:
    """Equal to the bit: every number logged, every sample, every tensor of the checkpoint of ``step``."""
    assert metrics(run) == metrics(reference)
    assert (run / "samples.txt").read_text() == (reference / "samples.txt").read_text()
    ours, theirs = tensors(run, step), tensors(reference, step)
    assert ours.keys() == theirs.keys()
    different = [name for name, t in ours.items() if not torch.equal(t, theirs[name])]
    assert not different, f"not equal to the bit: {different[:5]}"


def one_error(result: Result, *words: str) -> str:
    """A user's error: exit code 2 and one last line on stderr that holds ``words``; -> that line."""
    lines = result.err.strip().splitlines()
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert lines[-1].startswith("error: ")
    assert [line.startswith("error: ") for line in lines].count(True) == 1
    missing = [w for w in words if w not in lines[-1]]
    assert not missing, f"{missing} not in: {lines[-1]}"
    return lines[-1]


def snapshot(folder: Path, skip: Sequence[str] = ()) -> set[str]:
    """All paths below a folder."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.name not in skip}
