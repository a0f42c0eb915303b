"""B'MOJO: what it computes against loops by the book (`tests.bmojo_naive`), which tokens it keeps, and its bounded state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.prefix_topm import reference as selection
from models import Batch, UserError, model_config
from models import state as states
from models.mixers import bmojo_decode, bmojo_state
from models.mixers.bmojo_config import BMojoConfig
from models.mixers.bmojo_scores import control
from models.types import CommitInfo, Ctx, RowReset, Write
from tests.bmojo_naive import Keys, insert, keys_of
from tests.bmojo_tools import (
    DEDUP,
    EVERY_MODE,
    EVERY_SSM,
    MAMBA2,
    MODES,
    build,
    memory_of,
    mixer,
    naive,
    pieces,
    say,
    score_by,
    stream,
    whole,
)
from tests.tools import CAUSAL, Case, assert_close, gradients, in_pieces, random_batch, rel_err, same_bytes, segments

pytestmark = pytest.mark.usefixtures("poison")


# -- parallel = token by token = the loops


@DEDUP
@EVERY_MODE
@EVERY_SSM
def test_parallel_is_recurrent_is_naive(ssm: str, mode: str, dedup: bool):
    """Through five windows and more; outputs, and what is kept at the end."""
    for window, m_f, m_e in ((1, 1, 3), (4, 1, 3), (4, 1, 60), (5, 4 if mode == "chunk" else 1, 2), (40, 1, 3)):
        model = build(ssm, window=window, m_f=m_f, m_e=m_e, fading_mode=mode, dedup=dedup)
        x, T = stream(2, 27), 27
        with torch.no_grad():
            want, keys = naive(model, x)
            assert_close(whole(model, x)[0], want, "forms")
            once, state = pieces(model, x, [T])
            assert_close(once, want, "forms")
            stepped, after = pieces(model, x, [1] * T, donate=True)
            assert_close((stepped, after), (want, state), "forms")
        if T % window:
            assert [sorted(p for p in row if p >= 0) for row in memory_of(state).position.tolist()] == [
                row[-1].kept for row in keys
            ]


OPTIONS: list[dict[str, Any]] = [
    {"kv_heads": 1, "qk_norm": True},
    {"tie_fading": False, "fading_norm": False, "qk_norm": True},
    {"score": "innov_l2", "score_k": 1, "token_shift": 0},
    {"score": "innov_cos", "score_k": 3, "score_weights": (3.0, 1.0, 0.5), "token_shift": 1},
    {"score_debias": True, "evict_gamma": 0.8},
    {"score_floor": 0.7, "m_f": 0},
    {"m_e": 0, "head_dim": 6},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_options(options: dict[str, Any]):
    model, x = build(**options), stream(2, 23)
    with torch.no_grad():
        want, _ = naive(model, x)
        assert_close(whole(model, x)[0], want, "forms")
        for sizes in ([23], [1] * 23, [6, 1, 9, 7]):
            assert_close(pieces(model, x, sizes)[0], want, "forms")


@pytest.mark.parametrize(
    "ssm",
    [
        {"kind": "delta", "heads": 2, "conv": 0, "allow_neg_eigval": True},
        {"kind": "gated_delta", "heads": 1, "value_heads": 2, "head_dim": 4},
    ],
    ids=lambda ssm: ssm["kind"],
)
def test_the_write_error_of_a_delta_rule(ssm: dict[str, Any]):
    """The nested memory's own surprise: of whole sequences, packed and padded ones, in pieces and steps."""
    model, T = build(ssm, window=3, score="delta"), 29
    x = stream(2, T)
    with torch.no_grad():
        want, keys = naive(model, x)
        assert_close(whole(model, x)[0], want, "forms")
        for sizes in ([T], [1] * T, [6, 1, 9, 13]):
            out, state = pieces(model, x, sizes, donate=True)
            assert_close(out, want, "forms")
            assert memory_of(state).position.tolist() == [row[-1].kept for row in keys]
        packed, _ = whole(model, x, cu_seqlens=segments([[5, 24], [29]], T, pad_to=6))
        assert_close(packed[0, 5:], naive(model, x[:1, 5:])[0][0], "forms")
    tokens, valid = random_batch(2, T).tokens, torch.rand(2, T) < 0.6
    for sizes in ([T], [1] * T, [4, 1, 11, 13]):
        out, _, _ = in_pieces(model, tokens, sizes, T, valid=valid)
        for row in range(2):
            alone, _, _ = model.features(Batch(tokens[row : row + 1, valid[row]]))
            assert_close(out[row : row + 1, valid[row]], alone, "forms")


