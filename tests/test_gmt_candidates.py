"""The tokens at which slots of a memory cell start again: a state is drawn once, even where all rows begin alike."""

from __future__ import annotations

import torch
from torch import Tensor

from models import LM, Batch, build, model_config
from models.channels.gmt import GMT
from models.channels.gmt_memory import CANDIDATES, distinct
from models.types import CommitInfo, Write
from tests.tools import random_batch

SLOTS = 4
HERE = "layers.0.channel"


def build_model(**options: object) -> tuple[LM, GMT]:
    part = {"kind": "gmt", "slots": SLOTS, "width": 3, "maintenance_every": 1, **options}
    block = {"mixer": {"kind": "attention", "heads": 2}, "channel": part}
    raw = {"d_model": 8, "n_layers": 1, "vocab_size": 23, "norm": "layernorm", "blocks": {"b": block}}
    model = build(model_config(raw), dtype=torch.float64).train()
    cell = model.get_submodule(HERE)
    assert isinstance(cell, GMT)
    return model, cell


def alike(length: int) -> Tensor:
    """Many rows that begin with the same two tokens."""
    tokens = random_batch(3 * SLOTS * CANDIDATES, length).tokens
    tokens[:, :2] = torch.tensor([7, 8])
    return tokens


def test_rows_that_begin_alike_bring_one_candidate_each_place():
    """Without this, one start token before every row would now and then fill the whole draw with one state."""
    (model, _), tokens, sizes = build_model(), alike(3), []
    for step in range(40):
        model.progress.fill_(step / 40)
        found = distinct(model(Batch(tokens)).writes[f"{HERE}.candidates"])
        assert (torch.pdist(found) > 1e-6).all()
        sizes.append(len(found))
    assert min(sizes) < SLOTS, "the draw was never filled with one state"


def test_slots_that_start_again_are_no_doubles():
    """Two dead slots, and candidates of which most are one state."""
    (model, cell), tokens = build_model(dead_below=0.2), alike(2)
    writes, used = model(Batch(tokens)).writes, torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    writes[f"{HERE}.weights"] = Write(used * tokens.numel())
    cell.usage.copy_(used)
    (reset,) = model.commit(writes, CommitInfo(step=1, total=9, seed=3, micro_batches=1, world_size=1))
    assert reset.rows.tolist() == [2, 3]
    assert torch.cosine_similarity(cell.slots[2], cell.slots[3], dim=0) < 0.999
