"""The types every part, the loop and the tests agree on.

Shape legend of the whole repository: B batch, T time, D model width, H heads, K/V key/value width per head, N slots,
E memories or experts, L layers, M residual branches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kernels.rms_norm import rms_norm
from models.errors import UserError

State = Any  # a pytree of tensors, batch first; `()` for a part that remembers nothing
SLOTS = ("memory", "mixer", "channel")  # the order of the parts inside a block


class Batch(NamedTuple):
    """What the loader hands to the model. Integer tensors are int64, masks are bool."""

    tokens: Tensor  # [B, T]
    targets: Tensor | None = None  # [B, T], the token to predict at each position
    loss_mask: Tensor | None = None  # [B, T], which targets count; default: the valid ones
    positions: Tensor | None = None  # [B, T], restarting at each document
    cu_seqlens: Tensor | None = (
        None  # int32 [S+1] over the flattened B*T, row ends included, padded with empty segments
    )
    valid: Tensor | None = None  # [B, T], False for padding

    def to(self, device: torch.device | str) -> Batch:
        moved: list[Any] = [None if t is None else t.to(device, non_blocking=True) for t in self]
        return Batch(*moved)


class Ctx(NamedTuple):
    """What any part may read about this forward; made once by `LM.prepare`, shared by all layers, never written."""

    tokens: Tensor  # [B, T]
    positions: Tensor  # [B, T], absolute
    cu_seqlens: Tensor | None  # see Batch; never together with a state
    valid: Tensor | None  # [B, T]
    progress: Tensor  # 0-d in [0, 1]: the share of training done
    rows: Mapping[str, Tensor]  # integer addresses [B, T, ...] per memory layer key
    shared: Mapping[str, Any]  # results of `Part.shared`, computed once for all layers that ask for the same key


class Stat(NamedTuple):
    """A detached number for the log and how it reduces over micro-batches, layers of a name and ranks."""

    value: Tensor
    reduce: str = "mean"  # mean | sum | max


class Write(NamedTuple):
    """Statistics for a change of model memory, reduced over micro-batches and ranks before `Part.commit`.

    ``sum``: values add up. ``topk_by_key``: rows of ``value [R, ...]`` with the R largest ``key [R]`` survive, in order
    of falling key, so that every rank ends with the same rows.
    """

    value: Tensor
    reduce: str = "sum"  # sum | topk_by_key
    key: Tensor | None = None


class Aux(NamedTuple):
    """What a part says besides its output: returned, never stored. The default dicts are shared: pass new ones, never write them."""

    losses: dict[str, Tensor] = {}  # raw scalars; weights are applied once, in `LM.total`
    stats: dict[str, Stat] = {}
    writes: dict[str, Write] = {}

    def prefixed(self, prefix: str) -> Aux:
        """The same, as a containing part hands on what the contained part said."""
        losses, stats, writes = ({f"{prefix}.{k}": v for k, v in said.items()} for said in self)
        return Aux(losses, stats, writes)  # pyright: ignore[reportArgumentType]

    def merged(self, other: Aux) -> Aux:
        return Aux(self.losses | other.losses, self.stats | other.stats, self.writes | other.writes)


class Gates(NamedTuple):
    """What a part that remembers over time forgets and writes at each token, in at least fp32; by default neither is gated.

    H heads, channels, or heads of several memories, memory by memory. NaN where a token does not go to a memory."""

    decay: Tensor | None = None  # log of the share that stays, at most 0: [B, T, H], or [B, T, H, K] per key feature
    write: Tensor | None = None  # [B, T, H], how strongly: beta of a delta rule, the step size of a state space
    memories: int = 1  # that divide the heads among them


class RowReset(NamedTuple):
    """Rows of a parameter (or row store) that `commit` replaced: the optimizer zeroes their moments."""

    name: str  # relative to the part that returns it, absolute after `LM.commit`
    rows: Tensor  # int64 [R]


class CommitInfo(NamedTuple):
    """What `commit` may know: the same on every rank."""

    step: int  # optimizer steps done, this one included
    total: int
    seed: int
    micro_batches: int  # summed into the writes, over ranks too
    world_size: int


@dataclass(frozen=True)
class ParamMeta:
    """What optimizer and parallel code must know about one parameter."""

    role: str = "matrix"  # matrix | vector | embedding | table | scalar: for summaries and for the choice of optimizer
    lr_mult: float = 1.0
    decay: bool = True
    optimizer: str = "auto"  # auto (Muon takes matrices when it is on) | adamw
    shard: str = "replicate"  # replicate | rows
    splits: tuple[int, ...] = ()  # row counts of independent matrices fused in dim -2: Muon treats them one by one


class Cost(NamedTuple):
    """Closed formulas. FLOPs: forward, a fused multiply-add is 2, causal mean over T, head in, embedding lookup out."""

    params: int = 0
    active_params: int = 0  # parameters that one token touches
    flops_per_token: float = 0.0
    state_bytes: int = 0  # of one sequence after T tokens

    def __add__(self, other: object) -> Cost:
        assert isinstance(other, Cost)
        return Cost(
            self.params + other.params,
            self.active_params + other.active_params,
            self.flops_per_token + other.flops_per_token,
            self.state_bytes + other.state_bytes,
        )


@dataclass(frozen=True)
class Site:
    """Where a part stands: everything about the house that the part's own config does not say."""

    d_model: int
    n_layers: int = 1
    layer: int = 0  # position, zero-based
    slot: str = "mixer"
    norm: str = "rmsnorm"  # the pre-norm; "none" for a part nested in another
    norm_eps: float = 1e-5
    norm_bias: bool = False
    init_std: float = 0.02
    vocab_size: int = 0
    dropout: float = 0.0  # on what the part adds to the residual stream; applied by the block
    branches: int = 1

    def refuse(self, why: str) -> UserError:
        return UserError(f"layer {self.layer}, {self.slot}: {why}")


