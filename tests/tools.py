"""What makes the contract suite strong: one table of tolerances, a scale-free error, poisoned memory, tiny models."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import models
from models import LM, Batch, ModelConfig, model_config
from models.mixers.bmojo import BMojo
from models.types import SLOTS, Aux

# ||out - ref|| / ||ref||, by purpose and dtype. Nothing relaxes these.
TOLERANCE: dict[tuple[str, torch.dtype], float] = {
    ("same", torch.float64): 1e-12,  # the same numbers in another order
    ("same", torch.float32): 1e-5,
    ("forms", torch.float64): 1e-10,  # two algorithms for one function
    ("forms", torch.float32): 2e-5,
    ("gradient", torch.float64): 1e-10,
    ("gradient", torch.float32): 1e-5,
    ("foreign", torch.float32): 1e-4,  # another library's implementation
    ("fp32", torch.bfloat16): 3e-2,  # against the same weights in fp32
    ("op", torch.float32): 1e-5,  # outputs and states of an op, against its definition in fp64
    ("op", torch.float16): 2e-3,
    ("op", torch.bfloat16): 5e-3,
    ("op gradient", torch.float32): 1e-5,
    ("op gradient", torch.float16): 2e-3,
    ("op gradient", torch.bfloat16): 8e-3,
    ("gate gradient", torch.float32): 1e-5,  # of decays and writing strengths, which are sums over whole rows
    ("gate gradient", torch.float16): 5e-3,
    ("gate gradient", torch.bfloat16): 2e-2,
}
CAUSAL = 1e-12  # absolute, fp64, after a disturbance of 1e3: matrix shapes alter last bits


def rel_err(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref|| in fp64 (the plain norm of the difference where the reference is zero)."""
    out, ref = out.detach().double(), ref.detach().double()
    scale = ref.norm()
    return float((out - ref).norm() / (scale if scale > 0 else 1.0))


def assert_close(out: Any, ref: Any, purpose: str = "same", dtype: torch.dtype = torch.float64, what: str = "") -> None:
    """Two pytrees: floats within the tolerance leaf by leaf, everything else equal."""
    (got, got_spec), (want, want_spec) = pytree.tree_flatten(out), pytree.tree_flatten(ref)
    assert got_spec == want_spec, f"{what}: different structure"
    limit = TOLERANCE[purpose, dtype]
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if not isinstance(a, Tensor):
            assert a == b, f"{what}[{i}]: {a} != {b}"
            continue
        assert a.shape == b.shape, f"{what}[{i}]: shape {tuple(a.shape)} != {tuple(b.shape)}"
        if not b.is_floating_point():
            assert torch.equal(a, b), f"{what}[{i}]: integers differ"
            continue
        error = rel_err(a, b)
        assert error <= limit, f"{what}[{i}]: relative error {error:.2e} > {limit:.0e}"  # NaN fails too


def same_bytes(a: Any, b: Any) -> bool:
    """Whether two pytrees of tensors are equal to the bit (NaN equals itself)."""
    leaves = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(_bytes(x) == _bytes(y) if isinstance(x, Tensor) else x == y for x, y in leaves)


def _bytes(t: Tensor) -> bytes:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def state_hash(model: nn.Module) -> str:
    """Over every parameter, buffer and row store of a model, moments included."""
    digest = hashlib.sha256()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, table in getattr(model, "tables", dict)().items():
        tensors |= {f"{name}/{key}": t for key, t in table.state_dict().items()}
    for name in sorted(tensors):
        digest.update(name.encode() + _bytes(tensors[name]))
    return digest.hexdigest()


