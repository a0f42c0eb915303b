"""Ahead-of-time compilation of every Triton kernel for GPUs that need not be here: what each configuration costs, and the gate.

Each op's ``triton.py`` says in ``compilations()`` which configurations its dispatch can choose. They compile under a driver that
knows a target and nothing else. The gate: everything compiles; on sm_90 nothing spills registers, shared memory fits, and kernels
whose tiles allow it use wgmma. Nothing here runs a kernel, and a process with TRITON_INTERPRET=1 cannot compile any.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Compilation(NamedTuple):
    """One configuration of one kernel, as its op would launch it."""

    op: str  # the op's directory
    name: str  # which kernel and configuration, unique within the op
    kernel: Any  # what @triton.jit made
    args: tuple[Any, ...]  # tensors (meta device: only dtype and alignment count) and scalars, in the kernel's order
    kwargs: dict[str, Any]  # constexprs, num_warps, num_stages
    wgmma: bool = True  # it has dots that are large enough for Hopper's warp-group instructions, if it has 4 or 8 warps
    targets: tuple[str, ...] | None = None  # those for which dispatch chooses it; None: all


class Target(NamedTuple):
    backend: str
    arch: int | str
    warp: int  # threads
    shared: int  # bytes of shared memory that one program may use, from the vendors' documents; triton does not check


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912),
    "sm_90": Target("cuda", 90, 32, 232448),
    "sm_100": Target("cuda", 100, 32, 232448),
    "gfx942": Target("hip", "gfx942", 64, 65536),
}
GATED = "sm_90"  # the target that the tiles are made for
_PRODUCTS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")  # matrix instructions, in the assembly's words


@dataclass(frozen=True)
class Compiled:
    """What one configuration costs on one target. Sizes in bytes; registers per thread; seconds include ptxas."""

    op: str
    name: str
    target: str
    warps: int
    stages: int
    registers: int = 0
    spill: int = 0
    shared: int = 0
    products: dict[str, int] = field(default_factory=dict)  # matrix instruction -> how often it stands in the assembly
    seconds: float = 0.0
    problems: tuple[str, ...] = ()  # what fails the gate
    remarks: tuple[str, ...] = ()  # what would fail it if this were the gated target

    def __str__(self) -> str:
        return f"{self.op} {self.name} on {self.target}"


def entries(ops: Iterable[str] | None = None) -> list[Compilation]:
    """Every configuration of the ops (None: all that have a Triton form). Raises ValueError for an op without one."""
    known = with_triton()
    wanted = known if ops is None else tuple(ops)
    for op in wanted:
        if op not in known:
            raise ValueError(f"no op '{op}' with a Triton form; valid: {', '.join(known)}")
    return [entry for op in wanted for entry in _of(op)]


def with_triton() -> tuple[str, ...]:
    return tuple(sorted(p.parent.name for p in Path(__file__).parent.glob("*/triton.py")))


@functools.cache
def _of(op: str) -> list[Compilation]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled in a process with TRITON_INTERPRET=1")
    found = list(importlib.import_module(f"kernels.{op}.triton").compilations())
    names = [entry.name for entry in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{op}: two configurations of one name: {sorted(twice)}")
    return found


def compile_all(work: Iterable[tuple[str, Compilation]], jobs: int) -> Iterator[Compiled]:
    """(target, configuration) pairs -> results as they come, from ``jobs`` processes."""
    tasks = [(target, entry.op, entry.name) for target, entry in work]
    if jobs <= 1:
        yield from (_compile(*task) for task in tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_compile, *task) for task in tasks]):
            yield done.result()


def applies(entry: Compilation, target: str) -> bool:
    return entry.targets is None or target in entry.targets


def _compile(target: str, op: str, name: str) -> Compiled:
    entry = next(e for e in _of(op) if e.name == name)
    warps, stages = entry.kwargs.get("num_warps", 4), entry.kwargs.get("num_stages", 3)
    known = functools.partial(Compiled, op, name, target, warps, stages)
    start = time.perf_counter()
    _pretend(target)
    try:
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # where the compiler prints whole programs that it cannot assemble
            made = entry.kernel.warmup(*entry.args, grid=(1,), **entry.kwargs)
    except Exception as error:  # the compiler raises errors of many kinds
        said = " ".join(str(error).split())
        problem = f"does not compile: {type(error).__name__}: {said if len(said) < 300 else '...' + said[-300:]}"
        return known(problems=(problem,), seconds=time.perf_counter() - start)
    registers, spill = _resources(made, TARGETS[target])
    text = made.asm["ptx" if TARGETS[target].backend == "cuda" else "amdgcn"]
    products = {word: text.count(word) for word in _PRODUCTS if word in text}
    wrong = []
    if spill:
        wrong.append(f"spills {spill} bytes")
    if made.metadata.shared > TARGETS[target].shared:
        wrong.append(f"{made.metadata.shared} bytes of shared memory of {TARGETS[target].shared}")
    if entry.wgmma and target == GATED and warps % 4 == 0 and "wgmma.mma_async" not in products:
        wrong.append("no wgmma")
    gated = target == GATED
    return known(
        registers=registers,
        spill=spill,
        shared=made.metadata.shared,
        products=products,
        seconds=time.perf_counter() - start,
        problems=tuple(wrong) if gated else (),
        remarks=() if gated else tuple(wrong),
    )


@functools.cache
def _driver(target: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    backend, arch, warp, _ = TARGETS[target]

    class Pretended(DriverBase):
        """Answers the compiler's questions about the device; launches nothing."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget(backend, arch, warp)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("kernels are not tuned here")

        def get_current_device(self) -> int:
            return list(TARGETS).index(target)  # compiled kernels are kept per device

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    return Pretended()


def _pretend(target: str) -> None:
    from triton.runtime import driver

    driver.set_active(_driver(target))


def _resources(made: Any, target: Target) -> tuple[int, int]:
    """-> (registers per thread, bytes of stack per thread). Our kernels keep nothing on a stack but what registers cannot hold."""
    if target.backend == "hip":
        text = made.asm["amdgcn"]
        registers, scratch = (
            _number(rf"\.{key}:\s+(\d+)", text) for key in ("vgpr_count", "private_segment_fixed_size")
        )
        return registers, scratch
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        used = _cuobjdump("-res-usage", file.name)
    return _number(r"REG:(\d+)", used), _number(r"STACK:(\d+)", used)


def _cuobjdump(*args: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), *args], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no '{pattern}' in what the compiler says")
    return int(found[1])
