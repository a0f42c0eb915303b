"""The tokens at which slots of a memory cell start again: drawn by lot, each once, however the batch is split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models import LM, Batch, build, model_config
from models.channels.gmt_memory import CANDIDATES, distinct, keys
from models.types import CommitInfo, Write
from tests.tools import random_batch
from training.parallel import merge_writes

SLOTS = 4
HERE = "layers.0.channel"


def model(**options: object) -> LM:
    part = {"kind": "gmt", "slots": SLOTS, "width": 3, "maintenance_every": 1, **options}
    block = {"mixer": {"kind": "attention", "heads": 2}, "channel": part}
    raw = {"d_model": 8, "n_layers": 1, "vocab_size": 23, "norm": "layernorm", "blocks": {"b": block}}
    return build(model_config(raw), dtype=torch.float64).train()


def drawn(lm: LM, tokens: Tensor, valid: Tensor | None = None) -> Write:
    return lm(Batch(tokens, valid=valid)).writes[f"{HERE}.candidates"]


def alike(tokens: Tensor, columns: int) -> Tensor:
    """All rows begin with the same tokens."""
    tokens = tokens.clone()
    tokens[:, :columns] = torch.arange(7, 7 + columns)
    return tokens


def test_rows_that_begin_alike_bring_one_candidate_each_place():
    """Without this, one start token before every row would now and then fill the whole draw with one state."""
    lm, tokens = model(), alike(random_batch(3 * SLOTS * CANDIDATES, 3).tokens, 2)
    seen = set()
    for step in range(40):
        lm.progress.fill_(step / 40)
        found = distinct(drawn(lm, tokens))
        seen.add(len(found))
        assert (torch.pdist(found) > 1e-6).all()
    assert min(seen) < SLOTS, "the disturbance does not reach the draw"


def test_slots_that_start_again_are_no_doubles():
    """Two dead slots, and candidates of which most are one state."""
    lm, tokens = model(dead_below=0.2), alike(random_batch(3 * SLOTS * CANDIDATES, 2).tokens, 2)
    cell = lm.layers[0].channel  # pyright: ignore[reportAttributeAccessIssue]
    info = CommitInfo(step=1, total=9, seed=3, micro_batches=1, world_size=1)
    writes = lm(Batch(tokens)).writes
    writes[f"{HERE}.weights"] = Write(torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64) * tokens.numel())
    cell.usage.copy_(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    (reset,) = lm.commit(writes, info)
    assert reset.rows.tolist() == [2, 3]
    assert torch.cosine_similarity(cell.slots[2], cell.slots[3], dim=0) < 0.999


@pytest.mark.parametrize("pieces", [2, 3, 6])
def test_the_draw_does_not_depend_on_the_split(pieces: int):
    lm, batch = model(), random_batch(6, 9)
    writes: dict[str, Write] = {}
    for rows in batch.tokens.chunk(pieces):
        writes = merge_writes(writes, lm(Batch(rows)).writes)
    whole = drawn(lm, batch.tokens)
    assert whole.key is not None
    assert torch.equal(writes[f"{HERE}.candidates"].key, whole.key)  # pyright: ignore[reportArgumentType]
    assert torch.allclose(writes[f"{HERE}.candidates"].value, whole.value, atol=1e-12)


def test_each_step_draws_others():
    lm, batch = model(), random_batch(6, 9)
    first = drawn(lm, batch.tokens)
    lm.progress.fill_(0.001)
    second = drawn(lm, batch.tokens)
    assert not torch.isin(first.key, second.key).any()  # pyright: ignore[reportArgumentType]


def test_every_place_is_drawn_alike():
    """Over many steps no position is preferred."""
    lm, batch = model(), random_batch(4, 16)
    counts, steps = torch.zeros(16), 300
    ctx, _, _ = lm.prepare(batch, None)
    for step in range(steps):
        lots = keys(ctx._replace(progress=torch.tensor(step / steps)))
        best = lots.flatten().topk(SLOTS * CANDIDATES).indices
        counts += torch.bincount(best % 16, minlength=16)
    share = counts / counts.sum()
    assert (share - 1 / 16).abs().max() < 0.012  # five standard deviations of a fair draw


def test_padding_is_never_drawn():
    lm, tokens = model(), random_batch(3, 5).tokens
    valid = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    write = drawn(lm, tokens, valid)
    assert write.key is not None
    assert int((write.key >= 0).sum()) == int(valid.sum())
    assert len(distinct(write)) == int(valid.sum())
    assert not write.value[write.key < 0].any()
