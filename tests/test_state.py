"""Operations on a state: copies are copies, rows are sequences, a file gives back every bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from models import LM, Batch, UserError
from models import state as states
from tests.cases import MODELS
from tests.tools import assert_close, in_pieces, random_batch, same_bytes

EVERYTHING = next(case for case in MODELS if case.name == "model-everything")


@pytest.fixture
def model() -> LM:
    return EVERYTHING.build().eval()


class Archive:
    """A host object with copy-on-branch, as a part's state may hold."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def clone(self) -> Archive:
        return Archive(self.rows.clone())

    def detach(self) -> Archive:
        return Archive(self.rows.detach())

    def select_rows(self, index: Tensor) -> Archive:
        return Archive(self.rows[index])

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Archive:
        return Archive(tensors["rows"])


class Mixed(NamedTuple):
    s: Tensor
    archive: Any
    nothing: None = None


def mixed() -> Mixed:
    return Mixed(torch.randn(3, 2), Archive(torch.randn(3, 4)))


def test_clone_owns_its_memory():
    state = mixed()
    copy = states.clone(state)
    kept = state.s.clone(), state.archive.rows.clone()
    copy.s.zero_()
    copy.archive.rows.zero_()
    assert same_bytes((state.s, state.archive.rows), kept)


def test_branches_go_their_own_ways(model: LM):
    """One prefix, continued in two ways, equals the two sequences from the start; the prefix stays."""
    tokens = random_batch(2, 9).tokens
    tokens[1, :6] = tokens[0, :6]
    _, prefix, _ = in_pieces(model, tokens[:1, :6], [6], max_len=9)
    before = states.clone(prefix)
    branched = states.select_rows(prefix, torch.tensor([0, 0]))
    h, after, _ = model.features(Batch(tokens[:, 6:]), branched, donate=True)
    whole, end, _ = in_pieces(model, tokens, [9], max_len=9)
    assert_close(h, whole[:, 6:], "forms")
    assert_close(after, end, "forms")
    assert same_bytes(prefix, before)


def test_select_rows_reorders_and_drops():
    state = mixed()
    index = torch.tensor([2, 0, 2, 1])
    picked = states.select_rows(state, index)
    assert same_bytes((picked.s, picked.archive.rows), (state.s[index], state.archive.rows[index]))
    assert len(states.select_rows(state, index[:0]).s) == 0


def test_detach_cuts_the_graph(model: LM):
    _, state, _ = in_pieces(model, random_batch(2, 4).tokens, [4], max_len=4)
    assert any(t.requires_grad for t in tree_leaves(state))
    cut = states.detach(state)
    assert not any(t.requires_grad for t in tree_leaves(cut))
    assert same_bytes(cut, state)


def test_training_goes_on_over_segments(model: LM):
    """A state may be passed in training; with detach between, no gradient crosses."""
    tokens = random_batch(2, 8).tokens
    _, state, _ = model.features(Batch(tokens[:, :4]), model.init_state(2, 8))
    joined, _, _ = model.features(Batch(tokens[:, 4:]), state)
    cut, _, _ = model.features(Batch(tokens[:, 4:]), states.detach(state))
    (through,) = torch.autograd.grad(joined.sum(), model.embed.weight, retain_graph=True)
    (here,) = torch.autograd.grad(cut.sum(), model.embed.weight)
    assert same_bytes(joined, cut)
    only_before = sorted(set(tokens[:, :4].flatten().tolist()) - set(tokens[:, 4:].flatten().tolist()))
    assert through[only_before].any()
    assert not here[only_before].any()


def test_nbytes(model: LM):
    state = Mixed(torch.zeros(3, 2), None)
    assert states.nbytes(state) == 24
    assert states.nbytes(model.init_state(4, 8)) == 4 * states.nbytes(model.init_state(1, 8))


def test_a_file_gives_back_every_bit(model: LM, tmp_path: Path):
    tokens = random_batch(2, 9).tokens
    whole, _, _ = in_pieces(model, tokens, [6, 3], max_len=9)
    _, state, _ = in_pieces(model, tokens[:, :6], [6], max_len=9)
    states.save(state, tmp_path / "s.safetensors", model="toy", tokens=6)
    back = states.load(tmp_path / "s.safetensors", like=model.init_state(1, 4))
    assert same_bytes(back, state)
    assert type(back) is type(state)
    assert states.about(tmp_path / "s.safetensors") == {"model": "toy", "tokens": 6}
    h, _, _ = model.features(Batch(tokens[:, 6:]), back)
    assert same_bytes(h, whole[:, 6:])


def test_host_objects_are_saved_or_refused(tmp_path: Path):
    state, path = mixed(), tmp_path / "s.safetensors"
    states.save(state, path)
    back = states.load(path, like=Mixed(torch.zeros(1, 2), Archive(torch.zeros(1, 4))))
    assert same_bytes((back.s, back.archive.rows), (state.s, state.archive.rows))
    with pytest.raises(UserError, match="a state with a object cannot be saved"):
        states.save(Mixed(torch.zeros(1), object()), path)


def test_a_state_of_another_model_is_refused(model: LM, tmp_path: Path):
    path = tmp_path / "s.safetensors"
    states.save(mixed(), path)
    with pytest.raises(UserError, match="not a state of this model"):
        states.load(path, like=model.init_state(1, 4))
    states.save(model.init_state(1, 4), path)
    with pytest.raises(UserError, match="not a state of this model"):
        states.load(path, like=model.init_state(1, 4)._replace(lookback={}))
    for bad, text in ((tmp_path / "none", None), (tmp_path / "torn", b"12345678 torn")):
        if text:
            bad.write_bytes(text)
        for read in (lambda p: states.load(p, like=()), states.about):
            with pytest.raises(UserError, match=f"cannot read the state in '{bad}'"):
                read(bad)
