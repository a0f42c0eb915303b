"""The kernels of attention over a window and memory; algebra as in ``reference``.

A tile of queries lies in one chunk, so that all its rows share one set of kept rows. Rows are counted from the tile's first: a key
at -3 stands three rows before it, and ``age`` is how far a query is behind a key. Two kinds of keys are left: a band, where ages
from LAG up to LAG + REACH - 1 are seen (the window, and fading rows but for those of chunks), and the rows of a chunk. Exponentials
have base 2, and the scale that scores are multiplied by holds log2(e); what is stored is in natural logarithms.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (the checker takes what Triton compiles for Python)

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton import chunk_of_slot, load_tile, segment_rows, store_tile

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(
    cu, tile, rows, time, segments, W: tl.constexpr, B: tl.constexpr, VARLEN: tl.constexpr, SEARCH: tl.constexpr
):  # fmt: skip
    """-> (slot, place of the tile's first row in the chunk, that row, rows of the tile, rows of the segment before it, those from
    it on, whether the tile has rows of a segment at all)."""
    per: tl.constexpr = (W + B - 1) // B
    slot, offset = tile // per, tile % per * B
    segment, start, end = chunk_of_slot(cu, slot, segments, rows, time, W, VARLEN, SEARCH)
    first, _, _ = segment_rows(cu, segment, segments, rows, time, W, VARLEN)
    row = start + offset
    after = (end - row).to(tl.int32)
    count = tl.minimum(after, W - offset)
    return slot, offset, row, count, (row - first).to(tl.int32), after, (count > 0) & (segment < segments)


@triton.jit
def _softmax_step(acc, peak, mass, s, values, PRECISION: tl.constexpr):
    """Some more keys, s [BM, BN] in logarithms of base 2, -inf: not seen."""
    top = tl.maximum(peak, tl.max(s, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s - base[:, None])
    fade = tl.exp2(peak - base)
    acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    return acc, top, mass * fade + tl.sum(p, 1)


@triton.jit
def _in_band(r, at, before, after, LAG: tl.constexpr, REACH: tl.constexpr):
    """Which of the keys ``at`` the queries ``r`` see; the two broadcast."""
    age = r - at
    return (age >= LAG) & (age < LAG + REACH) & (at >= -before) & (at < after)


@triton.jit
def _read_band(
    acc, peak, mass, q, k, v, first, last, before, after, scale,
    SK: tl.constexpr, SV: tl.constexpr, LAG: tl.constexpr, REACH: tl.constexpr, MASKED: tl.constexpr,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys ``first`` .. ``last`` - 1; all are seen by all unless MASKED."""
    r, n, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    for j in range(first, last, BN):
        at = j + n
        here = tl.full((BN,), 1, tl.int1)
        if MASKED:
            here = (at >= -before) & (at < after)
        keys = load_tile(k, SK, at, here, d, K, K == BK)
        s = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        if MASKED:
            s = tl.where(_in_band(r[:, None], at[None, :], before, after, LAG, REACH), s, float("-inf"))
        values = load_tile(v, SV, at, here, d, K, K == BK)
        acc, peak, mass = _softmax_step(acc, peak, mass, s, values, PRECISION)
    return acc, peak, mass


