"""`ngram_gather`: rows against a loop in integers without end, what a lookback reaches, and values where the rows are."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.ngram_gather import DEAD, gather_rows, ngram_gather, ngram_rows, reference
from tests.tools import same_bytes

pytestmark = pytest.mark.usefixtures("poison")

CLASSES, PAD = 40, 3


class Hash(NamedTuple):
    multipliers: Tensor  # [L, N]
    primes: Tensor  # [L, N-1, K]
    offsets: Tensor


def make_hash(layers: int, order: int, heads: int) -> Hash:
    """Multipliers up to the largest that are allowed, sizes that are no primes: the equations do not ask."""
    bound = (2**63 - 1) // CLASSES // 2
    multipliers = 2 * torch.randint(bound // 2, bound, (layers, order)) + 1
    primes = torch.randint(3, 60, (layers, order - 1, heads))
    flat = primes.flatten(1)
    return Hash(multipliers, primes, (flat.cumsum(1) - flat).view_as(primes))


def tokens(batch: int, time: int, back: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Ids, some DEAD and some too large; a history; documents; padding anywhere."""
    ids, history = (torch.randint(DEAD, CLASSES + 2, (batch, n)) for n in (time, back))
    segments = (torch.rand(batch, time) < 0.3).long().cumsum(1)
    found = {"ids": ids, "history": history, "segments": segments, "valid": torch.rand(batch, time) < 0.7}
    return {name: t.to(device) for name, t in found.items()}


MODES = pytest.mark.parametrize("given", [(), ("segments",), ("valid",), ("segments", "valid")], ids=str)
FIXED: dict[str, Any] = {"classes": CLASSES, "pad": PAD}


def call(given: tuple[str, ...], made: dict[str, Tensor], hashing: Any, table: Tensor | None = None) -> Any:
    kwargs = {name: made[name] for name in given}
    args = made["ids"], made["history"], *hashing
    return ngram_rows(*args, **FIXED, **kwargs) if table is None else ngram_gather(table, *args, **FIXED, **kwargs)


def define(given: tuple[str, ...], made: dict[str, Tensor], hashing: Any) -> Tensor:
    layers = zip(*hashing, strict=True)
    kwargs = {name: made[name] for name in given}
    return torch.stack(
        [reference.recurrent(made["ids"], made["history"], m, p, o, CLASSES, PAD, **kwargs) for m, p, o in layers]
    )


@MODES
@pytest.mark.parametrize(("layers", "order", "heads"), [(1, 2, 1), (2, 3, 8), (3, 5, 3)])
@pytest.mark.parametrize("time", [1, 2, 20])
def test_rows_equal_the_definition(given: tuple[str, ...], layers: int, order: int, heads: int, time: int):
    hashing, made = make_hash(layers, order, heads), tokens(3, time, order - 1)
    rows, _ = call(given, made, hashing)
    assert rows.dtype == torch.int64
    assert torch.equal(rows, define(given, made, hashing))


@MODES
def test_rows_do_not_leave_their_heads(given: tuple[str, ...]):
    """Whatever the ids are: far outside, where products overflow in 64 bits, too."""
    hashing, made = make_hash(2, 4, 3), tokens(4, 30, 3)
    made["ids"][:, ::3] = torch.randint(-(2**62), 2**62, (4, 10))
    rows, _ = call(given, made, hashing)
    low, size = (t.flatten(1)[:, None, None] for t in (hashing.offsets, hashing.primes))
    assert ((rows >= low) & (rows < low + size)).all()


def test_the_history_moves_on_by_valid_tokens():
    hashing = make_hash(1, 3, 2)
    ids, history = torch.tensor([[5, 6, 7], [8, 9, 10], [1, 1, 1]]), torch.tensor([[1, 2], [3, 4], [5, 6]])
    valid = torch.tensor([[True, False, True], [False, False, True], [False, False, False]])
    _, newest = ngram_rows(ids, history, *hashing, **FIXED, valid=valid)
    assert newest.tolist() == [[5, 7], [4, 10], [5, 6]]
    _, newest = ngram_rows(ids[:, :1], history, *hashing, **FIXED)
    assert newest.tolist() == [[2, 5], [4, 8], [6, 1]]


def test_a_farther_token_is_out_of_reach_behind_a_dead_one():
    """The three-gram of (9, DEAD, 7) is that of PAD, PAD, 7."""
    hashing = make_hash(1, 3, 2)
    nothing = torch.full((1, 2), DEAD)
    behind, _ = ngram_rows(torch.tensor([[9, DEAD, 7]]), nothing, *hashing, **FIXED)
    alone, _ = ngram_rows(torch.tensor([[7]]), nothing, *hashing, **FIXED)
    padded, _ = ngram_rows(torch.tensor([[7]]), torch.tensor([[PAD, PAD]]), *hashing, **FIXED)
    assert torch.equal(behind[:, :, 2:], alone)
    assert torch.equal(alone, padded)


@MODES
def test_values_stand_where_the_rows_are(given: tuple[str, ...]):
    hashing, made = make_hash(1, 3, 4), tokens(2, 9, 2)
    table = torch.randn(int(hashing.primes.sum()), 5, dtype=torch.bfloat16)
    values, rows, newest = call(given, made, [h[0] for h in hashing], table)
    expected, history = call(given, made, hashing)
    assert torch.equal(rows, expected[0])
    assert torch.equal(newest, history)
    assert same_bytes(values, table[rows].flatten(2))
    assert same_bytes(gather_rows(table, rows), table[rows])
    assert gather_rows(table, rows[:0]).shape == (0, 9, 8, 5)


@MODES
def test_a_compiled_graph_is_whole_and_equal(given: tuple[str, ...]):
    hashing, made = make_hash(2, 3, 2), tokens(2, 7, 2)
    one = [h[0] for h in hashing]
    table = torch.randn(int(hashing.primes.sum()), 4)

    def run(made: dict[str, Tensor], table: Tensor) -> Any:
        return call(given, made, hashing), call(given, made, one, table), gather_rows(table, made["ids"].clamp(min=0))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert same_bytes(compiled(made, table), run(made, table))


def test_a_table_that_wants_a_gradient_is_refused():
    table = torch.randn(5, 2, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient"):
        gather_rows(table, torch.tensor([1]))
    with torch.no_grad():
        assert same_bytes(gather_rows(table, torch.tensor([1])), table[1:2])


def test_what_does_not_fit_is_named():
    (m, p, o), made = make_hash(1, 3, 2), tokens(2, 4, 2)
    ids, history = made["ids"], made["history"]
    for args, named in (
        ((ids, history, m, p[:, :1], o), "primes"),
        ((ids, history[:, :1], m, p, o), "history"),
        ((ids[:, :0], history, m, p, o), "not empty"),
    ):
        with pytest.raises(ValueError, match=named):
            ngram_rows(*args, **FIXED)
    with pytest.raises(ValueError, match="segments must be"):
        ngram_rows(ids, history, m, p, o, **FIXED, segments=ids[:, :2])


def test_no_triton_form_here_is_said():
    with dispatch.use("triton"), pytest.raises(dispatch.KernelUnavailable, match="on cpu"):
        gather_rows(torch.randn(3, 2), torch.tensor([1]))
