"""flash-linear-attention (fla) as a witness from outside, where somebody installed it: `fla-core` for the naive functions,
`flash-linear-attention` for layers and models. Neither is a dependency; without them the tests that ask are skipped.

Checked with version 0.6.0 beside torch 2.13 and triton 3.7.1. Its layers run Triton kernels, on a CPU in Triton's interpreter:
set TRITON_INTERPRET=1 for the process.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


def fla_module(name: str) -> ModuleType:
    """``fla.<name>``, or the calling test or module is skipped: fla may be absent, or fail to import beside this Triton."""
    try:
        return importlib.import_module(f"fla.{name}")
    except Exception as error:  # it probes devices and compilers while it is imported
        pytest.skip(f"no fla.{name} here ({type(error).__name__}: {error})", allow_module_level=True)


@contextlib.contextmanager
def in_fp64(module: ModuleType) -> Iterator[None]:
    """Inside, the naive functions of a module compute in fp64: they cast what they get to fp32, by either spelling."""
    cast, wide = torch.Tensor.float, _Fp64(**vars(torch))
    torch.Tensor.float = torch.Tensor.double
    module.torch = wide
    try:
        yield
    finally:
        torch.Tensor.float = cast
        module.torch = torch


class _Fp64(SimpleNamespace):
    """`torch` where ``float32`` and ``float`` mean fp64."""

    def __init__(self, **names: Any) -> None:
        super().__init__(**{**names, "float32": torch.float64, "float": torch.float64})


# -- layers


def layers_or_skip() -> None:
    """fla's kernels need a GPU or the interpreter, which is chosen before triton is imported."""
    if torch.cuda.is_available():
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("fla's layers on a CPU need TRITON_INTERPRET=1", allow_module_level=True)
    fla_module("layers")
    _interpretable()


def _interpretable() -> None:
    """What stands between fla's kernels and the interpreter: they are tuned by time, which needs a driver, and a loop index
    is a plain integer there, without the cast that they ask of it."""
    tuner = importlib.import_module("triton.runtime.autotuner")
    tuner.Autotuner._bench = lambda self, *args, **kwargs: [0.0, 0.0, 0.0]  # the first configuration wins
    for name, module in list(sys.modules.items()):
        if name.startswith(("fla.ops", "fla.modules")):
            module.range = _range  # pyright: ignore[reportAttributeAccessIssue]


class _Index(int):
    def to(self, *args: Any, **kwargs: Any) -> _Index:
        return self


def _range(*bounds: Any) -> list[_Index]:
    ends = [int(b.handle.data.item()) if hasattr(b, "handle") else int(b) for b in bounds]
    return [_Index(i) for i in builtins.range(*ends)]
