"""For the tests of `models.mixers.bmojo`: a model of one layer, the mixer alone on a random residual stream, the loops beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import LM, Batch
from models.lm import LMState
from models.mixers.bmojo import BMojo
from models.mixers.bmojo_state import BMojoState
from models.types import Aux, Ctx
from tests.bmojo_naive import Keys, NaiveBMojo
from tests.tools import Case

MAMBA2 = {"kind": "mamba2", "head_dim": 4, "d_state": 3}
DELTA = {"kind": "gated_delta", "heads": 2, "head_dim": 4}
SSMS = {"mamba": {"kind": "mamba", "d_state": 3}, "mamba2": MAMBA2, "gated_delta": DELTA}
MODES = ("chunk", "point", "band", "self")

EVERY_MODE = pytest.mark.parametrize("mode", MODES)
EVERY_SSM = pytest.mark.parametrize("ssm", SSMS)
DEDUP = pytest.mark.parametrize("dedup", [True, False], ids=["dedup", "twice"])


def build(
    ssm: str | dict[str, Any] = "mamba2", dtype: torch.dtype = torch.float64, d_model: int = 8, **options: Any
) -> LM:
    """A model of one layer, W = 4 and m_e = 3 unless said otherwise."""
    inner = SSMS[ssm] if isinstance(ssm, str) else ssm
    part = {"kind": "bmojo", "ssm": inner, "heads": 2, "window": 4, "m_e": 3, **options}
    return Case("bmojo", "mixer", part).build(dtype, n_layers=1, d_model=d_model)


def mixer(model: LM, layer: int = 0) -> BMojo:
    part = model.layers[layer].mixer  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(part, BMojo)
    return part


def stream(B: int, T: int, d_model: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, d_model, dtype=dtype)


def whole(model: LM, x: Tensor, **fields: Any) -> tuple[Tensor, Aux]:
    ctx, _, _ = model.prepare(Batch(torch.ones(x.shape[:2], dtype=torch.int64), **fields), None)
    y, none, aux = mixer(model)(x, ctx)
    assert none is None
    return y, aux


def pieces(
    model: LM, x: Tensor, sizes: list[int], state: LMState | None = None, donate: bool = False
) -> tuple[Tensor, LMState]:
    state, outs, start = state or model.init_state(len(x), x.shape[1]), [], 0
    for n in sizes:
        ctx, seen, _ = model.prepare(Batch(torch.ones(len(x), n, dtype=torch.int64)), state)
        y, new, _ = mixer(model)(x[:, start : start + n], ctx, state.layers[0]["mixer"], donate)
        state = LMState(seen, ({"mixer": new},), {})
        outs.append(y)
        start += n
    return torch.cat(outs, dim=1), state


def memory_of(state: LMState) -> BMojoState:
    return state.layers[0]["mixer"]


def naive(model: LM, x: Tensor, scores: Tensor | None = None) -> tuple[Tensor, list[list[Keys]]]:
    """Each sequence by itself -> (outputs, the keys of each token)."""
    book = NaiveBMojo(mixer(model))
    said = [book(x[i], None if scores is None else scores[i]) for i in range(len(x))]
    return torch.stack([y for y, _ in said]), [keys for _, keys in said]


class Said(nn.Module):
    """In place of a nested mixer: it says what it was told, whatever comes in."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def forward(self, u: Tensor, ctx: Ctx, state: Any = None, donate: bool = False) -> tuple[Tensor, Any, Aux]:
        start = int(ctx.positions[0, 0]) if state is not None else 0
        return self.y[:, start : start + u.shape[1]], state, Aux()

    def shared(self) -> dict[str, Any]:
        return {}

    def init_state(self, *how: Any) -> Any:
        return ()


def say(model: LM, y: Tensor) -> None:
    """Outputs y [B, T, D] of the nested mixer by position, whatever it reads."""
    part: Any = mixer(model)
    part.ssm = Said(y)
    model._shared = {key: (fn, 0, "mixer") for key, fn in part.shared().items()}


def score_by(model: LM, scores: Tensor) -> None:
    """Scores [B, T] by position, whatever the outputs are."""
    part: Any = mixer(model)

    def given(y: Tensor, error: Any, ctx: Ctx, rows: Any, state: Any) -> tuple[Tensor, Any]:
        return scores.gather(1, ctx.positions.clamp(min=0)), () if state is None else state.outputs

    part._score = given
