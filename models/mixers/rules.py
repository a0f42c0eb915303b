"""The rules of linear-time mixers: how a matrix memory forgets, is written and is read.

One head of one memory is a matrix S [K, V]. A token brings a query q, a key k, a value v and a few gate logits:

    S_t = decay(S_{t-1}) + k_t u_t^T,    o_t = scale * S_t^T q_t

with u_t = v_t (additive rules) or u_t = beta_t (v_t - decay(S_{t-1})^T k_t) (delta rules, which erase what k_t holds before they
write). Rules differ in the decay (none, one constant per head, one number per token and head, one per token and key feature)
and in how its logits become it. A rule owns the parameters that do not depend on the width of the model; projections, short
convolution, output norm, gate and output projection belong to the mixer (`models.mixers.linear`, `models.mixers.mom`).

    o, final = rule(q, k, v, logits, positions, initial_state=..., output_final_state=True, cu_seqlens=...)   # many tokens
    o, state = rule.step(q, k, v, logits, positions, state, index=..., donate=True)                            # one per slot
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.decay_linear_attention import decay_linear_attention
from kernels.gated_delta_rule import gated_delta_rule
from kernels.gla import gla
from kernels.recurrent_step import recurrent_step
from kernels.rope import rope_table, rotate
from models.types import Gates, ParamMeta, default_meta, normal_, uniform_

DT_RANGE = (1e-3, 1e-1)  # of the step sizes at initialisation (arXiv:2312.00752, section 3.6)
DT_FLOOR = 1e-4
NORMALIZER_FLOOR = 1e-6


class Heads(NamedTuple):
    """Heads of a linear-time mixer: value head j reads and writes with query and key head j // (value_heads // heads)."""

    heads: int  # H, of queries and keys
    value_heads: int  # HV, a multiple of H; each has a memory of its own
    key: int  # K, width of a query or key
    value: int  # V

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of q, k and v."""
        return self.heads * self.key, self.heads * self.key, self.value_heads * self.value

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [..., HK + HK + HV V] -> q and k [..., H, K], v [..., HV, V]: views."""
        q, k, v = qkv.split(self.widths, dim=-1)
        return (
            q.unflatten(-1, (self.heads, self.key)),
            k.unflatten(-1, (self.heads, self.key)),
            v.unflatten(-1, (self.value_heads, self.value)),
        )