def gradients(model: LM) -> dict[str, Tensor]:
    """Of every parameter, and of every row store as a dense table; the gradients are then forgotten."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, table in model.tables().items():
        taken = table.take_grad()
        if taken is not None:
            rows, grad = taken
            found[name] = grad.new_zeros(table.rows, table.width).index_copy(0, rows, grad)
        table.clear_grad()
    model.zero_grad()
    return found


def assert_same_gradients(out: dict[str, Tensor], ref: dict[str, Tensor]) -> None:
    assert out.keys() == ref.keys()
    for name, grad in ref.items():
        assert_close(out[name], grad, "gradient", grad.dtype, name)


# -- poison


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, memory that torch allocates without writing it (empty, empty_like, new_empty, to_empty, resize_, and all
    that is built on them) holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def poison(module: nn.Module) -> None:
    """Overwrite every parameter, buffer and row store."""
    tensors = [*module.parameters(), *module.buffers()]
    for table in getattr(module, "tables", dict)().values():
        tensors += table.state_dict().values()
    for t in tensors:
        if t.dtype == torch.bool:
            t.fill_(True)
        else:
            t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max)


# -- tiny models


@dataclass(frozen=True)
class Case:
    """One configuration that signs the contracts.

    ``part`` stands alone in both layers of a model (``slot`` set), or ``model`` is the whole config. ``nonlinear``: the
    ends of the names of losses that are not linear in the batch. ``other_flops`` are those per token, over all layers,
    that the cost counts beside matrix products; ``held`` ends the names of losses that hold what they pull at fixed, so that their
    gradient is not that of the function; ``flops_rtol`` is for parts whose products depend on a chunk's length;
    ``dropout`` is 0 for parts that refuse it.
    """

    name: str
    slot: str | None = None
    part: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    nonlinear: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    other_flops: float = 0.0
    flops_rtol: float = 1e-6
    dropout: float = 0.2
    bf16: float = TOLERANCE["fp32", torch.bfloat16]

    def config(self, **changes: Any) -> ModelConfig:
        raw: dict[str, Any] = {"d_model": 16, "n_layers": 2, "vocab_size": 23, **self.model}
        if self.slot:
            raw.setdefault("blocks", {"only": {self.slot: self.part}})
        return model_config({**raw, **changes})

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> LM:
        """Weights are spread out, so that each part's share of the output is of the size of the stream itself."""
        model = models.build(self.config(**changes), seed=seed, dtype=dtype)
        spread(model, seed)
        return model


@torch.no_grad()
def spread(model: LM, seed: int = 0) -> None:
    """Move every parameter and table row off its initial value (gates off zero, norms off one)."""
    generator = torch.Generator().manual_seed(seed + 1)
    for p in [*model.parameters(), *(t.state_dict()["values"] for t in model.tables().values())]:
        std = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.2
        p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p), alpha=std)


def parts_of(cfg: ModelConfig) -> set[tuple[str, str]]:
    """(slot, kind) of every part in a model, nested ones not counted."""
    pairs = [(slot, getattr(block, slot)) for block in cfg.layers() for slot in SLOTS]
    return {(slot, part.kind) for slot, part in pairs if part is not None}


def random_batch(B: int, T: int, vocab: int = 23, seed: int = 0, targets: bool = True, **fields: Any) -> Batch:
    """Tokens from 1 up; 0 is left for padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab, (B, T + 1), generator=generator)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous() if targets else None, **fields)


def segments(lengths: list[list[int]], T: int, pad_to: int) -> Tensor:
    """Document lengths of each row -> cu_seqlens: row ends included, filled up with empty segments to ``pad_to``."""
    ends = [0]
    for i, row in enumerate(lengths):
        for n in row:
            ends.append(ends[-1] + n)
        if ends[-1] != (i + 1) * T:
            ends.append((i + 1) * T)
    return torch.tensor(ends + [len(lengths) * T] * (pad_to - len(ends)), dtype=torch.int32)


def in_pieces(
    model: LM, tokens: Tensor, sizes: list[int], max_len: int, **fields: Any
) -> tuple[Tensor, Any, list[Aux]]:
    """Feed tokens [B, T] piece by piece with a state -> (features [B, T, D], final state, what was said)."""
    state = model.init_state(tokens.shape[0], max_len)
    outs, said, start = [], [], 0
    for n in sizes:
        part = slice(start, start + n)
        piece = Batch(tokens[:, part], **{k: v[:, part] for k, v in fields.items()})
        h, state, aux = model.features(piece, state)
        outs.append(h)
        said.append(aux)
        start += n
    return torch.cat(outs, dim=1), state, said


class Selections(TorchDispatchMode):
    """Which of several a model selects (top-k or sort over [B, T, N]), kept from one forward and imposed on others, whole or in
    pieces: a selection jumps where two candidates are close, so only under the same one are two precisions comparable. Of a
    selection over time the scores [B, T] are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.imposing = False
        self.calls, self.start = 0, 0

    def __enter__(self) -> Any:
        score = BMojo._score

        def imposed(*args: Any) -> Any:
            found, outputs = score(*args)
            return None if found is None else self._next(found), outputs

        self._patch = patch.object(BMojo, "_score", imposed)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.ops.aten.topk.default, torch.ops.aten.sort.stable) or args[0].ndim != 3:
            return func(*args, **(kwargs or {}))
        if not self.imposing:
            values, index = func(*args, **(kwargs or {}))
            return values, self._next(index)
        index = self._next(args[0])
        return args[0].gather(-1, index), index

    def _next(self, found: Tensor) -> Tensor:
        """``found`` [B, T, ...] itself, kept, or what was kept in its place."""
        if not self.imposing:
            self.kept.append(found)
            return found
        T = found.shape[1]
        kept = self.kept[self.calls % len(self.kept)][:, self.start : self.start + T]
        self.calls += 1
        if self.calls % len(self.kept) == 0:  # all selections of this piece: the next piece, or the first again
            self.start = (self.start + T) % self.kept[0].shape[1]
        return kept