@pytest.mark.parametrize("pos", ["rope_const", "rope_true"])
@EVERY_MODE
def test_rotary_positions(mode: str, pos: str):
    """Rotations are tabulated in fp32."""
    for tied in (True, False):
        model, x = build(pos=pos, fading_mode=mode, tie_fading=tied, kv_heads=1), stream(2, 23)
        with torch.no_grad():
            want, _ = naive(model, x)
            assert_close(whole(model, x)[0], want, "forms", torch.float32)
            for sizes in ([23], [1] * 23, [6, 1, 9, 7]):
                assert_close(pieces(model, x, sizes)[0], whole(model, x)[0], "forms")


@EVERY_MODE
def test_gradients_are_those_of_the_loops(mode: str):
    """Of every weight and of the input, also where the forward continues a state piece by piece."""
    model, x = build(fading_mode=mode).train(), stream(2, 14).requires_grad_()
    leaves = [x, *mixer(model).parameters()]
    weight = torch.randn(2, 14, 8, dtype=torch.float64)
    want = torch.autograd.grad((naive(model, x)[0] * weight).sum(), leaves)
    for out in (whole(model, x)[0], pieces(model, x, [3, 1, 6, 4])[0], pieces(model, x, [1] * 14)[0]):
        assert_close(torch.autograd.grad((out * weight).sum(), leaves), want, "gradient")


# -- any split


@DEDUP
@EVERY_MODE
def test_any_split_carries_the_state(mode: str, dedup: bool):
    """Prompts of P tokens with P mod W in 0, 1, W - 1, then one by one; pieces within a chunk and over many."""
    W = 4
    model, x = build(window=W, m_f=2 if mode == "chunk" else 1, fading_mode=mode, dedup=dedup), stream(2, 5 * W + 3)
    T = x.shape[1]
    with torch.no_grad():
        want, end = pieces(model, x, [T])
        assert_close(want, whole(model, x)[0], "forms")
        for P in (1, W - 1, W, W + 1, 3 * W - 1, 3 * W, 3 * W + 1):
            assert_close(pieces(model, x, [P] + [1] * (T - P)), (want, end), "forms")
        for sizes in ([2] * 11 + [1], [3] * 7 + [2], [7, 9, 7], [1, 2, 17, 3]):
            assert_close(pieces(model, x, sizes), (want, end), "forms")


def test_ragged_rows_advance_at_their_own_pace():
    """Rows at different places of their chunks, some idle in a call: each is what it is alone."""
    model = build(window=3, fading_mode="band")
    tokens = random_batch(3, 30).tokens
    valid = torch.rand(3, 30) < torch.tensor([[0.9], [0.5], [0.2]])
    for sizes in ([30], [1] * 30, [4, 1, 11, 1, 1, 12]):
        out, state, _ = in_pieces(model, tokens, sizes, 30, valid=valid)
        for row in range(3):
            own = tokens[row : row + 1, valid[row]]
            alone, end, _ = in_pieces(model, own, [own.shape[1]], 30)
            assert_close(out[row : row + 1, valid[row]], alone, "forms")
            assert_close(states.select_rows(state, torch.tensor([row])), end, "forms")


# -- the worked example of the definition: W = 4, two fading and three eidetic keys

EXAMPLE = [0.90, 0.20, 0.35, 0.80, 0.10, 0.55, 0.30, 0.60, 0.40, 0.95, 0.25, 0.15]
TABLE = {  # t: window; fading keys of "chunk", "point", "band"; what is kept, and what of it is seen
    3: ([0, 1, 2, 3], [], [], [], [], []),
    4: ([1, 2, 3, 4], [1, 3], [0], [0], [0, 2, 3], [0]),
    6: ([3, 4, 5, 6], [1, 3], [2], [0, 1, 2], [0, 2, 3], [0, 2]),
    7: ([4, 5, 6, 7], [1, 3], [3], [0, 1, 2, 3], [0, 2, 3], [0, 2, 3]),
    8: ([5, 6, 7, 8], [5, 7], [4], [1, 2, 3, 4], [0, 3, 7], [0, 3]),
    10: ([7, 8, 9, 10], [5, 7], [6], [3, 4, 5, 6], [0, 3, 7], [0, 3]),
    11: ([8, 9, 10, 11], [5, 7], [7], [4, 5, 6, 7], [0, 3, 7], [0, 3, 7]),
}


