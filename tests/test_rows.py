"""Tables outside the parameters: their gradients, their optimizer, their place in a saved model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from models.folder import load_weights, save_weights
from tests.cases import MODELS
from tests.tools import assert_close, gradients, random_batch, same_bytes, state_hash
from tests.toy_memory import ToyTable


def test_row_gradients_are_those_of_an_embedding():
    """Repeated rows add up; accumulation over two backwards adds up; no gradient is collected under no_grad."""
    table, rows = ToyTable(7, 3), torch.tensor([[4, 1, 4], [4, 6, 1]])
    table.reset(torch.Generator().manual_seed(0))
    weight = table.values.clone().requires_grad_()
    grad = torch.randn(2, 3, 3)
    for part in (slice(0, 1), slice(1, 2)):
        table.fetch(rows[part]).backward(grad[part])
    F.embedding(rows, weight).backward(grad)
    assert weight.grad is not None
    found: Any = table.take_grad()
    taken, values = found
    assert taken.tolist() == [1, 4, 6]
    assert_close(values, weight.grad[taken], "gradient", torch.float32)
    with torch.no_grad():
        assert torch.equal(table.fetch(rows), table.values[rows])
    table.clear_grad()
    assert table.take_grad() is None


def test_a_table_steps_like_adam_on_the_rows_it_touched():
    table = ToyTable(5, 2)
    table.reset(torch.Generator().manual_seed(0))
    before = table.values.clone()
    rows = torch.tensor([1, 3])
    reference = torch.nn.Parameter(before[rows].clone())
    adam = torch.optim.Adam([reference], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(3):
        reference.grad = torch.randn(2, 2)
        table.step(rows, reference.grad, 0.01, 0.9, 0.95, 1e-8)
        adam.step()
    assert_close(table.values[rows], reference.detach(), "forms", torch.float32)
    assert same_bytes(table.values[[0, 2, 4]], before[[0, 2, 4]])
    table.zero_moments(rows)
    assert not table.m.any()
    assert not table.steps.any()


def test_a_loaded_model_finds_its_tables_and_addresses(tmp_path: Path):
    case = next(case for case in MODELS if case.name == "model-everything")
    one, two = case.build(), case.build(seed=8)
    save_weights(one, tmp_path)
    load_weights(two, tmp_path)
    assert state_hash(one) == state_hash(two)
    one(random_batch(2, 5)).losses["lm"].backward()
    assert {name.split(".")[1] for name in gradients(one) if name.endswith("table")} == {"1", "2"}


def test_a_copy_of_a_model_reads_its_own_rows():
    model = next(case for case in MODELS if case.name == "model-everything").build()
    batch = random_batch(2, 5)
    twin, before = copy.deepcopy(model), model(batch).losses["lm"]
    assert torch.equal(twin(batch).losses["lm"], before)
    for table in twin.tables().values():
        table.state_dict()["values"].zero_()
    assert not torch.equal(twin(batch).losses["lm"], before)
    assert torch.equal(model(batch).losses["lm"], before)
