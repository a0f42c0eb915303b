"""Parameters of published shapes: Mixture-of-Memories, as the authors' and fla's own code counts them (arXiv:2502.13685), Mamba
(arXiv:2312.00752), and the tables of Engram (arXiv:2601.07372)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from configs import schema
from models import meta_model, model_config
from models.parsing import to_dict
from models.summary import summary
from tests.runs import ROOT

SHAPES: dict[str, tuple[str, dict[str, Any], int, int]] = {  # config, changes, all parameters, those active per token
    "380M": ("mom-545m-a444m", {}, 545_119_424, 444_062_912),  # "444M" in tables 4 and 9
    "380M_tied": ("mom-545m-a444m", {"tied": True}, 512_351_424, 411_294_912),  # the released config
    "380M_matched": ("mom-545m-a444m", {"ratio": 2}, 507_370_688, 406_314_176),  # table 9, "400M"
    "1.3B": ("mom-1.6b-a1.4b", {}, 1_618_419_904, 1_416_306_880),
    "1.3B_tied": ("mom-1.6b-a1.4b", {"tied": True}, 1_552_883_904, 1_350_770_880),
    "baseline": ("gated-deltanet-340m", {}, 342_908_096, 342_908_096),
    "1.3B_baseline": ("gated-deltanet-1.2b", {}, 1_213_997_248, 1_213_997_248),  # 1.21B as released
    "mamba": ("mamba-130m", {}, 129_135_360, 129_135_360),  # arXiv:2312.00752, "130M" in table 3
}


@pytest.mark.parametrize("shape", SHAPES)
def test_counts(shape: str):
    name, changes, params, active = SHAPES[shape]
    raw = to_dict(schema.load(ROOT / "configs" / f"{name}.yaml").model)
    if "ratio" in changes:
        raw["blocks"]["base"]["channel"]["ratio"] = changes["ratio"]
    raw["tied"] = changes.get("tied", raw["tied"])
    model = meta_model(model_config(raw))
    cost = model.cost(2048)
    assert (cost.params, cost.active_params) == (params, active)
    assert f"parameters  {params:,}" in summary(model, 2048)
    assert f"{active:,} active per token" in summary(model, 2048)


def test_state_is_that_of_the_paper_shape():
    """E + 1 memories of 4 x 256 x 256 in fp32, and three inputs of each convolution in bf16; whatever the length."""
    model = meta_model(schema.load(ROOT / "configs" / "mom-545m-a444m.yaml").model)
    mixers = [part for _, slot, part in model.parts() if slot == "mixer"]
    per_layer = 5 * (4 * 256 * 256 * 4 + 3 * 3 * 1024 * 2)
    for length in (1, 2048, 65536):
        assert [part.cost(length, torch.bfloat16).state_bytes for part in mixers] == [per_layer] * 24


@pytest.mark.parametrize(
    ("name", "tables", "whole"),
    [
        ("engram-27b-a4b", 5_792_338_560, 26.7e9),  # "5.7B" of 26.7B
        ("engram-40b-a4b", 18_534_311_360, 39.5e9),  # "18.5B" of 39.5B
        ("engram-v41", 196_613_849_600, None),  # the backbone is a stand-in
    ],
)
def test_tables_of_engram(name: str, tables: int, whole: float | None):
    model = meta_model(schema.load(ROOT / "configs" / f"{name}.yaml").model)
    assert sum(t.rows * t.width for t in model.tables().values()) == tables
    cost = model.cost(4096)
    assert f"parameters  {cost.params:,}" in summary(model, 4096)
    assert whole is None or cost.params == pytest.approx(whole, rel=0.01)