@pytest.mark.parametrize("form", ["whole", "pieces", "steps"])
@pytest.mark.parametrize(("mode", "column"), [("chunk", 1), ("point", 2), ("band", 3)])
def test_the_worked_example(mode: str, column: int, form: str):
    """Which tokens and outputs a token's own output depends on, by its derivatives: without token shift a token reaches another only
    as a key, and outputs are leaves."""
    model = build(m_f=2 if mode == "chunk" else 1, fading_mode=mode, token_shift=0)
    x, y = stream(1, 12).requires_grad_(), stream(1, 12).requires_grad_()
    score_by(model, torch.tensor([EXAMPLE]))
    say(model, y)
    o = whole(model, x)[0] if form == "whole" else pieces(model, x, [5, 7] if form == "pieces" else [1] * 12)[0]
    book = keys_of(mixer(model).cfg, EXAMPLE)
    for t, row in TABLE.items():
        grads = torch.autograd.grad(o[0, t].sum(), [x, y], retain_graph=True, allow_unused=True, materialize_grads=True)
        tokens, outputs = (g[0].abs().sum(-1).nonzero().flatten().tolist() for g in grads)
        window, eidetic = row[0], row[5]
        assert tokens == sorted(window + eidetic), t
        assert outputs == row[column], t
        assert book[t] == Keys(window, row[column], eidetic, row[4])


def test_seven_becomes_visible_when_it_leaves_the_window():
    """0.60 displaces 0.35 at the boundary 7 to 8; 0.95, inside chunk 2, enters at the next one."""
    keys = keys_of(mixer(build()).cfg, [*EXAMPLE, 0.0])
    assert [7 in k.eidetic for k in keys[7:12]] == [False, False, False, False, True]
    assert keys[12].kept == [0, 3, 9]


# -- which tokens are kept


@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.6])
def test_the_fading_of_scores_is_the_streaming_rule(gamma: float):
    """Every score times gamma at each step, and the smallest replaced: the static key chooses the same tokens."""
    T = 60
    for floor in (0.0, 0.5):
        model = build(window=3, m_e=5, evict_gamma=gamma, token_shift=0)
        scores = torch.rand(2, T)
        scores = torch.where(scores < floor, 0, scores)
        score_by(model, scores)
        x = stream(2, T)
        with torch.no_grad():
            want, _ = naive(model, x, scores)
            assert_close(whole(model, x)[0], want, "forms")
            for sizes in ([T], [1] * T, [25, 1, 34]):
                out, state = pieces(model, x, sizes)
                assert_close(out, want, "forms")
        for row in range(2):  # T is a multiple of W: the set in force next is that of the whole past
            store: dict[int, float] = {}
            for t, score in enumerate(scores[row].tolist()):
                store = {p: e * gamma for p, e in store.items()}
                insert(store, t, score, 5)
            assert memory_of(state).position[row].tolist() == sorted(store)


def test_the_set_freezes_and_forgetting_thaws_it():
    """Of independent scores a chunk c replaces a share 1 / (c + 1) of the set; with gamma < 1 the share does not fall."""

    def turnover(gamma: float, chunk: int) -> float:
        shares = []
        for _ in range(40):
            keys = keys_of(BMojoConfig(ssm=MAMBA2, window=4, m_e=8, evict_gamma=gamma), torch.rand(132).tolist())
            before, after = (set(keys[c * 4].kept) for c in (chunk, chunk + 1))
            shares.append(len(after - before) / 8)
        return sum(shares) / len(shares)

    assert turnover(1.0, 31) == pytest.approx(1 / 32, abs=0.025)
    assert turnover(1.0, 3) > 4 * turnover(1.0, 31)
    assert turnover(0.9, 31) > 4 * turnover(1.0, 31)


