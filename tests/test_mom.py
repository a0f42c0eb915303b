"""Mixture of memories: what it computes, against loops by the book (`tests.mom_naive`) and against the plain mixer of its rule.

In fp64; "unchanged" means by at most 1e-12 after a disturbance of 1e3, because the rows of one memory move when another sequence's
tokens do, and matrix products of other shapes differ in their last bits.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from models import Batch
from tests.mom_tools import (
    EVERY_RULE,
    OTHERS,
    RULES,
    TRAIN,
    build,
    memory_of,
    mixer,
    naive,
    pieces,
    plain_of,
    run_plain,
    steer,
    stream,
    whole,
)
from tests.tools import CAUSAL, assert_close, same_bytes, segments

pytestmark = pytest.mark.usefixtures("poison")


# -- A1: parallel = token by token = loops


GRID = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 8)]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "routed"])
@pytest.mark.parametrize(("memories", "k"), GRID)
@EVERY_RULE
def test_parallel_is_recurrent_is_naive(rule: str, memories: int, k: int, shared: bool):
    """Outputs and final states, with a projection per memory and with one for all, weights renormalised and plain."""
    for shared_kv, router_norm in itertools.product((False, True), ("topk", "none")):
        options = {
            "memories": memories,
            "top_k": k,
            "shared": shared,
            "shared_kv": shared_kv,
            "router_norm": router_norm,
        }
        model, x = build(rule, **options), stream(2, 7)
        with torch.no_grad():
            want, end = naive(model, x)
            for train in (True, False):
                assert_close(whole(model.train(train), x)[0], want, "forms")
            once, state = pieces(model, x, [7])
            assert_close((once, memory_of(state)), (want, end), "forms")
            stepped, state = pieces(model, x, [1] * 7)
            assert_close((stepped, memory_of(state)), (want, end), "forms")


@pytest.mark.parametrize("rule", OTHERS)
def test_options_of_rules_are_those_of_the_plain_mixer(rule: str):
    model, x = build(rule), stream(2, 9)
    with torch.no_grad():
        want, end = naive(model, x)
        assert_close(whole(model, x)[0], want, "forms")
        out, state = pieces(model, x, [4, 1, 1, 3])
        assert_close((out, memory_of(state)), (want, end), "forms")


@pytest.mark.parametrize("shared_kv", [False, True])
@EVERY_RULE
def test_gradients_are_those_of_the_loops(rule: str, shared_kv: bool):
    """Of every weight and of the input, also where the forward continues a state piece by piece."""
    model, x = build(rule, shared_kv=shared_kv).train(), stream(2, 6).requires_grad_()
    leaves = [x, *mixer(model).parameters()]
    weight = torch.randn(2, 6, 8, dtype=torch.float64)
    want = torch.autograd.grad((naive(model, x)[0] * weight).sum(), leaves)
    for out in (whole(model, x)[0], pieces(model, x, [3, 1, 2])[0]):
        assert_close(torch.autograd.grad((out * weight).sum(), leaves), want, "gradient")


# -- A2, A3: the plain mixer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@EVERY_RULE
def test_one_memory_is_the_plain_mixer(rule: str, dtype: torch.dtype):
    model, x = build(rule, dtype, memories=1, top_k=1, shared=False), stream(2, 70, dtype=dtype)
    assert_close(whole(model, x)[0], run_plain(plain_of(model), x), "same" if dtype.itemsize == 8 else "forms", dtype)


@EVERY_RULE
def test_a_shared_memory_of_equal_weights_says_the_same_again(rule: str):
    """So that what reaches the norm is twice that of the plain mixer."""
    model, x = build(rule, memories=1, top_k=1), stream(2, 9)
    plain, heard = plain_of(model), []
    with torch.no_grad():
        mixer(model).kv[1] = mixer(model).kv[0]
    for m in (model, plain):
        m.layers[0].mixer.readout.register_forward_pre_hook(lambda _, args: heard.append(args[0]))  # pyright: ignore
    whole(model, x)
    run_plain(plain, x)
    assert_close(heard[0], 2 * heard[1])


@pytest.mark.parametrize("memories", [2, 5])
@EVERY_RULE
def test_all_memories_of_equal_weights_are_the_plain_mixer(rule: str, memories: int):
    model, x = build(rule, memories=memories, top_k=memories, shared=False), stream(2, 9)
    with torch.no_grad():
        mixer(model).kv.copy_(mixer(model).kv[:1].expand_as(mixer(model).kv))
    assert_close(whole(model, x)[0], run_plain(plain_of(model), x), "forms")


# -- A4: names of memories mean nothing


@EVERY_RULE
def test_memories_can_be_renamed(rule: str):
    model, x = build(rule, memories=5, top_k=2), stream(2, 9)
    before, said = whole(model, x)
    order = torch.randperm(5)
    with torch.no_grad():
        mixer(model).router.weight.copy_(mixer(model).router.weight[order])
        mixer(model).kv[:5] = mixer(model).kv[:5][order]
    after, said_after = whole(model, x)
    assert_close(after, before)
    assert_close(said_after.losses, said.losses)
    assert_close(said_after.stats["load"].value, said.stats["load"].value[order])


# -- A5: any split, also where a memory gets nothing


@EVERY_RULE
def test_any_split_carries_the_state(rule: str):
    model, x = build(rule, memories=8, top_k=1), stream(2, 20)  # in most pieces most memories get nothing
    want, end = pieces(model, x, [20])
    assert_close(want, whole(model, x)[0], "forms")
    for sizes in ([7, 1, 1, 11], [1] * 20, [2, 2, 16], [16, 4], [3, 1, 16]):
        out, state = pieces(model, x, sizes)
        assert_close((out, state), (want, end), "forms")


@EVERY_RULE
def test_a_piece_that_leaves_memories_empty_continues(rule: str):
    """Long enough for many chunks, with the states of all memories passed in."""
    model, x = build(rule, memories=4, top_k=1), stream(2, 90)
    x[..., 0] = x[..., 0].abs() + 1
    for target in (2, 0):
        steer(model, target)
        _, state = pieces(model, x[:, :10], [10])
        before = memory_of(state)
        want, _ = pieces(model, x, [10, 80])
        out, after = pieces(model, x[:, 10:], [80], state)
        assert_close(out, want[:, 10:])
        for m in range(4):
            unchanged = same_bytes(memory_of(after).memory[:, m], before.memory[:, m])
            assert unchanged == (m != target)


# -- A6, A7, A8: time, rows, modes


@pytest.mark.parametrize("B", [1, 2])
@TRAIN
@EVERY_RULE
def test_causal(rule: str, train: bool, B: int):
    model = build(rule).train(train)
    for T in (2, 33, 70):  # shorter than the convolution; not multiples of a chunk
        x = stream(B, T)
        before, _ = whole(model, x)
        for t in {1, T // 2, T - 1}:
            disturbed = x.clone()
            disturbed[:, t] = 1e3 * torch.randn(8, dtype=torch.float64)
            after, _ = whole(model, disturbed)
            assert (after - before)[:, :t].abs().max() <= CAUSAL
            assert (after - before)[:, t].abs().max() > 1e-6


@TRAIN
@EVERY_RULE
def test_rows_are_independent(rule: str, train: bool):
    model, x = build(rule).train(train), stream(2, 40)
    disturbed = x.clone()
    disturbed[0] = 1e3 * torch.randn(40, 8, dtype=torch.float64)
    for run in (lambda x: whole(model, x)[0], lambda x: pieces(model, x, [37, 1, 2])[0]):
        before, after = run(x), run(disturbed)
        assert (after[1] - before[1]).abs().max() <= CAUSAL
        assert (after[0] - before[0]).abs().max() > 1e-6


@EVERY_RULE
def test_training_and_evaluation_agree(rule: str):
    model, x = build(rule), stream(2, 40)
    assert same_bytes(whole(model.train(), x)[0], whole(model.eval(), x)[0])


# -- A9, A10: padding, packing


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", [*RULES, "skip"])
def test_padding_is_nothing(rule: str, side: str, train: bool):
    """Also where a rule hands values on past its memory, and nothing between projection and rule makes them zero."""
    model, x = build(rule, shared_kv=rule == "skip").train(train), stream(2, 9)
    padded, valid = stream(2, 14), torch.zeros(2, 14, dtype=torch.bool)
    place = slice(5, 14) if side == "left" else slice(0, 9)
    padded[:, place], valid[:, place] = x, True
    want, said = whole(model, x)
    out, padded_said = whole(model, padded, valid=valid)
    assert_close(out[:, place], want, "forms")
    assert not out[~valid].any(), "padding adds nothing to the stream"
    assert_close(padded_said, said, "forms")
    for sizes in ([14], [3, 4, 7], [1] * 14):
        out, state = pieces(model, padded, sizes, valid=valid)
        assert_close(out[:, place], want, "forms")
        assert_close(memory_of(state), memory_of(pieces(model, x, [9])[1]), "forms")


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@EVERY_RULE
def test_packed_is_separate(rule: str, train: bool):
    """Documents of 1, fewer than the convolution has taps, and around the size of a chunk; short ones leave memories empty."""
    model, lengths = build(rule, memories=6).train(train), [[1, 3, 63, 65, 2], [64, 0, 1, 69]]
    x = stream(2, 134)
    packed, _ = whole(model, x, cu_seqlens=segments(lengths, 134, pad_to=12))
    for row, documents in enumerate(lengths):
        start = 0
        for n in filter(None, documents):
            part = slice(start, start + n)
            assert_close(packed[row : row + 1, part], whole(model, x[row : row + 1, part])[0], "forms")
            start += n


# -- A11: frozen memories


@EVERY_RULE
def test_a_memory_not_chosen_is_untouched(rule: str):
    model, x = build(rule, memories=6, top_k=2), stream(3, 12)
    _, state = pieces(model, x[:, :8], [8])
    for n in (1, 4):
        before, part = memory_of(state), x[:, 8 : 8 + n]
        ctx, _, _ = model.prepare(Batch(torch.zeros(3, n, dtype=torch.int64)), state)
        chosen = mixer(model)._choose(mixer(model).norm(part), ctx).index.flatten(1)
        after = memory_of(pieces(model, part, [n], state)[1])
        for b in range(3):
            for m in range(7):
                visited = m == 6 or m in chosen[b].tolist()
                kept = [
                    same_bytes(a[b, m], z[b, m]) for a, z in zip(after, before, strict=True) if isinstance(a, Tensor)
                ]
                assert kept == [not visited] * len(kept)
