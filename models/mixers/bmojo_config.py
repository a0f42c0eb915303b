"""The options of B'MOJO (`models.mixers.bmojo`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kernels.memory_attention import FADING
from models import zoo
from models.errors import UserError
from models.mixers.attention import AttentionConfig
from models.mixers.bmojo_archive import parse as parse_archive
from models.mixers.bmojo_scores import INNOVATIONS, SCORES
from models.mixers.linear import DeltaConfig
from models.parsing import choice

POSITIONS = ("nope", "rope_const", "rope_true")


@dataclass(frozen=True)
class BMojoConfig:
    """``ssm`` is the config of the nested mixer, or its kind alone: any linear-time one. The paper does not give m_f, m_e and k."""

    kind: str = "bmojo"
    ssm: Any = "mamba2"
    heads: int = 8
    kv_heads: int | None = None  # fewer than heads: grouped-query attention
    head_dim: int | None = None  # default d_model / heads
    window: int = 512  # W, and the length of a chunk; 0: no keys of tokens, for fading_mode=self alone
    m_f: int = 1  # fading keys of a chunk; 0: none at all
    m_e: int = 64  # eidetic keys of a chunk; 0: B'MOJO-F
    # Which outputs are fading keys of token t in chunk c: "chunk", m_f of chunk c - 1, the last one and then every W // m_f-th
    # before it, so that no other output of the ssm gets a gradient; "point", y_{t-W}; "band", the W up to y_{t-W}; "self", y_t.
    fading_mode: str = "chunk"
    # innov | innov_l2 | innov_cos: how badly outputs predict the next one; delta: the write error of a nested delta rule, by a
    # second scan; or a control: random | fifo | first | stride.
    score: str = "innov"
    score_k: int = 4  # outputs that predict the next one
    score_weights: tuple[float, ...] = ()  # of the last, the one before, ...; empty: all the same
    score_floor: float = 1e-6  # innovations below are rounding, and count as 0
    score_debias: bool = False  # times k' / (k' + 1), k' the outputs there were: short averages err more
    evict_gamma: float = 1.0  # each kept score fades by it per token, so that late surprises get in
    dedup: bool = True  # a kept token counts only once it has left the window; false: twice, as in the paper's form
    # Order: "nope", none, as in the paper; "rope_const", rotary in the window, and all memory at W tokens' distance, because its
    # age has no bound; "rope_true", rotary, everything where it was.
    pos: str = "nope"
    rope_theta: float = 10000.0
    token_shift: int = 4  # taps of the convolution before q, k and v; 0: none
    fading_norm: bool = True  # RMSNorm of y before its keys and values: tied weights expect a normed input
    tie_fading: bool = True  # fading keys and values by the same weights as those of tokens
    qk_norm: bool = False  # RMSNorm over each head of q and k
    ssm_lr: float = 1.0  # learning rate of the nested mixer, as a multiple
    # What decoding does with tokens that are not kept: nothing, or an archive (`models.mixers.bmojo_archive`), by its config or by
    # the number of rows that each key-value head asks for.
    archive: Any = None

    def __post_init__(self) -> None:
        raw = {"kind": self.ssm} if isinstance(self.ssm, str) else self.ssm
        ssm = zoo.parse("mixer", raw, "ssm")
        if isinstance(ssm, AttentionConfig) and ssm.window is None:
            raise UserError("ssm: attention without a window is no linear-time mixer")
        object.__setattr__(self, "ssm", ssm)
        object.__setattr__(self, "archive", parse_archive(self.archive))
        for name in ("heads", "kv_heads", "head_dim", "score_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        for name in ("window", "m_f", "m_e", "token_shift", "score_floor"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        choice("fading_mode", self.fading_mode, FADING)
        choice("score", self.score, SCORES)
        if self.score == "delta" and not isinstance(ssm, DeltaConfig):
            raise UserError(f"score=delta: ssm '{ssm.kind}' is no delta rule; delta and gated_delta are")
        choice("pos", self.pos, POSITIONS)
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise UserError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.fading_mode != "chunk" and self.m_f > 1:
            raise UserError(
                f"m_f={self.m_f}: fading_mode={self.fading_mode} says itself how many; give 1, or 0 for none"
            )
        if self.window == 0 and (self.fading_mode != "self" or self.m_f == 0 or self.m_e):
            raise UserError(
                "window=0 leaves a token nothing but its own output: it needs fading_mode=self, m_f=1 and m_e=0"
            )
        if self.window and self.fading_mode == "chunk" and self.m_f > self.window:
            raise UserError(f"m_f={self.m_f} is more than the window={self.window} has")
        if self.score_weights and len(self.score_weights) != self.score_k:
            raise UserError(f"score_weights: {len(self.score_weights)} weights for score_k={self.score_k}")
        if any(a < 0 for a in self.score_weights) or (self.score_weights and not self.score_weights[0] > 0):
            raise UserError("score_weights must not be negative, and the first one positive")
        if not 0 < self.evict_gamma <= 1:
            raise UserError(f"evict_gamma must lie in (0, 1], got {self.evict_gamma:g}")
        if not self.ssm_lr > 0:
            raise UserError(f"ssm_lr must be positive, got {self.ssm_lr:g}")
        if self.archive is not None and self.m_e == 0:
            raise UserError("archive: it holds what leaves the eidetic memory, and m_e=0 means that there is none")

    @property
    def stride(self) -> int:
        """Between the outputs that a chunk offers."""
        return max(1, self.window // max(self.m_f, 1))

    @property
    def back(self) -> int:
        """How many whole chunks before its own a query sees."""
        return 2 if self.fading_mode == "band" and self.m_f else 1

    @property
    def fading_rows(self) -> int:
        """Rows of the state for them."""
        W = self.window
        return {"chunk": 2 * self.m_f, "point": W + 1, "band": 2 * W, "self": 1}[self.fading_mode] if self.m_f else 0

    @property
    def predicts(self) -> bool:
        """Whether outputs are compared with a prediction."""
        return self.m_e > 0 and self.score in INNOVATIONS

    @property
    def weights(self) -> tuple[float, ...]:
        return self.score_weights or (1.0,) * self.score_k

    def tiny(self) -> BMojoConfig:
        """For a model of width 64."""
        window = min(self.window, 16)
        return replace(
            self,
            ssm=self.ssm.tiny() if hasattr(self.ssm, "tiny") else self.ssm,
            heads=4,
            kv_heads=2 if self.kv_heads is not None and self.kv_heads < self.heads else None,
            head_dim=self.head_dim and 16,
            window=window,
            m_f=min(self.m_f, max(window, 1)),
            m_e=min(self.m_e, 8),
        )
