"""The shipped sizes of B'MOJO (arXiv:2407.06324, section 4): that of the name, two learning rates, a state that the length does not
change."""

from __future__ import annotations

import pytest
import torch

from configs import schema
from models import meta_model
from models.config import ModelConfig
from models.match import match
from models.mixers.bmojo import BMojo
from models.summary import summary
from tests.runs import ROOT

SIZES = {  # name: parameters, layers, width, heads, steps of half a million tokens, rate (table 2.1 of arXiv:2005.14165)
    "130m": (130e6, 12, 768, 12, 5_200, 6e-4),
    "370m": (370e6, 24, 1024, 16, 14_800, 3e-4),
    "790m": (790e6, 24, 1536, 16, 31_600, 2.5e-4),
    "1.4b": (1.4e9, 24, 2048, 32, 56_000, 2e-4),
}


def model_of(name: str) -> ModelConfig:
    return schema.load(ROOT / "configs" / f"bmojo-{name}.yaml").model


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str):
    params, layers, width, heads, steps, rate = SIZES[name]
    cfg = schema.load(ROOT / "configs" / f"bmojo-{name}.yaml")
    model = meta_model(cfg.model)
    assert model.cost(2048).params == pytest.approx(params, rel=0.01)
    assert (cfg.model.n_layers, cfg.model.d_model, cfg.train.steps, cfg.optim.lr) == (layers, width, steps, rate)
    assert cfg.train.batch_size * cfg.data.seq_len == 1 << 19
    assert steps << 19 == pytest.approx(20 * params, rel=0.06)
    assert cfg.optim.rate(steps, steps) == pytest.approx(1e-5, rel=0.01)
    solved = match(cfg.model, params, vary="channel.hidden", multiple_of=64)
    assert solved.config == cfg.model, "the channel's width is the nearest to the name"
    for _, slot, part in model.parts():
        if slot == "mixer":
            assert isinstance(part, BMojo)
            assert (part.heads, part.cfg.window, part.cfg.ssm.kind) == (heads, 512, "mamba2")
    rates = {".mixer.ssm." in key: meta.lr_mult for key, meta in model.meta().items()}
    assert rates == {True: 5.0, False: 1.0}
    assert "bmojo" in summary(model, 2048)


def test_the_state_does_not_grow():
    model = meta_model(model_of("1.4b"))
    sizes = {model.cost(length, torch.bfloat16).state_bytes for length in (1, 512, 2048, 65536)}
    assert len(sizes) == 1


def test_the_small_one_is_as_large_as_quickstart():
    ours = schema.load(ROOT / "configs" / "bmojo-small.yaml", ["model.vocab_size=257"]).model
    other = schema.load(ROOT / "configs" / "quickstart.yaml", ["model.vocab_size=257"]).model
    assert match(ours, other, vary="channel.hidden", multiple_of=8).config == ours
    assert ours.blocks["base"].mixer.window == 32