@triton.jit
def _read_whole_band(
    acc, peak, mass, q, k, v, before, after, alive, scale,
    SK: tl.constexpr, SV: tl.constexpr, LAG: tl.constexpr, REACH: tl.constexpr,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Masks stand where the band begins and where it ends; what lies between is seen by the whole tile."""
    oldest = -before  # of the segment
    end = tl.where(alive, tl.minimum(after, BM - LAG), oldest)
    if REACH >= BM and BM % BN == 0 and REACH % BN == 0 and LAG % BN == 0:
        whole = tl.maximum(BM - LAG - REACH, oldest)
        newest = tl.minimum(tl.maximum(-LAG, oldest), end)
        first = tl.minimum(tl.maximum(-LAG - REACH, oldest), end)
        acc, peak, mass = _read_band(
            acc, peak, mass, q, k, v, first, tl.minimum(whole, newest), before, after, scale,
            SK, SV, LAG, REACH, True, K, BM, BN, BK, PRECISION,
        )  # fmt: skip
        acc, peak, mass = _read_band(
            acc, peak, mass, q, k, v, whole, newest, before, after, scale,
            SK, SV, LAG, REACH, False, K, BM, BN, BK, PRECISION,
        )  # fmt: skip
        acc, peak, mass = _read_band(
            acc, peak, mass, q, k, v, newest, end, before, after, scale,
            SK, SV, LAG, REACH, True, K, BM, BN, BK, PRECISION,
        )  # fmt: skip
    else:
        acc, peak, mass = _read_band(
            acc, peak, mass, q, k, v, tl.maximum(1 - LAG - REACH, oldest), end, before, after, scale,
            SK, SV, LAG, REACH, True, K, BM, BN, BK, PRECISION,
        )  # fmt: skip
    return acc, peak, mass


@triton.jit
def _kept_rows(
    index, since, j, first, W: tl.constexpr, M: tl.constexpr, B: tl.constexpr, GATHER: tl.constexpr, SINCE: tl.constexpr
):  # fmt: skip
    """Kept rows j .. j + B - 1 of a chunk -> (rows of the table, which there are, the first place in the chunk that sees each).
    GATHER: ``index`` names them; else they are rows ``first`` and on."""
    e = j + tl.arange(0, B)
    here = e < M
    at = first + e.to(tl.int64)
    if GATHER:
        at = tl.load(index + e, mask=here, other=-1).to(tl.int64)
        here = at >= 0
    from_ = tl.zeros((B,), tl.int32)
    if SINCE:
        from_ = tl.load(since + e, mask=e < M, other=W).to(tl.int32)
    return at, here, tl.where(here, from_, W)


@triton.jit
def _read_kept(
    acc, peak, mass, q, k, v, index, since, first, count, offset, scale,
    SK: tl.constexpr, SV: tl.constexpr, M: tl.constexpr, GATHER: tl.constexpr, SINCE: tl.constexpr,
    W: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first ``count`` of a chunk's M rows."""
    place, d = offset + tl.arange(0, BM), tl.arange(0, BK)
    for j in range(0, count, B):
        at, here, from_ = _kept_rows(index, since, j, first, W, M, B, GATHER, SINCE)
        keys = load_tile(k, SK, at, here, d, K, K == BK)
        s = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        # A place past the chunk's end is no query: nothing is seen from there.
        s = tl.where((from_[None, :] <= place[:, None]) & (place < W)[:, None], s, float("-inf"))
        values = load_tile(v, SV, at, here, d, K, K == BK)
        acc, peak, mass = _softmax_step(acc, peak, mass, s, values, PRECISION)
    return acc, peak, mass


@triton.jit(do_not_specialize=["rows", "time", "segments"])
def forward(
    q, k, v, memory_q, table_k, table_v, fading_k, fading_v, index, since, cu, o, lse, rows, time, segments, scale,
    SQ: tl.constexpr, SK: tl.constexpr, SV: tl.constexpr, SM: tl.constexpr, STK: tl.constexpr, STV: tl.constexpr,
    SFK: tl.constexpr, SFV: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, W: tl.constexpr, TWO: tl.constexpr,
    KEPT: tl.constexpr, SINCE: tl.constexpr, FADING: tl.constexpr, LAG: tl.constexpr, REACH: tl.constexpr,
    VARLEN: tl.constexpr, SEARCH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of BM queries of a chunk, head). TWO: the memory has a query of its own. KEPT, FADING: eidetic and fading rows
    of a chunk; REACH: that of fading rows that stand in a band. 0: there are none."""
    slot, offset, row, count, before, after, alive = _place(
        cu, tl.program_id(0), rows, time, segments, W, BM, VARLEN, SEARCH
    )  # fmt: skip
    head = tl.program_id(1)
    kv = head // GROUP * K
    r, d = tl.arange(0, BM), tl.arange(0, BK)
    live = r < count
    scale *= _LOG2E
    acc = tl.zeros((BM, BK), tl.float32)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    mine = load_tile(q + row * SQ + head * K, SQ, r, live, d, K, K == BK)
    acc, peak, mass = _read_whole_band(
        acc, peak, mass, mine, k + row * SK + kv, v + row * SV + kv, before, after, alive, scale,
        SK, SV, 0, W, K, BM, BN, BK, PRECISION,
    )  # fmt: skip
    if TWO:
        mine = load_tile(memory_q + row * SM + head * K, SM, r, live, d, K, K == BK)
    if REACH:
        acc, peak, mass = _read_whole_band(
            acc, peak, mass, mine, fading_k + row * SFK + kv, fading_v + row * SFV + kv, before, after, alive, scale,
            SFK, SFV, LAG, REACH, K, BM, BN, BK, PRECISION,
        )  # fmt: skip
    if FADING:
        some = tl.where(alive & (before >= W), FADING, 0)
        acc, peak, mass = _read_kept(
            acc, peak, mass, mine, fading_k + kv, fading_v + kv, index, since, slot.to(tl.int64) * FADING, some,
            offset, scale, SFK, SFV, FADING, False, False, W, K, BM, BF, BK, PRECISION,
        )  # fmt: skip
    if KEPT:
        start = slot.to(tl.int64) * KEPT
        acc, peak, mass = _read_kept(
            acc, peak, mass, mine, table_k + kv, table_v + kv, index + start, since + start, 0,
            tl.where(alive, KEPT, 0), offset, scale,
            STK, STV, KEPT, True, SINCE, W, K, BM, BE, BK, PRECISION,
        )  # fmt: skip
    some = mass > 0
    mass = tl.where(some, mass, 1.0)
    total = tl.where(some, (peak + tl.log2(mass)) / _LOG2E, float("-inf"))
    tl.store(lse + row * H + head + r * H, total, mask=live)
    store_tile(o + (row * H + head) * K, H * K, r, live, d, acc / mass[:, None], K, K == BK)


@triton.jit
def _pull(dq, q, up, total, drop, keys, values, seen, scale, PRECISION: tl.constexpr):
    """dq + dS K over some keys, where they are ``seen`` [BM, BN]."""
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    p = tl.where(seen, tl.exp2(s - total[:, None]), 0.0)
    ds = p * (tl.dot(up, tl.trans(values), input_precision=PRECISION) - drop[:, None])
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)


@triton.jit
def _pull_band(
    dq, q, up, total, drop, k, v, before, after, alive, scale,
    SK: tl.constexpr, SV: tl.constexpr, LAG: tl.constexpr, REACH: tl.constexpr,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    r, n, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    first = tl.maximum(1 - LAG - REACH, -before)
    for j in range(first, tl.where(alive, tl.minimum(after, BM - LAG), first), BN):
        at = j + n
        here = at < after
        keys, values = load_tile(k, SK, at, here, d, K, K == BK), load_tile(v, SV, at, here, d, K, K == BK)
        seen = _in_band(r[:, None], at[None, :], before, after, LAG, REACH)
        dq = _pull(dq, q, up, total, drop, keys, values, seen, scale, PRECISION)
    return dq


@triton.jit
def _pull_kept(
    dq, q, up, total, drop, k, v, index, since, first, count, offset, scale,
    SK: tl.constexpr, SV: tl.constexpr, M: tl.constexpr, GATHER: tl.constexpr, SINCE: tl.constexpr,
    W: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, B: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    place, d = offset + tl.arange(0, BM), tl.arange(0, BK)
    for j in range(0, count, B):
        at, here, from_ = _kept_rows(index, since, j, first, W, M, B, GATHER, SINCE)
        keys, values = load_tile(k, SK, at, here, d, K, K == BK), load_tile(v, SV, at, here, d, K, K == BK)
        seen = (from_[None, :] <= place[:, None]) & (place < W)[:, None]
        dq = _pull(dq, q, up, total, drop, keys, values, seen, scale, PRECISION)
    return dq


@triton.jit(do_not_specialize=["rows", "time", "segments"])
def query_gradient(
    q, k, v, memory_q, table_k, table_v, fading_k, fading_v, index, since, cu, o, lse, do, dq, d_memory_q, drops,
    rows, time, segments, scale,
    SQ: tl.constexpr, SK: tl.constexpr, SV: tl.constexpr, SM: tl.constexpr, STK: tl.constexpr, STV: tl.constexpr,
    SFK: tl.constexpr, SFV: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, W: tl.constexpr, TWO: tl.constexpr,
    KEPT: tl.constexpr, SINCE: tl.constexpr, FADING: tl.constexpr, LAG: tl.constexpr, REACH: tl.constexpr,
    VARLEN: tl.constexpr, SEARCH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs and flags as of ``forward``. Writes rowsum(dO * O) too, for those that come after it."""
    slot, offset, row, count, before, after, alive = _place(
        cu, tl.program_id(0), rows, time, segments, W, BM, VARLEN, SEARCH
    )  # fmt: skip
    head = tl.program_id(1)
    kv, here = head // GROUP * K, row * H + head
    r, d = tl.arange(0, BM), tl.arange(0, BK)
    live = r < count
    base2 = scale * _LOG2E
    up = load_tile(do + here * K, H * K, r, live, d, K, K == BK)
    said = load_tile(o + here * K, H * K, r, live, d, K, K == BK)
    drop = tl.sum(up.to(tl.float32) * said.to(tl.float32), 1)
    tl.store(drops + here + r * H, drop, mask=live)
    total = tl.load(lse + here + r * H, mask=live, other=float("inf")) * _LOG2E
    mine = load_tile(q + row * SQ + head * K, SQ, r, live, d, K, K == BK)
    acc = tl.zeros((BM, BK), tl.float32)
    acc = _pull_band(
        acc, mine, up, total, drop, k + row * SK + kv, v + row * SV + kv, before, after, alive, base2,
        SK, SV, 0, W, K, BM, BN, BK, PRECISION,
    )  # fmt: skip
    if TWO:
        store_tile(dq + here * K, H * K, r, live, d, acc * scale, K, K == BK)
        acc = tl.zeros((BM, BK), tl.float32)
        mine = load_tile(memory_q + row * SM + head * K, SM, r, live, d, K, K == BK)
    if REACH:
        acc = _pull_band(
            acc, mine, up, total, drop, fading_k + row * SFK + kv, fading_v + row * SFV + kv, before, after, alive,
            base2, SFK, SFV, LAG, REACH, K, BM, BN, BK, PRECISION,
        )  # fmt: skip
    if FADING:
        some = tl.where(alive & (before >= W), FADING, 0)
        acc = _pull_kept(
            acc, mine, up, total, drop, fading_k + kv, fading_v + kv, index, since, slot.to(tl.int64) * FADING, some,
            offset, base2, SFK, SFV, FADING, False, False, W, K, BM, BF, BK, PRECISION,
        )  # fmt: skip
    if KEPT:
        start = slot.to(tl.int64) * KEPT
        acc = _pull_kept(
            acc, mine, up, total, drop, table_k + kv, table_v + kv, index + start, since + start, 0,
            tl.where(alive, KEPT, 0), offset, base2,
            STK, STV, KEPT, True, SINCE, W, K, BM, BE, BK, PRECISION,
        )  # fmt: skip
    if TWO:
        dq = d_memory_q
    store_tile(dq + here * K, H * K, r, live, d, acc * scale, K, K == BK)


@triton.jit
def _push(dk, dv, keys, values, q, up, total, drop, seen, scale, PRECISION: tl.constexpr):
    """dk + dS^T Q and dv + P^T dO over some queries; ``seen`` [BN, BM]. Transposed products are made directly."""
    s = tl.dot(keys, tl.trans(q), input_precision=PRECISION) * scale
    p = tl.where(seen, tl.exp2(s - total[None, :]), 0.0)
    dv = tl.dot(p.to(up.dtype), up, dv, input_precision=PRECISION)
    ds = p * (tl.dot(values, tl.trans(up), input_precision=PRECISION) - drop[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def _add_kept(
    dk, dv, kept_k, kept_v, starts, order, here, head, HKV: tl.constexpr, K: tl.constexpr, B: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """What the chunks that kept B rows have for them: entries starts[i] .. starts[i + 1] - 1 of ``order`` are places in kept_k and
    kept_v [., Hkv, K]. Added in that order."""
    # Columns of one entry, not rows: triton 3.7 cannot lay out a gather whose mask came from memory as a row.
    n, d = tl.arange(0, B)[:, None], tl.arange(0, BK)[None, :]
    first = tl.load(starts + n, mask=here[:, None], other=0).to(tl.int32)
    last = tl.load(starts + n + 1, mask=here[:, None], other=0).to(tl.int32)
    for i in range(tl.max(tl.max(last - first, 1), 0)):
        some = first + i < last
        at = tl.load(order + (first + i), mask=some, other=0).to(tl.int64) * HKV + head
        dk += tl.load(kept_k + (at * K + d), mask=some & (d < K), other=0.0)
        dv += tl.load(kept_v + (at * K + d), mask=some & (d < K), other=0.0)
    return dk, dv


@triton.jit(do_not_specialize=["rows", "time", "segments"])
def band_gradient(
    q, k, v, cu, lse, do, drops, kept_k, kept_v, starts, order, dk, dv, rows, time, segments, scale,
    SQ: tl.constexpr, SK: tl.constexpr, SV: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, W: tl.constexpr, LAG: tl.constexpr, REACH: tl.constexpr,
    ADD: tl.constexpr, VARLEN: tl.constexpr, SEARCH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of BN keys of a chunk, key head). ADD: chunks kept some of these rows too."""
    _, _, row, count, _, after, alive = _place(
        cu, tl.program_id(0), rows, time, segments, W, BN, VARLEN, SEARCH
    )  # fmt: skip
    head = tl.program_id(1)
    HKV: tl.constexpr = H // GROUP
    m, n, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    here = n < count
    keys = load_tile(k + row * SK + head * K, SK, n, here, d, K, K == BK)
    values = load_tile(v + row * SV + head * K, SV, n, here, d, K, K == BK)
    d_keys, d_values = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
    # The last key of the tile that there is, is the last whose queries are asked for.
    end = tl.where(alive, tl.minimum(after, count - 1 + LAG + REACH), LAG)
    for g in range(GROUP):
        mine = head * GROUP + g
        for j in range(LAG, end, BM):
            r = j + m
            live = r < after
            query = load_tile(q + row * SQ + mine * K, SQ, r, live, d, K, K == BK)
            up = load_tile(do + (row * H + mine) * K, H * K, r, live, d, K, K == BK)
            total = tl.load(lse + row * H + mine + r * H, mask=live, other=float("inf")) * _LOG2E
            drop = tl.load(drops + row * H + mine + r * H, mask=live, other=0.0)
            age = r[None, :] - n[:, None]
            seen = (age >= LAG) & (age < LAG + REACH)
            d_keys, d_values = _push(
                d_keys, d_values, keys, values, query, up, total, drop, seen, scale * _LOG2E, PRECISION
            )  # fmt: skip
    d_keys *= scale
    if ADD:
        d_keys, d_values = _add_kept(
            d_keys, d_values, kept_k, kept_v, starts + row, order, here, head, HKV, K, BN, BK
        )  # fmt: skip
    store_tile(dk + (row * HKV + head) * K, HKV * K, n, here, d, d_keys, K, K == BK)
    store_tile(dv + (row * HKV + head) * K, HKV * K, n, here, d, d_values, K, K == BK)


@triton.jit(do_not_specialize=["rows", "time", "segments"])
def kept_gradient(
    q, k, v, index, since, cu, lse, do, drops, dk, dv, rows, time, segments, scale,
    SQ: tl.constexpr, SK: tl.constexpr, SV: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
    M: tl.constexpr, GATHER: tl.constexpr, SINCE: tl.constexpr, VARLEN: tl.constexpr, SEARCH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (slot, key head, tile of BN of its M rows): dk, dv [G, M, Hkv, K], zeros for a slot without queries. GATHER: eidetic
    rows; else fading ones, which a segment's first chunk does not see."""
    slot, _, row, count, before, _, alive = _place(
        cu, tl.program_id(0), rows, time, segments, W, W, VARLEN, SEARCH
    )  # fmt: skip
    head, tile = tl.program_id(1), tl.program_id(2) * BN
    HKV: tl.constexpr = H // GROUP
    m, n, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    start = slot.to(tl.int64) * M
    at, here, from_ = _kept_rows(index + start, since + start, tile, start, W, M, BN, GATHER, SINCE)
    keys = load_tile(k + head * K, SK, at, here, d, K, K == BK)
    values = load_tile(v + head * K, SV, at, here, d, K, K == BK)
    d_keys, d_values = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BK), tl.float32)
    if not GATHER:
        alive = alive & (before >= W)
    end = tl.where(alive, count, 0)
    for g in range(GROUP):
        mine = head * GROUP + g
        for j in range(0, end, BM):
            r = j + m
            live = r < count
            query = load_tile(q + row * SQ + mine * K, SQ, r, live, d, K, K == BK)
            up = load_tile(do + (row * H + mine) * K, H * K, r, live, d, K, K == BK)
            total = tl.load(lse + row * H + mine + r * H, mask=live, other=float("inf")) * _LOG2E
            drop = tl.load(drops + row * H + mine + r * H, mask=live, other=0.0)
            seen = from_[:, None] <= r[None, :]
            d_keys, d_values = _push(
                d_keys, d_values, keys, values, query, up, total, drop, seen, scale * _LOG2E, PRECISION
            )  # fmt: skip
    start += tile
    inside = tile + n < M
    store_tile(dk + (start * HKV + head) * K, HKV * K, n, inside, d, d_keys * scale, K, K == BK)
    store_tile(dv + (start * HKV + head) * K, HKV * K, n, inside, d, d_values, K, K == BK)


@triton.jit(do_not_specialize=["rows"])
def pool_gradient(
    kept_k, kept_v, starts, order, dk, dv, rows,
    HKV: tl.constexpr, K: tl.constexpr, B: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (tile of B rows of a pool, key head)."""
    first, head = tl.program_id(0).to(tl.int64) * B, tl.program_id(1)
    n, d = tl.arange(0, B), tl.arange(0, BK)
    here = n < rows - first
    d_keys, d_values = _add_kept(
        tl.zeros((B, BK), tl.float32), tl.zeros((B, BK), tl.float32), kept_k, kept_v, starts + first, order, here,
        head, HKV, K, B, BK,
    )  # fmt: skip
    store_tile(dk + (first * HKV + head) * K, HKV * K, n, here, d, d_keys, K, K == BK)
    store_tile(dv + (first * HKV + head) * K, HKV * K, n, here, d, d_values, K, K == BK)
