"""Feed-forward channels whose matrices are products of smaller ones: fair controls for a channel with few parameters.

Four forms of a matrix W [out, in] (arXiv:2406.16450 for the first three, arXiv:1903.05895 for the last), every weight of
which one token uses exactly once:

    low_rank       W = U V                                       R (in + out) weights
    block_dense    W = U blockdiag(V)                            R (in / B + out)
    block_shuffle  W = P blockdiag(U) P' blockdiag(V)            m / B (in + out), m = min(in, out); "Monarch"
    butterfly      W = products of log2 n sparse factors         2 n log2 n for each stack and product

In the paper the channel of the first layer stays dense: ``at: {0: {channel: {kind: gelu}}}``, and there are biases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.swiglu import swiglu
from models.channels.mlp import SwiGLUConfig
from models.errors import UserError
from models.parsing import choice
from models.types import Aux, Cost, Ctx, ParamMeta, Part, Site, State, default_meta, normal_, reset_norm

GATED = "swiglu"


@dataclass(frozen=True)
class StructuredFFNConfig(SwiGLUConfig):
    """Width by default that of the dense channel with the same activation."""

    kind: str = "structured_ffn"
    form: str = "low_rank"  # low_rank | block_dense | block_shuffle | butterfly
    activation: str = "gelu"  # gelu | relu2 | swiglu
    rank: int | None = None  # R of low_rank and block_dense; default: half of d_model
    blocks: int = 4  # B of block_dense and block_shuffle
    products: int = 1  # of butterflies, one after the other in alternating direction; two are a "kaleidoscope"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("form", self.form, tuple(FORMS))
        choice("activation", self.activation, ("gelu", "relu2", GATED))
        for name in ("rank", "blocks", "products"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")

    def tiny(self) -> Self:
        return replace(super().tiny(), rank=None if self.rank is None else 16, blocks=4)


@dataclass
class Guide:
    """A dense matrix beside a structured one, for a while (see `training.interventions.SelfGuided`).

    It is training's own, not the model's: no parameter, not in the state dict, not in the cost.
    """

    weight: Tensor  # [out, in]
    share: Tensor  # 0-d, of the output
    used: bool = True


class Structured(nn.Module):
    """y = x W^T + bias for a W that is never built; a subclass is a form of W."""

    weights: int  # closed formula for the size of the form's parameters

    def __init__(self, d_in: int, d_out: int, cfg: StructuredFFNConfig, site: Site) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.bias = nn.Parameter(torch.empty(d_out)) if cfg.bias else None
        self.guide: Guide | None = None

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] -> x W^T [..., out]."""
        raise NotImplementedError

    def reset_weights(self, generator: torch.Generator, std: float) -> None:
        """``std``: of the entries of the dense matrix that this one replaces."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        if self.guide is not None and self.guide.used:
            y = self.guide.share * F.linear(x, self.guide.weight) + (1 - self.guide.share) * y
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense(self) -> Tensor:
        """W [out, in], by applying the form to the identity, so that it holds for every form."""
        some = next(self.parameters())
        return self.product(torch.eye(self.d_in, device=some.device, dtype=some.dtype)).T.contiguous()

    def reset_parameters(self, generator: torch.Generator, std: float) -> None:
        with torch.no_grad():
            self.reset_weights(generator, std)
            if self.bias is not None:
                self.bias.zero_()

    def meta(self) -> dict[str, ParamMeta]:
        return {name: default_meta(p) for name, p in self.named_parameters()}


class LowRank(Structured):
    """W = U V."""

    def __init__(self, d_in: int, d_out: int, cfg: StructuredFFNConfig, site: Site) -> None:
        super().__init__(d_in, d_out, cfg, site)
        rank = rank_of(cfg, site)
        if rank > min(d_in, d_out):
            raise site.refuse(
                f"rank={rank} is above that of a {d_out} x {d_in} matrix; nearest: rank={min(d_in, d_out)}"
            )
        self.v = nn.Parameter(torch.empty(rank, d_in))
        self.u = nn.Parameter(torch.empty(d_out, rank))
        self.weights = rank * (d_in + d_out)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.v), self.u)

    def reset_weights(self, generator: torch.Generator, std: float) -> None:
        """The nearest matrix of this rank to a Gaussian one; both factors get the root of the singular values."""
        rank = len(self.v)
        u, s, vt = torch.linalg.svd(gaussian((self.d_out, self.d_in), self.v.dtype, generator), full_matrices=False)
        root = std**0.5 * s[:rank].sqrt()
        self.v.copy_(root[:, None] * vt[:rank])
        self.u.copy_(u[:, :rank] * root)


class BlockDense(Structured):
    """W = U blockdiag(V_1 .. V_B): the input in B pieces, their results together through one dense matrix."""

    def __init__(self, d_in: int, d_out: int, cfg: StructuredFFNConfig, site: Site) -> None:
        super().__init__(d_in, d_out, cfg, site)
        rank, blocks = rank_of(cfg, site), cfg.blocks
        must_divide(site, blocks, {"the input": d_in, "rank": rank})
        self.v = nn.Parameter(torch.empty(blocks, rank // blocks, d_in // blocks))
        self.u = nn.Parameter(torch.empty(d_out, rank))
        self.weights = rank * (d_in // blocks + d_out)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(blockwise(x, self.v).flatten(-2), self.u)

    def reset_weights(self, generator: torch.Generator, std: float) -> None:
        orthogonal_(self.v, generator)
        orthogonal_(self.u, generator)


class BlockShuffle(Structured):
    """Two block-diagonal products with a shuffle after each, so that every output sees every input (arXiv:2204.00595).

    Each block of V has q = m / B outputs, m = min(in, out): entry f of all m goes to block f mod B of U, at place f // B. Output o
    of block b of U is entry o B + b of y. A dense matrix that stands for W must contain both shuffles: see `dense`.
    """

    def __init__(self, d_in: int, d_out: int, cfg: StructuredFFNConfig, site: Site) -> None:
        super().__init__(d_in, d_out, cfg, site)
        blocks, inner = cfg.blocks, min(d_in, d_out)
        must_divide(site, blocks, {"the input": d_in, "the output": d_out})
        self.v = nn.Parameter(torch.empty(blocks, inner // blocks, d_in // blocks))
        self.u = nn.Parameter(torch.empty(blocks, d_out // blocks, inner // blocks))
        self.weights = inner // blocks * (d_in + d_out)

    def product(self, x: Tensor) -> Tensor:
        h = blockwise(x, self.v).flatten(-2).unflatten(-1, (-1, len(self.u)))  # entry f at row f // B, column f mod B
        return blockwise(h.mT.flatten(-2), self.u).mT.flatten(-2)

    def reset_weights(self, generator: torch.Generator, std: float) -> None:
        orthogonal_(self.v, generator)
        orthogonal_(self.u, generator)


class Butterfly(Structured):
    """Factor i mixes entries that are 2^i apart, two by two, by a free 2 x 2 matrix each; n = 2^L >= in.

    The input is padded to n; for out > n several butterflies stand side by side, and what is too much is cut off.
    """

    def __init__(self, d_in: int, d_out: int, cfg: StructuredFFNConfig, site: Site) -> None:
        super().__init__(d_in, d_out, cfg, site)
        levels = max(1, (d_in - 1).bit_length())
        self.n = 2**levels
        stacks = -(-d_out // self.n)
        self.twiddle = nn.Parameter(torch.empty(stacks, cfg.products, levels, self.n // 2, 2, 2))
        self.weights = stacks * cfg.products * 2 * self.n * levels

    def product(self, x: Tensor) -> Tensor:
        stacks, products, levels = self.twiddle.shape[:3]
        x = F.pad(x, (0, self.n - self.d_in))[..., None, :].expand(*x.shape[:-1], stacks, self.n)
        for i in range(products):
            for level in range(levels) if i % 2 == 0 else reversed(range(levels)):
                stride = 2**level
                a, b = self.twiddle[:, i, level].unflatten(1, (-1, stride)).permute(4, 0, 1, 3, 2)  # [S, n/2s, 2, s]
                first, second = x.unflatten(-1, (-1, 2, stride)).split(1, dim=-2)
                x = (a * first + b * second).flatten(-3)
        return x.flatten(-2)[..., : self.d_out]

    def reset_weights(self, generator: torch.Generator, std: float) -> None:
        """Each factor keeps the mean square of its input."""
        normal_(self.twiddle, 0.5**0.5, generator)

    def meta(self) -> dict[str, ParamMeta]:
        """Twiddles do not decay, and Muon is for larger matrices."""
        return {**super().meta(), "twiddle": ParamMeta(decay=False, optimizer="adamw")}


FORMS: dict[str, type[Structured]] = {
    "low_rank": LowRank,
    "block_dense": BlockDense,
    "block_shuffle": BlockShuffle,
    "butterfly": Butterfly,
}


class StructuredFFN(Part):
    """norm -> up -> activation -> down, as the dense channels, each matrix in a structured form."""

    Config = StructuredFFNConfig

    def __init__(self, cfg: StructuredFFNConfig, site: Site) -> None:
        super().__init__(cfg, site)
        form, width, hidden = FORMS[cfg.form], site.d_model, hidden_of(cfg, site)
        self.gate = form(width, hidden, cfg, site) if cfg.activation == GATED else None
        self.up = form(width, hidden, cfg, site)
        self.down = form(hidden, width, cfg, site)

    def maps(self) -> dict[str, Structured]:
        """The matrices by name."""
        found = {"gate": self.gate, "up": self.up, "down": self.down}
        return {name: m for name, m in found.items() if m is not None}

    def forward(
        self, x: Tensor, ctx: Ctx, state: State | None = None, donate: bool = False
    ) -> tuple[Tensor, State | None, Aux]:
        h = self.norm(x)
        if self.gate is not None:
            a = swiglu(torch.cat((self.gate(h), self.up(h)), dim=-1))
        else:
            a = F.gelu(self.up(h)) if self.cfg.activation == "gelu" else F.relu(self.up(h)).square()
        return self.down(a), state, Aux()

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        for name, m in self.maps().items():
            m.reset_parameters(generator, self.site.init_std / (math.sqrt(2 * depth) if name == "down" else 1))
        reset_norm(self.norm)

    def meta(self) -> dict[str, ParamMeta]:
        of_maps = {f"{name}.{k}": meta for name, m in self.maps().items() for k, meta in m.meta().items()}
        return {**super().meta(), **of_maps}

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        maps = self.maps().values()
        weights = sum(m.weights for m in maps)
        others = sum(m.d_out for m in maps if m.bias is not None) + sum(p.numel() for p in self.norm.parameters())
        return Cost(weights + others, weights + others, 2 * weights, 0)


# -- sizes


def hidden_of(cfg: StructuredFFNConfig, site: Site) -> int:
    if cfg.hidden is not None:
        return cfg.hidden
    if cfg.activation == GATED:
        return math.ceil(2 * cfg.ratio * site.d_model / 3 / cfg.multiple_of) * cfg.multiple_of
    return round(cfg.ratio * site.d_model)


def rank_of(cfg: StructuredFFNConfig, site: Site) -> int:
    return cfg.rank or max(1, site.d_model // 2)


def must_divide(site: Site, blocks: int, sizes: dict[str, int]) -> None:
    """Raise UserError, with the nearest number of blocks that does divide all sizes, unless ``blocks`` does."""
    bad = [f"{what} of {size}" if what != "rank" else f"rank={size}" for what, size in sizes.items() if size % blocks]
    if bad:
        common = math.gcd(*sizes.values())
        good = min((b for b in range(1, common + 1) if common % b == 0), key=lambda b: (abs(b - blocks), b))
        raise site.refuse(f"blocks={blocks} does not divide {' and '.join(bad)}; nearest: blocks={good}")


# -- products and initial values


def blockwise(x: Tensor, blocks: Tensor) -> Tensor:
    """x [..., B C], blocks [B, R, C] -> each piece of x through its own block [..., B, R]."""
    pieces = x.reshape(-1, len(blocks), blocks.shape[-1]).transpose(0, 1)
    return torch.bmm(pieces, blocks.mT).transpose(0, 1).reshape(*x.shape[:-1], *blocks.shape[:2])


def gaussian(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """N(0, 1) in at least fp32, on the generator's device: what is computed from it there is the same for a model anywhere."""
    drawn = torch.empty(shape, dtype=torch.promote_types(dtype, torch.float32), device=generator.device)
    return drawn.normal_(generator=generator)


def orthogonal_(p: Tensor, generator: torch.Generator) -> None:
    """Each matrix [R, C] of p becomes the orthogonal polar factor of a Gaussian one: its nearest isometry."""
    u, _, vt = torch.linalg.svd(gaussian(tuple(p.shape), p.dtype, generator), full_matrices=False)
    p.copy_(u @ vt)
