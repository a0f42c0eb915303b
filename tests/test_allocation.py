"""Experts against rows: equal budgets, the share that was asked for, and how few experts a brute search would leave."""

from __future__ import annotations

from typing import Any

import pytest

from models import ModelConfig, UserError, meta_model, model_config
from models.__main__ import main
from models.allocation import allocate
from models.types import Cost
from tests.runs import ROOT

ENGRAM = {"kind": "engram", "heads": 2, "row_width": 4, "base": 100, "conv": 2, "compression": "none"}
MOE = {"kind": "moe", "experts": 20, "top_k": 2, "shared": 1, "hidden": 24}


def mixture(memory: Any = ENGRAM, channel: Any = MOE, **more: Any) -> ModelConfig:
    attention = {"kind": "attention", "heads": 2}
    return model_config(
        {
            "d_model": 16,
            "n_layers": 4,
            "vocab_size": 50,
            "blocks": {
                "plain": {"mixer": attention, "channel": channel},
                "engram": {"memory": memory, "mixer": attention, "channel": channel},
            },
            "pattern": ["plain", "engram"],
            **more,
        }
    )


def cost(config: ModelConfig) -> Cost:
    return meta_model(config).cost(64)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.5, 0.8])
def test_budgets_are_equal_and_the_share_is_met(rho: float):
    alone, found = cost(mixture(memory=None)), allocate(mixture(), rho, 64)
    assert found.cost == cost(found.config)
    assert found.target == alone
    assert found.cost.params == pytest.approx(alone.params, rel=5e-3)
    assert found.cost.flops_per_token == pytest.approx(alone.flops_per_token, rel=1e-2)
    sparse = found.cost.params - found.cost.active_params
    expert = 4 * 3 * 16 * found.hidden
    assert found.rho == pytest.approx((found.experts - 2) * expert / sparse)
    assert abs(found.rho - rho) * sparse <= 0.6 * expert  # an expert is the smallest step
    assert found.base > 2


def test_all_of_it_is_the_mixture_alone():
    found = allocate(mixture(), 1.0, 64)
    assert cost(found.config) == cost(mixture(memory=None))
    assert (found.rho, found.experts, found.hidden, found.base) == (1.0, 20, 24, 0)


def test_less_for_experts_is_more_for_rows():
    found = [allocate(mixture(), rho, 64) for rho in (0.8, 0.6, 0.4, 0.2)]
    assert sorted(f.base for f in found) == [f.base for f in found]
    assert sorted((f.experts for f in found), reverse=True) == [f.experts for f in found]
    assert len({f.experts for f in found}) == 4


@pytest.mark.parametrize(
    ("config", "rho", "said"),
    [
        (mixture(), 1.5, "rho must lie in [0, 1], got 1.5"),
        (mixture(memory=None), 0.5, "no block of this model has an engram memory"),
        (mixture(channel={"kind": "swiglu", "hidden": 24}), 0.5, "no moe channel"),
        (mixture(memory=None, at={1: {"memory": ENGRAM}}), 0.5, "memories stand in named blocks"),
    ],
)
def test_what_cannot_be_shared_is_refused(config: ModelConfig, rho: float, said: str):
    with pytest.raises(UserError) as caught:
        allocate(config, rho, 64)
    assert said in str(caught.value)


def test_the_command_prints_the_grid(capsys: pytest.CaptureFixture[str]):
    main(["match", str(ROOT / "configs" / "engram-moe-small.yaml"), "--rho", "0.5", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines][1] == "rho=1.000"
    assert all("experts=" in line and "off by params" in line for line in lines)
    assert len(lines) == 2
