"""The files of a run folder that explain the run: what it is, where it ran, how it ended."""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from kernels import dispatch
from models.errors import UserError

PACKAGES = ("torch", "triton", "numpy", "tokenizers", "transformers", "datasets", "lm-eval", "einops", "safetensors")


def new_run_folder(out_dir: str, name: str) -> Path:
    """``out_dir/name``, or with a number behind it when that is taken: a fresh start never touches an older run."""
    base = Path(out_dir) / (name or "run")
    for i in itertools.count(1):
        path = base if i == 1 else base.with_name(f"{base.name}-{i}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the run folder {path}: {error.strerror}") from error
    raise AssertionError


def write_description(run: Path, config: dict[str, Any], summary: str, corpus: dict[str, Any]) -> None:
    """config.yaml, summary.txt, data.json and environment.json: what a run is, written when it starts."""
    write_whole(run / "summary.txt", summary + "\n")
    write_whole(run / "data.json", json.dumps(corpus, indent=1))
    write_config(run, config)
    write_environment(run)


def write_config(run: Path, config: dict[str, Any]) -> None:
    """The resolved config; again when a resumed run changes what it may."""
    write_whole(run / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def write_environment(run: Path) -> None:
    """Versions, commit, uncommitted changes and machine of this process; those of earlier processes stay as a list."""
    path = run / "environment.json"
    before = _read(path)
    earlier = [*before.pop("earlier", []), before] if before else []
    write_whole(path, json.dumps(environment() | {"kernels": _kernels(), "earlier": earlier}, indent=1))
    diff = _git("diff", "HEAD")
    if diff:
        write_whole(run / f"source{len(earlier) + 1 if earlier else ''}.diff", diff + "\n")


def environment() -> dict[str, Any]:
    """Command, versions, commit and machine of this process."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "threads": torch.get_num_threads(),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
    }


def write_outcome(run: Path, device: torch.device, tables: Mapping[str, Mapping[str, float]]) -> None:
    """What is known at the end: which kernels ran and why, the most memory that this process needed, and what its tables
    measured (`RowStore.stats`)."""
    measured = {name: dict(stats) for name, stats in tables.items() if stats}
    _add_to_environment(run, kernels=_kernels(), peak_memory_bytes=_peak_memory(device), tables=measured)


def write_finished(run: Path) -> None:
    """Mark a run whose last step is done and judged."""
    _add_to_environment(run, finished=True)


def _add_to_environment(run: Path, **facts: Any) -> None:
    path = run / "environment.json"
    write_whole(path, json.dumps({**_read(path), **facts}, indent=1))


def _peak_memory(device: torch.device) -> int | None:
    """Bytes: of tensors on a GPU, of the whole process on a CPU; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _kernels() -> dict[str, Any]:
    return {"setting": dispatch.setting(), "ran": dispatch.report()}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, whoever else writes it. Raises UserError when the disk refuses."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _git(*args: str) -> str | None:
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "cpu"
