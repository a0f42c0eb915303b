"""Triton's interpreter, made right for bf16, so that kernels of every dtype can be tested without a GPU.

It keeps bf16 as raw uint16 and computes with those integers: sums and products are nonsense without an error, and casts from fp32
cut instead of rounding to even. ``install`` makes loads, casts, arithmetic and dots exact, lets reductions and atomics of bf16
raise (kernels work in fp32 right after a load, so these are mistakes), lets triton 3.6 live with numpy 2.4 and later, and scans
row by row instead of number by number, which takes minutes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def install() -> None:
    """Once per process that has TRITON_INTERPRET=1, before the first launch."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    half = tl.bfloat16

    def is_half(x: Any) -> bool:
        return x.dtype.scalar == half

    def widened(x: Any) -> Any:
        if not is_half(x):
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def narrowed(data: np.ndarray) -> Any:
        return handle(round_to_bf16(data), half)

    plain = {
        name: getattr(builder, name) for name in ("create_dot", "cast_impl", "binary_op", "unary_op", "ternary_op")
    }

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return plain["create_dot"](self, widened(a), widened(b), d, *rest)

    def cast(self: Any, x: Any, to: Any) -> Any:
        if is_half(x) and to.scalar != half:
            return plain["cast_impl"](self, widened(x), to)
        if not is_half(x) and to.scalar == half:
            return narrowed(x.data)
        return plain["cast_impl"](self, x, to)

    def binary(self: Any, a: Any, b: Any, operator: Any) -> Any:
        if not is_half(a):
            return plain["binary_op"](self, a, b, operator)
        out = operator(widened(a).data, widened(b).data)
        return handle(out, tl.int1) if out.dtype == np.bool_ else narrowed(out)

    def unary(self: Any, x: Any, operator: Any) -> Any:
        return narrowed(operator(widened(x).data)) if is_half(x) else plain["unary_op"](self, x, operator)

    def ternary(self: Any, a: Any, b: Any, c: Any, operator: Any) -> Any:
        if is_half(c) and operator is not np.where:  # choosing between raw values is right as it is
            return narrowed(operator(*(widened(x).data for x in (a, b, c))))
        return plain["ternary_op"](self, a, b, c, operator)

    builder.get_bf16 = lambda self, value: narrowed(np.array([value]))  # a constant; there is none in the original

    for name, patched in zip(plain, (dot, cast, binary, unary, ternary), strict=True):
        setattr(builder, name, patched)

    def refusing(fn: Any, what: str) -> Any:
        def run(self: Any, *args: Any) -> Any:
            flat = [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,))]
            if any(getattr(getattr(x, "dtype", None), "scalar", None) == half for x in flat):
                raise TypeError(f"{what} of bf16 in a kernel: widen to fp32 first")
            return fn(self, *args)

        return run

    scans = interpreter.ReduceScanOpInterface
    scans.apply = refusing(scans.apply, "a reduction or scan")
    builder.create_atomic_rmw = refusing(builder.create_atomic_rmw, "an atomic")
    interpreter.ScanOps.generic_scan = _scan_by_rows

    if triton.__version__.startswith("3.6"):
        _let_one_element_be_an_index(interpreter)


def _scan_by_rows(self: Any, inputs: Any) -> Any:
    """In place of ``ScanOps.generic_scan``: the same function of two numbers, applied to all numbers of a row at once."""
    rows = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    results = [np.empty_like(x) for x in rows]
    now: tuple[Any, ...] = ()
    for i in range(len(rows[0])):
        row = tuple(self.to_tensor(x[i], given.dtype) for x, given in zip(rows, inputs, strict=True))
        now = self.combine_fn.fn(*now, *row) if now else row
        now = now if isinstance(now, tuple) else (now,)
        for result, x in zip(results, now, strict=True):
            result[i] = x.handle.data
    whole = (np.moveaxis(x, 0, self.axis) for x in results)
    return [self.to_tensor(x, given.dtype) for x, given in zip(whole, inputs, strict=True)]


def round_to_bf16(data: np.ndarray) -> np.ndarray:
    """Floats -> raw bf16, to the nearest, ties to even: by torch, which does what the hardware does."""
    wide = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
    return wide.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(np.shape(data))


def _let_one_element_be_an_index(interpreter: Any) -> None:
    """numpy 2.4 made ``int()`` of an array of one element an error; triton 3.6 needs it for bounds of loops."""
    plain = interpreter._patch_lang_tensor

    def patched(tensor: Any, *rest: Any, **named: Any) -> Any:
        result = plain(tensor, *rest, **named)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        return result

    interpreter._patch_lang_tensor = patched
