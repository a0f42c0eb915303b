"""The one place that chooses which form of an op runs.

Setting: ``auto`` (the default: Triton where it can run, else the reference, with the reason kept and logged once),
``reference``, or ``triton`` (raises with the reason where it cannot run); from the environment variable ``KERNELS`` or
``with dispatch.use("reference")``. ``counts`` says what really ran, ``reasons`` why an op fell back; a run stores both.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator

import torch

SETTINGS = ("auto", "reference", "triton")
counts: Counter[tuple[str, str]] = Counter()
reasons: dict[str, str] = {}
_setting: list[str] = [os.environ.get("KERNELS", "auto")]
_log = logging.getLogger("loci.kernels")


class KernelUnavailable(RuntimeError):
    """An explicit choice that cannot be met."""

    one_line = True


@contextlib.contextmanager
def use(setting: str) -> Iterator[None]:
    """Choose for the code inside."""
    _check(setting)
    _setting.append(setting)
    try:
        yield
    finally:
        _setting.pop()


def setting() -> str:
    _check(_setting[-1])
    return _setting[-1]


def _check(name: str) -> None:
    if name not in SETTINGS:
        raise KernelUnavailable(f"unknown kernel setting '{name}'; valid: {', '.join(SETTINGS)}")


def no_triton(device: torch.device) -> str | None:
    """The reason why no Triton kernel at all can run on this device, or None."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"tensors are on {device.type}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None


def choose(op: str, device: torch.device, why_not: Callable[[], str | None] | None) -> str:
    """-> "triton" or "reference". ``why_not`` says why this op's kernel cannot take these arguments (None: it can);
    ``why_not=None``: the op has no Triton form, and every setting runs its reference. Under torch.compile this runs once,
    while tracing. Raises KernelUnavailable for an explicit choice that cannot be met."""
    reason = "it has no Triton form" if why_not is None else no_triton(device) or why_not()
    wanted = setting()
    if wanted == "triton" and reason and why_not is not None:
        raise KernelUnavailable(f"{op}: no Triton kernel: {reason}")
    backend = "reference" if wanted == "reference" or reason else "triton"
    if wanted != "reference" and reason and op not in reasons:
        reasons[op] = reason
        _log.info("%s: reference form, because %s", op, reason)
    counts[op, backend] += 1
    return backend


# What torch._dynamo.assume_constant_result does, without importing the compiler (a second and a half) for every command.
choose._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def report() -> dict[str, dict[str, object]]:
    """What ran so far and why, as plain JSON: {op: {backend: calls, ..., "reason": ...}}."""
    found: dict[str, dict[str, object]] = {}
    for (op, backend), calls in sorted(counts.items()):
        found.setdefault(op, {})[backend] = calls
    for op, reason in reasons.items():
        found.setdefault(op, {})["reason"] = reason
    return found
