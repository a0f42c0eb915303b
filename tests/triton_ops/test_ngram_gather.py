"""The kernels of `ngram_gather` against the reference, to the bit: every mode of the hash, odd widths, tables in host memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import dispatch
from kernels.ngram_gather import gather_rows
from tests.ops.test_ngram_gather import MODES, Hash, call, define, make_hash, tokens
from tests.tools import same_bytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@MODES
@pytest.mark.parametrize("time", [1, 63, 65, 500])
def test_rows(given: tuple[str, ...], time: int, device: torch.device):
    hashing, made = make_hash(2, 4, 3), tokens(2, time, 3, device)
    count = dispatch.counts["ngram_gather", "triton"]
    rows, _ = call(given, made, Hash(*(t.to(device) for t in hashing)))
    assert dispatch.counts["ngram_gather", "triton"] == count + 1
    on_host = {name: t.cpu() for name, t in made.items()}
    assert torch.equal(rows.cpu(), define(given, on_host, hashing))


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 16, 80, 200])
def test_values(given: tuple[str, ...], width: int, dtype: torch.dtype, device: torch.device):
    hashing, made = make_hash(1, 3, 4), tokens(2, 37, 2, device)
    table = torch.randn(int(hashing.primes.sum()), width, device=device).to(dtype)
    values, rows, _ = call(given, made, [t[0].to(device) for t in hashing], table)
    with dispatch.use("reference"):
        expected = call(given, made, [t[0].to(device) for t in hashing], table)
    assert torch.equal(rows, expected[1])
    assert same_bytes(values, expected[0])
    assert same_bytes(gather_rows(table, rows), table[rows])


def test_a_row_that_the_table_does_not_have_reads_as_zeros(device: torch.device):
    table, rows = torch.randn(4, 3, device=device), torch.tensor([[-1, 3], [4, 2**40]], device=device)
    found = gather_rows(table, rows)
    assert torch.equal(found[0, 1], table[3])
    assert not torch.stack([found[0, 0], found[1, 0], found[1, 1]]).any()


def test_rows_of_another_layout(device: torch.device):
    """Every other column of a wider table, rows that do not adjoin."""
    table, rows = torch.randn(9, 10, device=device)[:, ::2], torch.randint(0, 9, (6, 4), device=device).T
    assert same_bytes(gather_rows(table, rows), table[rows])


@pytest.mark.parametrize("given", [(), ("segments", "valid")], ids=str)
def test_a_compiled_graph_is_whole_and_equal(given: tuple[str, ...], device: torch.device):
    hashing, made = Hash(*(t.to(device) for t in make_hash(2, 3, 2))), tokens(2, 7, 2, device)
    one = [h[0] for h in hashing]
    table = torch.randn(int(hashing.primes.sum()), 4, dtype=torch.bfloat16, device=device)

    def run(made: dict[str, torch.Tensor], table: torch.Tensor) -> Any:
        return call(given, made, hashing), call(given, made, one, table), gather_rows(table, made["ids"].clamp(min=0))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert same_bytes(compiled(made, table), run(made, table))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: only there is a table elsewhere")
def test_a_table_in_pinned_host_memory(device: torch.device):
    hashing, made = make_hash(1, 3, 4), tokens(2, 37, 2, device)
    hashed = [t[0].to(device) for t in hashing]
    table = torch.randn(int(hashing.primes.sum()), 80, dtype=torch.bfloat16)
    values, rows, _ = call((), made, hashed, table.pin_memory())
    assert values.device == rows.device == hashed[0].device
    assert same_bytes(values, table[rows.cpu()].flatten(2))
    assert same_bytes(gather_rows(table.pin_memory(), rows), table[rows.cpu()])
    with pytest.raises(dispatch.KernelUnavailable, match="not pinned"):
        gather_rows(table, rows)
