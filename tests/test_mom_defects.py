"""Mistakes that public implementations of mixtures of memories made, one test each.

Some are what other tests are about: an unstable sort (`test_routing`), memories that get nothing (`test_mom`), assignments lost
to an underflow and balance over all layers at once (`test_mom_router`), blocks beside attention (``model-mom`` in the contracts).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kernels import dispatch
from models import Batch
from models.mixers.mom import MoMConfig
from models.mixers.rules import Inputs
from tests.mom_tools import EVERY_RULE, build, memory_of, mixer, naive, pieces, steer, stream, whole
from tests.tools import CAUSAL, Case, assert_close, gradients, random_batch, segments

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("train", [True, False])
def test_the_convolution_stops_where_a_memory_of_a_sequence_ends(train: bool):
    """Else, in training, the first tokens of a memory see the last ones of another: of the future, or of another sequence."""
    model, x = build("gated_delta", memories=3, top_k=1, shared=False).train(train), stream(2, 40)
    before, _ = whole(model, x)
    disturbed = x.clone()
    disturbed[0, -3:] = 1e3 * torch.randn(3, 8, dtype=torch.float64)
    after, _ = whole(model, disturbed)
    assert (after - before)[0, :-3].abs().max() <= CAUSAL
    assert (after - before)[1].abs().max() <= CAUSAL


@pytest.mark.parametrize("n", [32, 500])
def test_time_order_survives_the_sort(n: int):
    """Else even evaluation is not causal from 32 tokens on."""
    model, x = build("gated_delta").eval(), stream(1, n)
    out, _ = pieces(model, x, [n // 2, n - n // 2])
    assert_close(whole(model, x)[0], out, "forms")


def test_router_probabilities_are_wide_in_a_narrow_model():
    model = build("gated_delta", torch.bfloat16)
    ctx, _, _ = model.prepare(Batch(torch.zeros(2, 5, dtype=torch.int64)), None)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            chosen = mixer(model)._choose(stream(2, 5, dtype=torch.bfloat16), ctx)
        assert chosen.probability.dtype == chosen.weight.dtype == torch.float32


def test_the_balance_loss_counts_valid_tokens_of_packed_documents():
    """The mask fits the tokens also where documents are packed, and what padding holds does not matter."""
    model, x = build("gated_delta").train(), stream(1, 12)
    valid = torch.arange(12)[None] < 9
    cu = segments([[4, 5]], 12, pad_to=6)
    _, said = whole(model, x, cu_seqlens=cu, valid=valid)
    _, alone = whole(model, x[:, :9], cu_seqlens=segments([[4, 5]], 9, pad_to=6))
    assert_close(said.losses, alone.losses)
    assert_close(said.stats["load"].value, alone.stats["load"].value)
    other = torch.where(valid[..., None], x, 1e3 * torch.randn_like(x))
    assert_close(whole(model, other, cu_seqlens=cu, valid=valid)[1].losses, said.losses)


@pytest.mark.parametrize(("first", "then"), [(80, 4), (80, 16), (80, 80), (3, 70)])
def test_a_continuation_may_leave_memories_empty(first: int, then: int):
    """Some memory gets nothing in the prefill, another in the continuation; all their states are passed in."""
    model, x = build("gated_delta", memories=4, top_k=1), stream(2, first + then)
    x[..., 0] = x[..., 0].abs() + 1
    steer(model, 3)
    _, state = pieces(model, x[:, :first], [first])
    assert not memory_of(state).memory[:, :3].any()
    steer(model, 1)
    with torch.no_grad():
        mixer(model).router.weight[2, 1] = 1e4  # now tokens go to two of the memories
    out, _ = pieces(model, x[:, first:], [then], state)
    stepped, _ = pieces(model, x[:, first:], [1] * then, state)
    assert_close(out, stepped, "forms")


@EVERY_RULE
@pytest.mark.parametrize("T", [1, 3, 20])
def test_short_sequences_train(rule: str, T: int):
    """No other kernel without a backward is picked for them."""
    model = build(rule).train()
    model.total(model(random_batch(2, T)).losses).backward()
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(g.isfinite().all() for g in found.values())


def test_tokens_seen_are_counted_in_tokens():
    model, x = build("gated_delta"), stream(2, 12)
    assert pieces(model, x, [7, 1, 4])[1].seen.tolist() == [12, 12]


def test_nothing_stands_between_remembered_and_new_inputs():
    """A continuation shorter than the convolution meets the remembered inputs at once, without zeros in between."""
    model, x = build("gated_delta", memories=2, top_k=2), stream(1, 9)
    with torch.no_grad():
        want, end = naive(model, x)
        out, state = pieces(model, x, [5, 2, 2])
    assert_close((out, memory_of(state).conv), (want, end.conv), "forms")


@pytest.mark.parametrize("lengths", [[[16], [16]], [[1] * 16, [13, 3]]], ids=["whole", "packed"])
def test_documents_are_not_padded_to_the_longest(lengths: list[list[int]]):
    """The rule runs over B T S rows, however the documents lie, and projects queries once per token."""
    model, x = build("gated_delta", memories=8, top_k=2), stream(2, 16)
    rows: dict[str, int] = {}

    def counted(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows[name] = args[0].shape[:2].numel()

        return hook

    mixer(model).rule.register_forward_pre_hook(counted("rule"))
    mixer(model).project.register_forward_pre_hook(counted("project"))
    whole(model, x, cu_seqlens=segments(lengths, 16, pad_to=30))
    assert rows == {"rule": 2 * 16 * 3, "project": 2 * 16}


@pytest.mark.parametrize("sizes", [[12], [1] * 12], ids=["parallel", "steps"])
def test_work_does_not_grow_with_the_number_of_memories(sizes: list[int]):
    """No loop over memories: the same ops run for 2 and for 16 of them."""
    ran = []
    for memories in (2, 16):
        model, x = build("gated_delta", memories=memories), stream(2, 12)
        dispatch.counts.clear()
        pieces(model, x, sizes)
        ran.append(dict(dispatch.counts))
    assert ran[0] == ran[1]


def test_each_row_steps_with_its_own_choice():
    """Not with that of the first row."""
    model, x = build("gated_delta", memories=8, top_k=1), stream(6, 5)
    together, state = pieces(model, x, [1] * 5)
    for b in range(6):
        alone, own = pieces(model, x[b : b + 1], [1] * 5)
        assert_close(together[b : b + 1], alone)
        assert_close(memory_of(state).memory[b : b + 1], memory_of(own).memory)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_before_rows_are_moved(side: str):
    """The mask belongs to tokens, not to sorted rows: what padding holds changes nothing."""
    model, x = build("gated_delta"), stream(2, 12)
    valid = (torch.arange(12) >= 4 if side == "left" else torch.arange(12) < 8).expand(2, 12)
    want, _ = whole(model, x, valid=valid)
    other = torch.where(valid[..., None], x, 1e3 * torch.randn_like(x))
    assert (whole(model, other, valid=valid)[0] - want).abs().max() <= CAUSAL


def test_gates_are_wide_in_a_narrow_model(monkeypatch: pytest.MonkeyPatch):
    model, seen = build("gated_delta", torch.bfloat16), []
    rule = type(mixer(model).rule)
    plain = rule.inputs

    def inputs(self: object, *args: Tensor) -> Inputs:
        seen.append(plain(self, *args))  # pyright: ignore
        return seen[-1]

    monkeypatch.setattr(rule, "inputs", inputs)
    pieces(model, stream(2, 5, dtype=torch.bfloat16), [4, 1])
    assert len(seen) == 2
    assert all(x.g.dtype == x.beta.dtype == torch.float32 for x in seen)


def test_the_convolution_can_be_left_out():
    model, x = build("bare"), stream(2, 9)
    assert memory_of(model.init_state(2, 9)).conv == ()
    assert_close(pieces(model, x, [5, 1, 3])[0], whole(model, x)[0], "forms")


def test_the_balance_loss_is_part_of_the_total_with_the_weight_of_the_paper():
    assert MoMConfig().balance_weight == 1e-3
    model = (
        Case("default", "mixer", {"kind": "mom", "rule": {"kind": "gated_delta", "heads": 2}}).build(d_model=8).train()
    )
    losses = model(random_batch(2, 9)).losses
    assert_close(model.total(losses), losses["lm"] + 1e-3 * losses["mom.balance"])