@torch.no_grad()
def test_constant_outputs_are_no_innovation():
    """Rounding noise lies below the floor, so that of equals the oldest stay, in every form; the first token is surprising."""
    model = build(window=4, m_e=3)
    x = torch.randn(1, 1, 8, dtype=torch.float64).expand(1, 40, 8)
    say(model, x + 1e-9 * torch.randn(1, 40, 8, dtype=torch.float64))
    for sizes in ([40], [1] * 40, [13, 27]):
        _, state = pieces(model, x, sizes)
        assert memory_of(state).position.tolist() == [[0, 1, 2]]
        assert memory_of(state).score[0, 4:].tolist() == [1.0, 0.0, 0.0]


@torch.no_grad()
def test_stats_say_whether_the_set_freezes():
    model, x = build(window=4, m_e=6), stream(2, 50)
    for cu in (None, segments([[20, 30], [50]], 50, pad_to=6)):
        _, aux = whole(model, x, cu_seqlens=cu)
        lengths = [(0, 0, 50), (1, 0, 50)] if cu is None else [(0, 0, 20), (0, 20, 50), (1, 0, 50)]
        ages, new = [], []
        for row, start, end in lengths:
            _, keys = naive(model, x[row : row + 1, start:end])
            for t in range(0, end - start, 4):
                ages += [(t - p) / t for p in keys[0][t].kept]
                new += [p >= t - 4 for p in keys[0][t].kept]
        assert float(aux.stats["kept_age"].value) == pytest.approx(sum(ages) / len(ages), rel=1e-5)
        assert float(aux.stats["kept_new"].value) == pytest.approx(sum(new) / len(new), rel=1e-5)


def context(tokens: Tensor) -> Ctx:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return Ctx(tokens, positions, None, None, torch.zeros(()), {}, {})


def test_controls_choose_what_their_names_say():
    kept = {}
    for kind in ("random", "fifo", "first", "stride"):
        scores = control(kind, context(torch.arange(64)[None] * 7919 % 101), 0)
        kept[kind] = keys_of(BMojoConfig(ssm=MAMBA2, window=4, m_e=4), [*scores[0].tolist(), 0.0])[64].kept
    assert kept["first"] == [0, 1, 2, 3]
    assert kept["fifo"] == [60, 61, 62, 63]
    assert kept["stride"] == [0, 16, 32, 48]
    assert kept["random"] not in (kept["first"], kept["fifo"], kept["stride"])


def test_random_scores_are_uniform_and_of_their_own():
    """Over positions, tokens and layers; the same for the same token at the same place."""
    tokens = torch.randint(0, 4096, (64, 256))
    score = control("random", context(tokens), 3)
    assert same_bytes(score, control("random", context(tokens), 3))
    assert score.min() >= 0
    assert score.max() < 1
    counts = torch.histc(score, 20, 0, 1) / score.numel()
    assert (counts * 20 - 1).abs().max() < 0.1
    others = (control("random", context(tokens), 4), control("random", context(tokens + 1), 3), score.roll(1, 1))
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack((score.flatten(), other.flatten())))[0, 1])) < 0.05
    constant = control("random", context(torch.zeros(1, 4096, dtype=torch.int64)), 0)
    assert (torch.histc(constant, 8, 0, 1) / 4096 * 8 - 1).abs().max() < 0.2


def test_no_gradient_reaches_the_ssm_through_scores():
    model = build(m_f=0)
    whole(model, stream(2, 20))[0].sum().backward()
    assert all(p.grad is None for p in mixer(model).ssm.parameters())
    assert mixer(model).qkv.weight.grad is not None


# -- time


