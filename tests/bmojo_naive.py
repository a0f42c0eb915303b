"""B'MOJO by the book: one token after another, a list of keys for each query, the eidetic set as algorithm 1 of arXiv:2407.06324
keeps it. It reads the weights of a `models.mixers.bmojo.BMojo` and nothing else of it; the nested mixer is `tests.linear_naive`.
fp64, differentiable, one sequence at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.mixers.bmojo import BMojo
from models.mixers.bmojo_config import BMojoConfig
from models.mixers.linear import LinearMixer
from models.mixers.mamba import Mamba
from tests.linear_naive import by_the_paper, turned


class Keys(NamedTuple):
    """What one query sees: positions of tokens, outputs and tokens; and what was kept, seen or not."""

    window: list[int]
    fading: list[int]
    eidetic: list[int]
    kept: list[int]


def keys_of(cfg: BMojoConfig, scores: list[float]) -> list[Keys]:
    """Of every token, from the scores of all (section 4 of the layer's definition in words: window, then memory of the past)."""
    W, found = cfg.window, []
    store: dict[int, float] = {}
    latched: list[int] = []
    for t in range(len(scores)):
        c = t // W
        if t % W == 0:
            latched = sorted(store)
        window = [j for j in range(t - W + 1, t + 1) if j >= 0]
        fading = {
            "chunk": [c * W - 1 - i * max(1, W // max(cfg.m_f, 1)) for i in range(cfg.m_f)],
            "point": [t - W],
            "band": list(range(t - 2 * W + 1, t - W + 1)),
            "self": [t],
        }[cfg.fading_mode]
        fading = sorted(j for j in fading if j >= 0) if cfg.m_f else []
        seen = [p for p in latched if t - p >= W or not cfg.dedup]
        found.append(Keys(window, fading, seen, latched))
        store = {p: e * cfg.evict_gamma for p, e in store.items()}
        insert(store, t, scores[t], cfg.m_e)
    return found


def insert(store: dict[int, float], t: int, score: float, m: int) -> None:
    """Insert while there is room; then replace the smallest, the newest of equals, if it is beaten."""
    if len(store) < m:
        store[t] = score
    elif m:
        worst = min(store, key=lambda p: (store[p], -p))
        if score > store[worst]:
            del store[worst]
            store[t] = score


class NaiveBMojo:
    def __init__(self, part: BMojo) -> None:
        self.part, self.cfg, self.w = part, part.cfg, dict(part.named_parameters())
        self.H, self.kv, self.K, self.eps = part.heads, part.kv_heads, part.head_dim, part.site.norm_eps

    def __call__(self, x: Tensor, scores: Tensor | None = None) -> tuple[Tensor, list[Keys]]:
        """x [T, D], the residual stream of one sequence -> (what is added to it [T, D], the keys of each token). ``scores`` [T]
        replace those of the outputs."""
        cfg = self.cfg
        u = self.normed(x, "norm.weight")
        ssm = self.part.ssm
        assert isinstance(ssm, LinearMixer | Mamba)
        y = by_the_paper(ssm, u)
        own = write_errors(ssm, u) if cfg.score == "delta" and isinstance(ssm, LinearMixer) else self.scores(y)
        keys = keys_of(cfg, own if scores is None else scores.tolist())
        h = self.shifted(u)
        q, k, v = (h @ w.T for w in self.w["qkv.weight"].split(self.part.splits))
        fading = self.normed(y, "norms.fading_norm.weight") if cfg.fading_norm and cfg.m_f else y
        tied = self.w["qkv.weight"][self.part.splits[0] :]
        fading_k, fading_v = (fading @ (tied if cfg.tie_fading else self.w["fading_kv.weight"]).T).chunk(2, dim=1)
        said = []
        for t in range(len(x)):
            heads = []
            for head in range(self.H):
                mine = slice(head // (self.H // self.kv) * self.K, (head // (self.H // self.kv) + 1) * self.K)
                query = self.head(q[t, head * self.K : (head + 1) * self.K], "q_norm")
                rows = [(self.head(k[j, mine], "k_norm"), v[j, mine], j, False) for j in keys[t].window]
                norm = "k_norm" if cfg.tie_fading else "fading_k_norm"
                rows += [(self.head(fading_k[j, mine], norm), fading_v[j, mine], j, True) for j in keys[t].fading]
                rows += [(self.head(k[j, mine], "k_norm"), v[j, mine], j, True) for j in keys[t].eidetic]
                scores_ = torch.stack([self.product(query, key, t, j, memory) for key, _, j, memory in rows])
                p = (scores_ / self.K**0.5).softmax(0)
                heads.append((p[:, None] * torch.stack([value for _, value, _, _ in rows])).sum(0))
            said.append(torch.cat(heads))
        return torch.stack(said) @ self.w["out.weight"].T, keys

    def scores(self, y: Tensor) -> list[float]:
        cfg, found = self.cfg, []
        y = y.detach()
        for t in range(len(y)):
            lags = range(1, min(cfg.score_k, t) + 1)
            mass = sum(cfg.weights[i - 1] for i in lags)
            guess = torch.stack([cfg.weights[i - 1] / mass * y[t - i] for i in lags]).sum(0) if lags else y[t] * 0
            error, sizes = (y[t] - guess).square().sum(), y[t].square().sum() + guess.square().sum()
            score = {
                "innov": error / sizes,
                "innov_l2": error.sqrt(),
                "innov_cos": 1 - (y[t] @ guess) / (y[t].norm() * guess.norm() + 1e-9),
            }[cfg.score]
            if cfg.score_debias and t:
                score = score * len(lags) / (len(lags) + 1)
            found.append(float(score) if score >= cfg.score_floor else 0.0)
        return found

    def shifted(self, u: Tensor) -> Tensor:
        if not self.cfg.token_shift:
            return u
        taps, rows = self.w["shift.weight"].T, []
        for t in range(len(u)):
            rows.append(sum((taps[len(taps) - 1 - i] * u[t - i] for i in range(min(len(taps), t + 1))), u[t] * 0))
        return torch.stack(rows)

    def normed(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.w[name]

    def head(self, x: Tensor, name: str) -> Tensor:
        return self.normed(x, f"norms.{name}.weight") if self.cfg.qk_norm else x

    def product(self, q: Tensor, k: Tensor, t: int, j: int, memory: bool) -> Tensor:
        if self.cfg.pos == "nope":
            return q @ k
        age = self.cfg.window if memory and self.cfg.pos == "rope_const" else t - j
        return turned(q, age, self.cfg.rope_theta) @ k


def write_errors(part: LinearMixer, u: Tensor) -> list[float]:
    """|v_t - (decayed S)^T k_t| of each token over the heads of a delta rule (arXiv:2412.06464, eq. 10)."""
    heads, W = part.heads, part.cfg.conv
    qkv, _, logits = (u.detach() @ part.project.weight.T).split(part.widths, dim=-1)
    if part.conv is not None:
        before = torch.cat((qkv.new_zeros(W - 1, qkv.shape[1]), qkv))
        z = torch.stack([(before[t : t + W] * part.conv.weight.T).sum(0) for t in range(len(u))])
        z = z if part.conv.bias is None else z + part.conv.bias
        qkv = z / (1 + (-z).exp())
    _, k, v = heads.split(qkv)
    S = u.new_zeros(heads.value_heads, heads.key, heads.value)
    found = []
    for t in range(len(u)):
        total = 0.0
        for j in range(heads.value_heads):
            key = k[t, j // (heads.value_heads // heads.heads)]
            key = key / (key.square().sum() + 1e-6).sqrt()
            if part.cfg.kind == "gated_delta":
                dt = (logits[t, heads.value_heads + j] + part.rule.dt_bias[j]).exp().log1p()  # pyright: ignore
                S[j] *= (-part.rule.A_log[j].exp() * dt).exp()  # pyright: ignore
            error = v[t, j] - key @ S[j]
            total += float(error.square().sum())
            S[j] += logits[t, j].sigmoid() * (2 if part.cfg.allow_neg_eigval else 1) * torch.outer(key, error)
        found.append(total**0.5)
    return found
