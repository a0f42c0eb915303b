"""An op with a hand-written backward, for eager code and for the compiler.

Eager calls go through an ``autograd.Function``; a traced call goes through ``torch.library``, so that the graph stays whole and
what an op does inside (loops over chunks, Triton launches, a look at ``cu_seqlens`` on the CPU) is the op's own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]


class Op:
    """``op(*tensors, options=(...), backend=...) -> outputs``.

    ``forward(tensors, options, backend) -> [*outputs, *saved]``; the first ``outputs`` results are what a caller gets, the
    others are kept for the backward (fresh tensors, never views of the inputs), and after them the outputs that ``also`` numbers.
    ``backward(tensors, saved, grads, needs, options, backend) -> [gradient or None]``, one per tensor: ``needs`` says which
    are wanted, ``grads`` are those of the outputs, None where nobody used one.
    ``fake(tensors, options, backend)``: results of forward in the right shape and dtype, computing nothing.
    Options are floats: torch.library knows no lists of mixed kinds. A gradient has the shape and dtype of its tensor.
    All three run outside autocast and without gradient recording.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[Tensors, Sequence[float], str], list[Tensor]],
        backward: Callable[[Tensors, Sequence[Tensor], Tensors, Sequence[bool], Sequence[float], str], Tensors],
        fake: Callable[[Tensors, Sequence[float], str], list[Tensor]],
        outputs: int,
        also: Sequence[int] = (),
    ) -> None:
        self.forward, self.backward, self.fake, self.outputs = _plain(forward), _plain(backward), fake, outputs
        self._also = tuple(also)
        self._traced_forward, self._traced_backward = self._register(name)

    def __call__(
        self, *tensors: Tensor | None, options: Sequence[float] = (), backend: str = "reference"
    ) -> tuple[Tensor, ...]:
        options = [float(x) for x in options] or [0.0]  # torch.library takes an empty list for one of tensors
        if torch.compiler.is_compiling():
            return tuple(self._traced(tensors, options, backend)[: self.outputs])
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
            return tuple(self.forward(tensors, options, backend)[: self.outputs])
        return _Eager.apply(self, options, backend, *tensors)  # pyright: ignore[reportReturnType]

    def saved(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Of all results of forward, what the backward gets."""
        return [*results[self.outputs :], *(results[i] for i in self._also)]

    def _traced(self, tensors: Tensors, options: list[float], backend: str) -> list[Tensor]:
        present = [t is not None for t in tensors]
        return self._traced_forward([t for t in tensors if t is not None], present, options, backend)

    def _register(self, name: str) -> tuple[Any, Any]:
        """torch.library knows no gradient of a list with gaps: tensors travel without their Nones, and a list says where."""

        def forward(
            tensors: Sequence[Tensor], present: Sequence[bool], options: Sequence[float], backend: str
        ) -> list[Tensor]:
            return self.forward(_spread(tensors, present), options, backend)

        def fake(
            tensors: Sequence[Tensor], present: Sequence[bool], options: Sequence[float], backend: str
        ) -> list[Tensor]:
            return self.fake(_spread(tensors, present), options, backend)

        def backward(
            tensors: Sequence[Tensor],
            present: Sequence[bool],
            saved: Sequence[Tensor],
            grads: Sequence[Tensor],
            given: Sequence[bool],
            needs: Sequence[bool],
            options: Sequence[float],
            backend: str,
        ) -> list[Tensor]:
            inputs = _spread(tensors, present)
            found = self.backward(inputs, saved, _spread(grads, given), needs, options, backend)
            return [_laid_out(g, t) for g, t, need in zip(found, inputs, needs, strict=True) if need and t is not None]

        def fake_backward(
            tensors: Sequence[Tensor],
            present: Sequence[bool],
            saved: Sequence[Tensor],
            grads: Sequence[Tensor],
            given: Sequence[bool],
            needs: Sequence[bool],
            options: Sequence[float],
            backend: str,
        ) -> list[Tensor]:
            inputs = _spread(tensors, present)
            return [torch.empty_like(t) for t, need in zip(inputs, needs, strict=True) if need and t is not None]

        traced = torch.library.custom_op(f"loci::{name}", forward, mutates_args=())
        traced.register_fake(fake)
        traced_backward = torch.library.custom_op(f"loci::{name}_backward", backward, mutates_args=())
        traced_backward.register_fake(fake_backward)

        def setup(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
            tensors, ctx.present, ctx.options, ctx.backend = inputs
            ctx.count = len(tensors)
            ctx.save_for_backward(*tensors, *self.saved(output))

        def grad(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
            kept = ctx.saved_tensors
            tensors, saved = kept[: ctx.count], kept[ctx.count :]
            own = [t.is_floating_point() and t.requires_grad for t in tensors]
            wanted = iter(own)
            needs = [p and next(wanted) for p in ctx.present]
            given = [
                g is not None and g.numel() > 0 for g in grads[: self.outputs]
            ]  # an empty output was not asked for
            arrived = [g for g, here in zip(grads, given, strict=False) if here and g is not None]
            found = iter(
                traced_backward(
                    list(tensors), ctx.present, list(saved), arrived, given, needs, ctx.options, ctx.backend
                )
            )
            return [next(found) if need else None for need in own], None, None, None

        traced.register_autograd(grad, setup_context=setup)
        return traced, traced_backward


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Op, options: Sequence[float], backend: str, *tensors: Tensor | None) -> Any:
        results = op.forward(tensors, options, backend)
        outputs, saved = results[: op.outputs], op.saved(results)
        ctx.op, ctx.options, ctx.backend, ctx.saved = op, options, backend, len(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept = ctx.saved_tensors  # once: under activation checkpointing every look unpacks
        saved, tensors = kept[: ctx.saved], kept[ctx.saved :]
        needs = ctx.needs_input_grad[3:]
        if all(g is None for g in grads[: ctx.op.outputs]):
            return (None,) * (3 + len(tensors))
        found = ctx.op.backward(tensors, saved, grads, needs, ctx.options, ctx.backend)
        return None, None, None, *(g if need else None for g, need in zip(found, needs, strict=True))


def _plain(fn: Callable[..., Any]) -> Callable[..., Any]:
    def run(tensors: Tensors, *rest: Any) -> Any:
        device = next(t.device.type for t in tensors if t is not None)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return fn(tensors, *rest)

    return run


def _spread(tensors: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor | None]:
    given = iter(tensors)
    return [next(given) if here else None for here in present]


def _laid_out(g: Tensor | None, like: Tensor) -> Tensor:
    """A gradient with the strides that `fake_backward` promised; zeros for None."""
    if g is None:
        return torch.zeros_like(like)
    promised = torch.empty_like(like, device="meta")
    return g if g.stride() == promised.stride() else torch.empty_like(like).copy_(g)