@EVERY_MODE
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_causal_at_the_edges_of_chunks(train: bool, mode: str):
    """A spike at either side of a boundary moves no earlier output, and no set from before it."""
    W, T = 4, 21
    model, x = build(window=W, fading_mode=mode).train(train), stream(2, T)
    before, _ = whole(model, x)
    _, keys = naive(model, x)
    for j in (1, W - 1, W, 2 * W - 1, 2 * W, 3 * W - 1, T - 1):
        disturbed = x.clone()
        disturbed[:, j] = 1e3 * torch.randn(2, 8, dtype=torch.float64)
        after, _ = whole(model, disturbed)
        assert (after - before)[:, :j].abs().max() <= CAUSAL
        assert (after - before)[:, j].abs().max() > 1e-6
        _, moved = naive(model, disturbed)
        for a, b in zip(keys, moved, strict=True):
            assert [k.kept for k in a[: j // W * W + W]] == [k.kept for k in b[: j // W * W + W]]


@EVERY_MODE
def test_no_derivative_of_the_future(mode: str):
    model, x = build(window=3, fading_mode=mode), stream(1, 14).requires_grad_()
    o, _ = whole(model, x)
    for t in range(14):
        (grad,) = torch.autograd.grad(o[0, t].sum(), x, retain_graph=True)
        assert not grad[0, t + 1 :].any()
        assert grad[0, t].any()


# -- documents


@EVERY_MODE
@EVERY_SSM
def test_packed_is_separate(ssm: str, mode: str):
    """Documents of one token, of none, around the window and over many chunks: the grid of chunks starts anew."""
    model, lengths = build(ssm, fading_mode=mode), [[1, 3, 4, 5, 8, 19], [9, 0, 31]]
    T = 40
    x = stream(2, T).requires_grad_()
    packed, _ = whole(model, x, cu_seqlens=segments(lengths, T, pad_to=12))
    weight = torch.randn_like(packed)
    leaves = [x, *mixer(model).parameters()]
    together = torch.autograd.grad((packed * weight).sum(), leaves)
    alone = torch.zeros_like(packed)
    for row, documents in enumerate(lengths):
        start = 0
        for n in filter(None, documents):
            part = slice(start, start + n)
            alone[row : row + 1, part] = whole(model, x[row : row + 1, part])[0]
            start += n
    assert_close(packed, alone, "forms")
    assert_close(together, torch.autograd.grad((alone * weight).sum(), leaves), "gradient")


# -- bounded state


def section_8(model: Any, s: int) -> int:
    """Bytes of one sequence in one layer, by the parts of the definition; s bytes per element."""
    part, cfg, d = mixer(model), mixer(model).cfg, model.cfg.d_model
    row = 2 * part.kv_heads * part.head_dim * s
    total = states.nbytes(part.ssm.init_state(1, "meta", {4: torch.float32, 2: torch.bfloat16}[s], 1))
    total += cfg.score_k * d * s if cfg.m_e else 0  # the last outputs
    total += (cfg.token_shift - 1) * d * s
    total += cfg.window * row + cfg.m_e * (row + 12) + (4 * cfg.window if cfg.m_e else 0)
    W = cfg.window
    return total + {"chunk": 2 * cfg.m_f, "point": W + 1, "band": 2 * W, "self": 1}[cfg.fading_mode] * row


@torch.no_grad()
@EVERY_MODE
def test_state_is_bounded(mode: str):
    """At 1k and at 64k tokens the same bytes, which the formula says; rows that no token reached are zero, positions -1."""
    for m_e in (5, 0):
        model = build(
            dtype=torch.float32, window=16, m_e=m_e, m_f=3 if mode == "chunk" else 1, fading_mode=mode, kv_heads=1
        )
        want = section_8(model, 4)
        for length in (1, 1024, 65536):
            assert mixer(model).cost(length).state_bytes == want
            assert mixer(model).cost(length, torch.bfloat16).state_bytes == section_8(model, 2)
        state, x = None, stream(1, 4096, dtype=torch.float32)
        for n in (1024, 2048, 1024) + (4096,) * (15 if m_e else 1):
            _, state = pieces(model, x[:, :n], [n], state)
            assert states.nbytes(memory_of(state)) == want
        _, state = pieces(model, x[:, :20], [1] * 20, state)
        assert states.nbytes(memory_of(state)) == want
        fresh = memory_of(pieces(model, x[:, :1], [1])[1])
        assert int((fresh.k != 0).any(-1).sum()) <= 1 + (mode != "chunk")


def test_a_piece_lays_no_more_cells_than_it_needs(monkeypatch: pytest.MonkeyPatch):
    """From the chunk before the first token's to the cell of the next token; where the host may not look, for any start."""
    model, state = build(window=64), build(window=64).init_state(2, 300)
    for n, cells in ((5, 6), (100, 106), (30, 64 + 105 - 64 + 31)):  # from 0, from 5 and from 105, in chunks 0, 0 and 1
        ctx, seen, _ = model.prepare(Batch(torch.ones(2, n, dtype=torch.int64)), state)
        assert ctx.shared[mixer(model)._places_key].line.position.shape == (2, cells)
        state = state._replace(seen=seen)
    monkeypatch.setattr(bmojo_state, "host_may_look", lambda _: False)
    ctx, *_ = model.prepare(Batch(torch.ones(2, 5, dtype=torch.int64)), state)
    assert ctx.shared[mixer(model)._places_key].line.position.shape == (2, 2 * 64 + 5)


@pytest.mark.parametrize("options", [{"fading_mode": mode} for mode in MODES] + [{"pos": "rope_const"}, {"archive": 2}])
def test_without_a_look_at_the_positions(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """What a compiled graph does: every step writes an output's row and turns the chunk, or not, by masks."""
    model, x = build(**options), stream(2, 19)
    looked = pieces(model, x, [6, *[1] * 13])
    for module in (bmojo_state, bmojo_decode):
        monkeypatch.setattr(module, "host_may_look", lambda _: False)
    blind = pieces(model, x, [6, *[1] * 13])
    assert_close(blind[0], looked[0])
    assert_close(memory_of(blind[1])[:7], memory_of(looked[1])[:7])


def test_the_example_of_the_definition():
    """24 layers of width 2048, 32 heads of 64 in bf16, W = 512, m_e = 64, m_f = 1: 113.6 MB of rows at any length."""
    raw = {"kind": "bmojo", "ssm": MAMBA2, "heads": 32, "token_shift": 0}
    part = model_config({"d_model": 2048, "vocab_size": 8, "blocks": {"a": {"mixer": raw}}}).blocks["a"].mixer
    rows = part.window + part.m_e + part.fading_rows
    assert 24 * rows * 2 * 32 * 64 * 2 == pytest.approx(113.6e6, rel=1e-3)


# -- a part of a model


def test_the_selection_is_kept_not_made_again(monkeypatch: pytest.MonkeyPatch):
    """Under activation checkpointing a score that rounds otherwise the second time must not choose anew: the op runs once per layer,
    and a second choice would be another one."""
    case = Case("bmojo", "mixer", {"kind": "bmojo", "ssm": MAMBA2, "heads": 2, "window": 3, "m_e": 2})
    model, batch, calls = case.build().train(), random_batch(2, 20), []
    forward = selection.forward

    def fickle(key: Tensor, *rest: Any) -> Tensor:
        calls.append(0)
        return forward(key if len(calls) <= 2 else -key, *rest)

    monkeypatch.setattr(selection, "forward", fickle)
    said = []
    for recompute in (False, True):
        calls.clear()
        model.recompute = recompute
        model(batch).losses["lm"].backward()
        assert len(calls) == 2
        said.append(gradients(model))
    assert_close(said[1], said[0], "gradient")


def test_the_nested_mixer_speaks_under_its_name():
    """Its losses, their weights, meta with a learning rate of its own, and what it wants committed."""
    rule = {"kind": "mom", "rule": {"kind": "gated_delta", "heads": 1}, "balance_weight": 0.25}
    part = {"kind": "bmojo", "ssm": rule, "heads": 2, "window": 4, "m_e": 2, "ssm_lr": 5.0}
    model = Case("bmojo", "mixer", part).build().train()
    out = model(random_batch(2, 9))
    assert out.losses.keys() == {"lm", "bmojo.ssm.balance"}
    assert model.loss_weights["bmojo.ssm.balance"] == 0.25
    for name, meta in model.meta().items():
        assert meta.lr_mult == (5.0 if ".ssm." in name else 1.0), name
    assert model.meta()["layers.0.mixer.qkv.weight"].splits == (16, 16, 16)


def test_what_the_nested_mixer_writes_comes_back_to_it(monkeypatch: pytest.MonkeyPatch):
    """Under its own names, and the rows that it resets under the layer's."""
    model = build()
    info, heard = CommitInfo(1, 2, seed=0, micro_batches=1, world_size=1), {}

    def commit(writes: Any, _: CommitInfo) -> list[RowReset]:
        heard.update(writes)
        return [RowReset("out.weight", torch.tensor([3]))]

    monkeypatch.setattr(mixer(model).ssm, "commit", commit)
    resets = model.commit({"layers.0.mixer.ssm.mass": Write(torch.ones(2))}, info)
    assert list(heard) == ["mass"]
    assert [(r.name, r.rows.tolist()) for r in resets] == [("layers.0.mixer.ssm.out.weight", [3])]
    assert model.commit({}, info) == []


def test_state_travels(tmp_path: Any):
    """Saved, loaded, branched: each continues as the whole did."""
    case = Case("bmojo", "mixer", {"kind": "bmojo", "ssm": MAMBA2, "heads": 2, "window": 4, "m_e": 3})
    model, tokens = case.build().eval(), random_batch(2, 30).tokens
    want, _, _ = model.features(Batch(tokens))
    _, state, _ = in_pieces(model, tokens[:, :17], [17], 30)
    states.save(state, tmp_path / "state.safetensors")
    loaded = states.load(tmp_path / "state.safetensors", model.init_state(2, 30))
    branch = states.select_rows(loaded, torch.tensor([1, 0, 1]))
    out, _, _ = model.features(Batch(tokens[[1, 0, 1], 17:]), branch)
    assert_close(out, want[[1, 0, 1], 17:], "forms")


REFUSED = [
    ({"ssm": {"kind": "attention"}}, "no linear-time mixer"),
    ({"ssm": {"kind": "mambo"}}, "unknown mixer kind 'mambo'"),
    ({"m_f": 5, "window": 4}, "m_f=5 is more than the window=4"),
    ({"m_f": 2, "fading_mode": "band"}, "says itself how many"),
    ({"window": 0}, "window=0"),
    ({"heads": 4, "kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
    ({"score": "delat"}, "unknown score 'delat'"),
    ({"score": "delta"}, "ssm 'mamba2' is no delta rule"),
    ({"pos": "rope"}, "unknown pos 'rope'"),
    ({"fading_mode": "bands"}, "unknown fading_mode 'bands'"),
    ({"evict_gamma": 0.0}, "evict_gamma must lie in"),
    ({"score_weights": (1.0, 2.0)}, "2 weights for score_k=4"),
    ({"score_k": 2, "score_weights": (0.0, 2.0)}, "must not be negative, and the first one positive"),
    ({"m_e": -1}, "m_e must not be negative"),
    ({"ssm_lr": 0.0}, "ssm_lr must be positive"),
    ({"heads": 3}, "heads=3 does not divide d_model=8"),
    ({"heads": 8, "pos": "rope_true"}, "must be even for rotary"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda o: "-".join(o) if isinstance(o, dict) else "")
def test_refused(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        build(**{"ssm": "mamba2", **options}) if not isinstance(options.get("ssm"), dict) else BMojoConfig(**options)


def test_shrinks():
    big = BMojoConfig(heads=16, kv_heads=4, head_dim=128, m_f=32, fading_mode="chunk")
    tiny = big.tiny()
    assert (tiny.window, tiny.m_f, tiny.m_e, tiny.heads, tiny.kv_heads, tiny.head_dim) == (16, 16, 8, 4, 2, 16)
    assert tiny.ssm.d_state == 16


def test_every_option_changes_something():
    """An option that does nothing is none: the whole function against that of the defaults, with the same weights."""
    x = stream(1, 40)
    base = {"m_e": 3, "window": 4, "qk_norm": False}
    with torch.no_grad():
        plain = build(**base)
        want, _ = whole(plain, x)
        changes = [{"fading_mode": m} for m in MODES[1:]] + [{"m_f": 2}, {"m_f": 0}, {"m_e": 2}, {"dedup": False}]
        changes += [{"score": s} for s in ("innov_l2", "innov_cos", "random", "fifo", "first", "stride")]
        changes += [{"score_k": 1}, {"score_weights": (8.0, 1.0, 1.0, 1.0)}, {"evict_gamma": 0.5}, {"score_floor": 9.0}]
        changes += [{"pos": "rope_const"}, {"pos": "rope_true"}, {"score_debias": True}, {"window": 5}]
        for change in changes:
            model = build(**{**base, **change})
            model.load_state_dict(plain.state_dict(), strict=change != {"m_f": 0})
            assert rel_err(whole(model, x)[0], want) > 1e-4, change
