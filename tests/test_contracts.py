"""What every part promises, for every part: outputs, states, gradients, purity, initialisation.

To sign: add the part's configurations to `tests.cases`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from models import LM, Batch, meta_model
from models import state as states
from models.types import CommitInfo
from tests.tools import (
    CAUSAL,
    Case,
    Selections,
    assert_close,
    assert_same_gradients,
    gradients,
    in_pieces,
    poison,
    random_batch,
    rel_err,
    same_bytes,
    segments,
    state_hash,
)
from training.parallel import merge_writes

pytestmark = pytest.mark.usefixtures("poison")


# -- one function, however it is called


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 5], [1, 7, 1], [3, 1, 5]], ids=str)
def test_any_split_is_the_whole(model: LM, sizes: list[int]):
    tokens = random_batch(2, 9).tokens
    whole, none, _ = model.features(Batch(tokens))
    assert none is None
    out, state, _ = in_pieces(model, tokens, sizes, max_len=11)
    _, once, _ = in_pieces(model, tokens, [9], max_len=11)
    assert_close(out, whole, "forms")
    assert_close(state, once, "forms")
    assert state.seen.tolist() == [9, 9]


def test_packed_is_separate(model: LM):
    """Two rows of documents with empty ones between, the second with a tail of padding; outputs and gradients."""
    T, rows = 12, [[4, 0, 1, 7], [2, 6]]
    tokens = random_batch(2, T).tokens
    valid = torch.ones(2, T, dtype=torch.bool)
    valid[1, 8:] = False
    weight = torch.randn(2, T, 16, dtype=torch.float64)
    packed, _, _ = model.features(Batch(tokens, cu_seqlens=segments(rows, T, pad_to=10), valid=valid))
    (packed * weight)[valid].sum().backward()
    together = gradients(model)
    for row, lengths in enumerate(rows):
        start = 0
        for n in filter(None, lengths):
            part = slice(start, start + n)
            alone, _, _ = model.features(Batch(tokens[row : row + 1, part]))
            assert_close(packed[row : row + 1, part], alone, "forms", what=f"document at {row}, {start}")
            (alone * weight[row, part]).sum().backward()
            start += n
    assert_same_gradients(together, gradients(model))


def test_rows_are_independent(model: LM):
    tokens = random_batch(3, 7).tokens
    together, state, _ = in_pieces(model, tokens, [5, 2], max_len=8)
    for row in range(3):
        alone, own, _ = in_pieces(model, tokens[row : row + 1], [5, 2], max_len=8)
        assert_close(together[row : row + 1], alone)
        assert_close(states.select_rows(state, torch.tensor([row])), own)
    disturbed = tokens.clone()
    disturbed[0] = tokens[0].flip(0) % 22 + 1
    for train in (True, False):
        model.train(train)
        before, after = (model.features(Batch(t))[0] for t in (tokens, disturbed))
        assert_close(after[1:], before[1:])
        assert rel_err(after[0], before[0]) > 1e-3


PADDED = {  # where 5 tokens stand among 8
    "left": [0, 0, 0, 1, 1, 1, 1, 1],
    "right": [1, 1, 1, 1, 1, 0, 0, 0],
    "mixed": [0, 1, 1, 0, 1, 0, 1, 1],
}


@pytest.mark.parametrize("where", PADDED)
def test_padding_is_nothing(model: LM, where: str):
    model.train()  # parts say more in training; nothing here is random
    tokens = random_batch(2, 5).tokens
    valid = torch.tensor([PADDED[where]] * 2, dtype=torch.bool)
    padded = torch.zeros(2, 8, dtype=torch.int64).masked_scatter(valid, tokens)
    whole, _, said = model.features(Batch(tokens))
    out, _, padded_said = model.features(Batch(padded, valid=valid))
    assert_close(out[valid], whole.flatten(0, 1), "forms")
    assert_close(padded_said.losses, said.losses, "forms")
    assert_close(padded_said.writes, said.writes, "forms")
    _, state, _ = in_pieces(model, tokens, [5], max_len=9)
    for sizes in ([8], [3, 5], [1] * 8):
        out, padded_state, _ = in_pieces(model, padded, sizes, max_len=9, valid=valid)
        assert_close(out[valid], whole.flatten(0, 1), "forms")
        assert_close(padded_state, state, "forms")
    last = model(Batch(padded, valid=valid), logits="last").logits
    assert_close(last[:, 0], model(Batch(tokens)).logits[:, -1], "forms")


@pytest.mark.parametrize("n", [1, 3])
def test_invalid_tokens_change_no_state(model: LM, n: int):
    _, state, _ = in_pieces(model, random_batch(3, 6).tokens, [6], max_len=12)
    valid = torch.zeros(3, n, dtype=torch.bool)
    valid[1, -1] = True
    h, new, _ = model.features(Batch(random_batch(3, n, seed=1).tokens, valid=valid), state)
    idle = torch.tensor([0, 2])
    assert same_bytes(states.select_rows(new, idle), states.select_rows(state, idle))
    assert new is not None
    assert new.seen.tolist() == [6, 7, 6]
    assert h.isfinite().all()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_causal(model: LM, train: bool):
    model.train(train)
    with torch.no_grad():
        model.embed.weight[0] *= 1e3 / model.embed.weight[0].abs().mean()
    tokens = random_batch(2, 12).tokens
    before, _, _ = model.features(Batch(tokens))
    for t in (1, 6, 11):
        disturbed = tokens.clone()
        disturbed[:, t] = 0
        after, _, _ = model.features(Batch(disturbed))
        assert (after - before)[:, :t].abs().max() <= CAUSAL
        assert rel_err(after[:, t], before[:, t]) > 1e-3


# -- purity


def test_a_passed_state_is_not_written(model: LM):
    tokens = random_batch(2, 10).tokens
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            _, state, _ = in_pieces(model, tokens[:, :6], [6], max_len=10)
            before = states.clone(state)
            for piece in (tokens[:, 6:7], tokens[:, 6:]):
                h, new, _ = model.features(Batch(piece), state)
                assert same_bytes(state, before)
                donated, new_donated, _ = model.features(Batch(piece), states.clone(state), donate=True)
                assert same_bytes((donated, new_donated), (h, new))


def test_only_commit_changes_the_model(model: LM):
    """Evaluation, generation, and a training step up to its backward change no byte; a repeat gives the same bytes."""
    batch, before = random_batch(2, 8), state_hash(model)
    first = model(batch)
    with torch.no_grad():
        state = model.init_state(2, 12)
        for t in range(8):
            out = model(Batch(batch.tokens[:, t : t + 1]), state, donate=True, logits="last")
            state = out.state
    assert not first.writes, "a part in eval mode has nothing to write"
    assert same_bytes(model(batch).losses, first.losses)
    model.train()
    model.total(model(batch).losses).backward()
    assert state_hash(model) == before


def test_commit_is_a_function_of_the_writes(case: Case):
    """The same writes give the same model memory and the same resets, whose rows are rows of a parameter or table."""
    one, two = case.build(), case.build()
    writes = one(random_batch(2, 8)).writes
    if not writes:
        pytest.skip("a part without model memory")
    before, resets = state_hash(one), []
    for step in range(1, 30):
        info = CommitInfo(step, 30, seed=3, micro_batches=1, world_size=1)
        said = one.commit(writes, info)
        assert same_bytes([tuple(r) for r in two.commit(writes, info)], [tuple(r) for r in said])
        resets += said
    assert state_hash(one) == state_hash(two) != before
    assert all(p.isfinite().all() for p in one.parameters())
    known = {n: len(p) for n, p in one.named_parameters() if p.ndim} | {n: t.rows for n, t in one.tables().items()}
    for name, rows in resets:
        assert rows.dtype == torch.int64
        assert set(rows.tolist()) <= set(range(known[name]))


def test_recompute_changes_nothing(case: Case):
    model, batch, said = case.build(dropout=case.dropout).train(), random_batch(2, 8), {}
    for recompute in (False, True):
        model.recompute = recompute
        torch.manual_seed(5)
        out = model(batch)
        model.total(out.losses).backward()
        said[recompute] = (out.losses, out.writes, gradients(model))
    assert same_bytes(said[True][1], said[False][1])
    assert_close(said[True][0], said[False][0])
    assert_same_gradients(said[True][2], said[False][2])


def test_micro_batches_are_one_batch(case: Case):
    model = case.build().train()
    for name in model.loss_weights:
        if any(name.endswith(f".{loss}") for loss in case.nonlinear):
            model.loss_weights[name] = 0.0
    mask = torch.rand(4, 6) < 0.6
    batch, count = random_batch(4, 6, loss_mask=mask), mask.sum()
    out = model(batch)
    model.total(out.losses).backward()
    whole, writes = gradients(model), {}
    for rows in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)):
        piece = Batch(batch.tokens[rows], *(None if t is None else t[rows] for t in batch[1:]))
        part = model(piece, denom=count / 4)
        (model.total(part.losses) / 4).backward()
        writes = merge_writes(writes, part.writes)
    assert_same_gradients(gradients(model), whole)
    assert_close(writes, out.writes)


# -- gradients, initialisation


def test_gradients_are_those_of_the_function(case: Case):
    model, batch = case.build().train(), random_batch(2, 5)
    names = [n for n, _ in model.named_parameters()]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, values, strict=True))
        out = torch.func.functional_call(model, parameters, (batch,), {"logits": "all"})
        losses = [v for name, v in out.losses.items() if not name.endswith(tuple(f".{loss}" for loss in case.held))]
        return out.logits, *losses

    values = tuple(p.detach().clone().requires_grad_() for _, p in model.named_parameters())
    assert torch.autograd.gradcheck(function, values, fast_mode=True)


def test_initialisation_is_complete(case: Case):
    model = meta_model(case.config()).to_empty(device="cpu")
    assert any(p.isnan().any() for p in model.parameters()), "the poison does not work"
    model.reset_parameters(torch.Generator().manual_seed(1))
    tensors = [*model.parameters(), *model.buffers(), *tree_leaves([t.state_dict() for t in model.tables().values()])]
    for t in tensors:
        assert t.isfinite().all()
        assert t.is_floating_point() or t.dtype == torch.bool or (t != torch.iinfo(t.dtype).max).all()
    first = state_hash(model)
    poison(model)
    model.reset_parameters(torch.Generator().manual_seed(1))
    assert state_hash(model) == first
    model.reset_parameters(torch.Generator().manual_seed(2))
    assert state_hash(model) != first


# -- edges


def test_smallest_inputs(model: LM):
    one = random_batch(1, 1)
    assert model(one).losses["lm"].isfinite()
    h, _, _ = model.features(Batch(one.tokens), model.init_state(1, 1))
    assert_close(h, model.features(Batch(one.tokens))[0], "forms")
    packed = random_batch(1, 1, cu_seqlens=torch.tensor([0, 0, 1, 1, 1], dtype=torch.int32))
    assert_close(model(packed).losses["lm"], model(one).losses["lm"], "forms")
    never = torch.zeros(2, 4, dtype=torch.bool)
    nothing = random_batch(2, 4, valid=never, loss_mask=never)
    model.train()
    out = model(nothing)
    model.total(out.losses).backward()
    assert all(g.isfinite().all() for g in gradients(model).values())
    assert model(nothing).losses["lm"] == 0


@pytest.mark.parametrize("pure", [True, False], ids=["pure", "autocast"])
def test_bf16_is_close_to_fp32(case: Case, pure: bool):
    model = case.build(torch.float32).train()
    batch = random_batch(2, 10)
    with torch.no_grad():
        for p in model.parameters():  # the same weights in both
            p.copy_(p.bfloat16())
    with Selections() as selections:
        reference = model(batch, logits="all")
    if pure:
        model.to(torch.bfloat16)
    selections.imposing = True
    with torch.autocast("cpu", torch.bfloat16, enabled=not pure), selections:
        out = model(batch, logits="all")
        h, state, _ = in_pieces(model, batch.tokens, [5, 1, 4], max_len=10)
    assert rel_err(out.logits, reference.logits) <= case.bf16
    assert rel_err(torch.nn.functional.linear(h.float(), model.head_weight.float()), reference.logits) <= case.bf16
    assert rel_err(out.losses["lm"], reference.losses["lm"]) <= case.bf16
    kept = [t.dtype for t in tree_leaves(state)] == [t.dtype for t in tree_leaves(model.init_state(2, 10))]
    assert kept, "a state keeps its dtypes"
    model.total(out.losses).backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_a_saved_model_is_whole(case: Case):
    """State dict and tables hold everything a forward reads, the share of training done included."""
    model = case.build()
    model.progress.fill_(0.25)
    other = meta_model(case.config()).to(torch.float64).to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    for name, table in other.tables().items():
        table.load_state_dict(model.tables()[name].state_dict())
    assert state_hash(other) == state_hash(model)
    ctx, _, _ = other.prepare(random_batch(1, 3), None)
    assert float(ctx.progress) == 0.25
    batch = random_batch(2, 6)
    assert same_bytes(other(batch).losses, model(batch).losses)