class Part(nn.Module):
    """One protocol for mixers, channels and memories. A part is built from its config and its site, nothing else.

    ``forward`` is pure: it changes neither the module nor a passed state. ``y`` is exactly what is added to the residual
    stream, so the pre-norm is the part's first line and any scaling is the part's own.
    """

    Config: ClassVar[type]
    sees_branches: bool = False  # True: a memory that gets and returns all residual branches [B, T, M, D]

    def __init__(self, cfg: Any, site: Site) -> None:
        super().__init__()
        self.cfg = cfg
        self.site = site
        self.norm = make_norm(site)

    def forward(
        self, x: Tensor, ctx: Ctx, state: State | None = None, donate: bool = False
    ) -> tuple[Tensor, State | None, Aux]:
        """x [B, T, D] -> (y [B, T, D], state, aux).

        ``state=None``: whole sequences (packed if ``ctx.cu_seqlens``), no state returned. With a state: these T >= 1 tokens
        continue it; prefill, any split and one-token decode are the same call. ``donate``: the caller gives the state's
        buffers away, so they may be reused for the returned state.
        """
        raise NotImplementedError

    def memory_gates(self, x: Tensor, ctx: Ctx) -> Gates | None:
        """The gates that `forward` uses on whole sequences x [B, T, D], for instruments; None for a part without any."""
        return None

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype, max_len: int) -> State:
        """Empty memory of `batch` sequences that will see at most `max_len` tokens each."""
        return ()

    def commit(self, writes: Mapping[str, Write], info: CommitInfo) -> list[RowReset]:
        """The only place where model memory changes. Called under no_grad, once per optimizer step, on every rank alike."""
        return []

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        """Initialise every parameter and buffer (they may hold garbage). ``depth``: layers of the model, for depth scaling."""
        raise NotImplementedError

    def meta(self) -> dict[str, ParamMeta]:
        """By parameter name. The default: matrices decay and may go to Muon, vectors and scalars do neither."""
        return {name: default_meta(p) for name, p in self.named_parameters()}

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        """Closed formulas at sequence length T; ``dtype`` is that of the activations held in the state."""
        raise NotImplementedError

    def loss_weights(self) -> dict[str, float]:
        """The weight of each loss this part returns."""
        return {}

    def shared(self) -> dict[str, Callable[[Ctx, State | None], Any]]:
        """Functions of the context that several layers would repeat: evaluated once per forward and key, read in ``ctx.shared``."""
        return {}

    def tables(self) -> dict[str, Any]:
        """Row stores (`models.rows.RowStore`) by name: tables too big to be a parameter."""
        return {}

    @classmethod
    def addressing(cls, parts: list[Any]) -> nn.Module | None:
        """A module that computes ``ctx.rows`` for all parts of this class from tokens alone (see `models.rows.Addressing`)."""
        return None


def default_meta(p: Tensor) -> ParamMeta:
    if p.ndim >= 2:
        return ParamMeta()
    return ParamMeta(role="vector" if p.ndim else "scalar", decay=False, optimizer="adamw")


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps or 0.0)


def make_norm(site: Site) -> nn.Module:
    """The site's pre-norm over D, weights left uninitialised until `reset_norm`."""
    return build_norm(site.norm, site.d_model, site.norm_eps, site.norm_bias)


def build_norm(kind: str, width: int, eps: float, bias: bool = False) -> nn.Module:
    if kind == "rmsnorm":
        return RMSNorm(width, eps=eps)
    if kind == "layernorm":
        return nn.LayerNorm(width, eps=eps, bias=bias)
    if kind == "none":
        return nn.Identity()
    raise UserError(f"unknown norm '{kind}'; valid: rmsnorm, layernorm, none")


def reset_norm(norm: nn.Module) -> None:
    for name, p in norm.named_parameters():
        nn.init.ones_(p) if name.endswith("weight") else nn.init.zeros_(p)


def normal_(p: Tensor, std: float, generator: torch.Generator) -> None:
    """N(0, std) drawn on the generator's device, so that one seed gives the same weights on a CPU and on a GPU."""
    with torch.no_grad():
        if p.device == generator.device:
            p.normal_(0.0, std, generator=generator)
        else:
            p.copy_(torch.empty(p.shape, dtype=p.dtype, device=generator.device).normal_(0.0, std, generator=generator))


def uniform_(p: Tensor, low: float, high: float, generator: torch.Generator) -> None:
    """U(low, high), drawn as `normal_` draws."""
    with torch.no_grad():
        drawn = torch.empty(p.shape, dtype=p.dtype, device=generator.device)
        p.copy_(drawn.uniform_(low, high, generator=generator))


def segment_ids(cu_seqlens: Tensor, batch: int, seq_len: int) -> Tensor:
    """cu_seqlens [S+1] over the flattened B*T -> the segment of each token [B, T]."""
    flat = torch.arange(batch * seq_len, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), flat, right=True).view(batch, seq_len)


def count_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