class Inputs(NamedTuple):
    """What an op takes. Gates are in at least fp32."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, HV, V]
    g: Tensor | None = (
        None  # log of the decay: [B, T, HV], constant [HV], or per key feature [B, T, H, K]; None: no decay
    )
    beta: Tensor | None = None  # [B, T, HV]: delta rule; None: additive


class Rule(nn.Module):
    """One rule with its own parameters; memories are values passed in and out.

    ``logits``: how many gate logits a token needs, one entry per matrix that computes them from the token by a bias-free
    linear map, in the order of their columns. A mixer may compute k, v and logits by projections of each memory: nothing of a
    rule's own depends on which memory a token goes to.

    Rows: a batch [B, T, ...], or flat rows cut into sequences by ``cu_seqlens`` [S+1] over B*T (empty ones legal; rows after
    the last end change no memory, and what comes out there means nothing but is finite). States are [B, HV, K, V'], or
    [S, HV, K, V'] with ``cu_seqlens``, in at least fp32; V' is V, or V + 1 for a normalised read.
    """

    erases: ClassVar[bool] = False  # a delta rule

    def __init__(self, heads: Heads, logits: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.heads, self.logits = heads, logits

    # -- to write for a new rule

    def gates(self, logits: Tensor) -> Gates:
        """What logits [B, T, sum(self.logits)] say of decay (also a constant [HV]) and write strength; by default nothing."""
        return Gates()

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, positions: Tensor) -> Inputs:
        """What the op takes, for any leading dimensions [B, T] (logits [B, T, sum(self.logits)])."""
        raise NotImplementedError

    def run(
        self, x: Inputs, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The op over many tokens; by default that with one decay per head."""
        return decay_linear_attention(
            x.q,
            x.k,
            x.v,
            x.g,
            scale=self.scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )

    def finish(self, o: Tensor, v: Tensor) -> Tensor:
        """o [B, T, HV, V'] as the op returns it, v [B, T, HV, V] as it came in -> [B, T, HV, V]."""
        return o

    @property
    def scale(self) -> float:
        return self.heads.key**-0.5

    @property
    def state_width(self) -> int:
        """V' of the state."""
        return self.heads.value

    def reset_parameters(self, generator: torch.Generator, init_std: float) -> None:
        """Initialise the rule's own parameters."""

    def meta(self) -> dict[str, ParamMeta]:
        """Of the rule's own parameters."""
        return {name: default_meta(p) for name, p in self.named_parameters()}

    def flops(self) -> float:
        """Per token and memory that it visits, in the recurrent form: products of vectors with S (read, write, and the read
        before an erasure); decays are elementwise and do not count, as softmax does not elsewhere."""
        return (6 if self.erases else 4) * self.heads.value_heads * self.heads.key * self.state_width

    # -- what mixers call

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        logits: Tensor,
        positions: Tensor,
        *,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """q, k [B, T, H, K], v [B, T, HV, V], logits [B, T, sum(self.logits)], positions int [B, T]
        -> (o [B, T, HV, V] in the dtype of v, final state if asked for)."""
        o, state = self.run(self.inputs(q, k, v, logits, positions), initial_state, output_final_state, cu_seqlens)
        return self.finish(o, v), state

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        logits: Tensor,
        positions: Tensor,
        state: Tensor,
        *,
        index: Tensor | None = None,
        donate: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One token for each of N slots: q, k [B, N, H, K], v [B, N, HV, V], logits [B, N, .], positions [B, N], state
        [B, E, HV, K, V'] -> (o [B, N, HV, V], state).

        ``index`` int [B, N]: the memory of each slot, -1 for none (no memory changes), distinct in a row; None: slot n has
        memory n. ``donate``: the state's buffer may be written in place (where no gradient is recorded).
        """
        x = self.inputs(q, k, v, logits, positions)
        o, state = recurrent_step(
            x.q,
            x.k,
            x.v,
            state,
            at_tokens(x.g, logits),
            x.beta,
            scale=self.scale,
            index=index,
            qk_l2norm=self.erases,
            donate=donate and not torch.is_grad_enabled(),
        )
        return self.finish(o, v), state

    def init_state(
        self, batch: int, device: torch.device | str, dtype: torch.dtype, memories: int | None = None
    ) -> Tensor:
        """Empty memories: zeros [B, HV, K, V'], or [B, E, HV, K, V']; ``dtype`` is that of the activations."""
        lead = (batch,) if memories is None else (batch, memories)
        shape = (*lead, self.heads.value_heads, self.heads.key, self.state_width)
        return torch.zeros(shape, device=device, dtype=wide(dtype))


class LinearAttention(Rule):
    """S_t = S_{t-1} + phi(k) v^T (arXiv:2006.16236, eq. 16 to 20).

    ``normalize`` divides by phi(q)^T sum phi(k) as the paper does: the sum is one more column of S, written by a constant 1.
    A norm over each head's output cancels such a factor per token and head, so together they are redundant.
    """

    def __init__(self, heads: Heads, feature_map: str = "elu", normalize: bool = False) -> None:
        super().__init__(heads)
        self.feature_map, self.normalize = feature_map, normalize

    @property
    def state_width(self) -> int:
        return self.heads.value + self.normalize

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, positions: Tensor) -> Inputs:
        if self.normalize:
            v = F.pad(v, (0, 1), value=1.0)
        return Inputs(self._map(q), self._map(k), v)

    def finish(self, o: Tensor, v: Tensor) -> Tensor:
        return o[..., :-1] / o[..., -1:].clamp(min=NORMALIZER_FLOOR) if self.normalize else o

    def _map(self, x: Tensor) -> Tensor:
        if self.feature_map == "elu":
            return F.elu(x) + 1
        return F.relu(x) if self.feature_map == "relu" else x


class Retention(Rule):
    """S_t = gamma S_{t-1} + k v^T, gamma_h = 1 - 2^(-5-h), rotated queries and keys (arXiv:2307.08621, eq. 6 and 8)."""

    def __init__(self, heads: Heads, rope_theta: float | None = 10000.0) -> None:
        super().__init__(heads)
        self.rope_theta = rope_theta

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, positions: Tensor) -> Inputs:
        if self.rope_theta is not None:
            cos, sin = rope_table(positions, self.rope_theta, self.heads.key)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return Inputs(q, k, v, self.gates(logits).decay)

    def gates(self, logits: Tensor) -> Gates:
        head = torch.arange(self.heads.value_heads, device=logits.device, dtype=wide(logits.dtype))
        return Gates(torch.log1p(-torch.exp2(-5 - head)))


class GatedLinear(Rule):
    """S_t = diag(alpha_t) S_{t-1} + k v^T, alpha = sigmoid(W2 (W1 x) + b)^(1/16): gated linear attention (arXiv:2312.06635,
    eq. 3 and section 4.4). The logits are W1 x."""

    def __init__(self, heads: Heads, rank: int = 16, temperature: float = 16.0) -> None:
        super().__init__(heads, (rank,))
        self.temperature = temperature
        self.up = nn.Linear(rank, heads.heads * heads.key)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, positions: Tensor) -> Inputs:
        return Inputs(q, k, v, self.gates(logits).decay)

    def gates(self, logits: Tensor) -> Gates:
        a = self.up(logits).unflatten(-1, (self.heads.heads, self.heads.key))
        return Gates(F.logsigmoid(a.to(wide(a.dtype))) / self.temperature)

    def run(
        self, x: Inputs, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert x.g is not None
        return gla(
            x.q,
            x.k,
            x.v,
            x.g,
            scale=self.scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )

    def reset_parameters(self, generator: torch.Generator, init_std: float) -> None:
        normal_(self.up.weight, init_std, generator)
        nn.init.zeros_(self.up.bias)

    def flops(self) -> float:
        return super().flops() + 2 * self.up.weight.numel()


class StateSpace(Rule):
    """Mamba-2's state-space duality (arXiv:2405.21060, section 7): q = C, k = B, v = x, S_t = exp(dt A) S_{t-1} + dt B x^T,
    y = S_t^T C + D x, with dt = softplus(logit + dt_bias) and A = -exp(A_log) per head, and no scale."""

    def __init__(self, heads: Heads, a_range: tuple[float, float] = (1.0, 16.0)) -> None:
        super().__init__(heads, (heads.value_heads,))
        self.a_range = a_range
        self.A_log = nn.Parameter(torch.empty(heads.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(heads.value_heads))
        self.D = nn.Parameter(torch.empty(heads.value_heads))

    @property
    def scale(self) -> float:
        return 1.0

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, positions: Tensor) -> Inputs:
        g, dt, _ = self.gates(logits)
        assert dt is not None
        return Inputs(q, k, (v * dt[..., None]).to(v.dtype), g)

    def gates(self, logits: Tensor) -> Gates:
        dt = step_size(logits, self.dt_bias)
        return Gates(-self.A_log.to(dt.dtype).exp() * dt, dt)

    def finish(self, o: Tensor, v: Tensor) -> Tensor:
        return o + self.D.to(o.dtype)[:, None] * v

    def reset_parameters(self, generator: torch.Generator, init_std: float) -> None:
        reset_decay(self.A_log, self.dt_bias, self.a_range, generator)
        nn.init.ones_(self.D)


class Delta(Rule):
    """S_t = S_{t-1} + beta k (v - S_{t-1}^T k)^T with ||q|| = ||k|| = 1 and beta = sigmoid(logit) (arXiv:2406.06484, eq. 3).

    ``allow_negative``: beta in (0, 2), so that I - beta k k^T may have the eigenvalue -1 (arXiv:2411.12537).
    """

    erases = True

    def __init__(self, heads: Heads, allow_negative: bool = False, logits: tuple[int, ...] | None = None) -> None:
        super().__init__(heads, logits or (heads.value_heads,))
        self.allow_negative = allow_negative

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, positions: Tensor) -> Inputs:
        g, beta, _ = self.gates(logits)
        return Inputs(q, k, v, g, beta)

    def gates(self, logits: Tensor) -> Gates:
        beta = logits[..., : self.heads.value_heads].to(wide(logits.dtype)).sigmoid()
        return Gates(None, 2 * beta if self.allow_negative else beta)

    def run(
        self, x: Inputs, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return gated_delta_rule(
            x.q,
            x.k,
            x.v,
            x.g,
            x.beta,
            scale=self.scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            qk_l2norm=True,
        )


class GatedDelta(Delta):
    """The delta rule on a memory that first decays by exp(-exp(A_log) softplus(logit + dt_bias)) (arXiv:2412.06464, eq. 10).
    The logits are those of beta, then those of the decay."""

    def __init__(self, heads: Heads, allow_negative: bool = False, a_range: tuple[float, float] = (0.0, 16.0)) -> None:
        super().__init__(heads, allow_negative, (heads.value_heads, heads.value_heads))
        self.a_range = a_range
        self.A_log = nn.Parameter(torch.empty(heads.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(heads.value_heads))

    def gates(self, logits: Tensor) -> Gates:
        dt = step_size(logits[..., self.heads.value_heads :], self.dt_bias)
        return super().gates(logits)._replace(decay=-self.A_log.to(dt.dtype).exp() * dt)

    def reset_parameters(self, generator: torch.Generator, init_std: float) -> None:
        reset_decay(self.A_log, self.dt_bias, self.a_range, generator)


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least fp32: the dtype of gates and states."""
    return torch.promote_types(dtype, torch.float32)


def at_tokens(g: Tensor | None, logits: Tensor) -> Tensor | None:
    """A decay that is constant [HV] -> [B, T, HV] for logits [B, T, .]; any other as it is."""
    return g.expand(*logits.shape[:-1], -1) if g is not None and g.ndim == 1 else g


def step_size(logits: Tensor, bias: Tensor) -> Tensor:
    """softplus(logits + bias) in at least fp32."""
    return F.softplus(logits.to(wide(logits.dtype)) + bias)


def reset_decay(a_log: Tensor, dt_bias: Tensor, a_range: tuple[float, float], generator: torch.Generator) -> None:
    """A_log = log of U(a_range); dt_bias as `reset_step_size`."""
    with torch.no_grad():
        uniform_(a_log, *a_range, generator)
        a_log.clamp_(min=DT_FLOOR).log_()  # U(0, 16) may draw a zero
    reset_step_size(dt_bias, generator)


def reset_step_size(dt_bias: Tensor, generator: torch.Generator) -> None:
    """Such that softplus(dt_bias) is log-uniform in DT_RANGE."""
    with torch.no_grad():
        uniform_(dt_bias, math.log(DT_RANGE[0]), math.log(DT_RANGE[1]), generator)
        dt = dt_bias.exp().clamp_(min=DT_FLOOR)
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
