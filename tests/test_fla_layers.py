"""Whole models of flash-linear-attention against ours with their weights, read through the importer: logits of a prefill by either
of its kernels, step by step, padded and packed, and every gradient.

Its Mixture-of-Memories sorts with an unstable sort, which loses the order of time, and in training its convolution runs over
the ends of segments; so its sort is made stable here and its layers stay in eval mode, where they compute what the paper says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.tokenizer import ByteTokenizer
from models import LM, Batch
from models.folder import load_model
from models.hf import fla, import_run
from models.hf.weights import from_native
from tests.fla_oracle import fla_module, layers_or_skip
from tests.test_hf_fla import CONFIGS, RECORDED, recorded_tensors, recorded_tokens
from tests.tools import TOLERANCE, assert_close, rel_err

layers_or_skip()
fla_models = fla_module("models")
pytestmark = pytest.mark.slow

SAME = TOLERANCE["same", torch.float32]
VOCAB = ByteTokenizer.vocab_size
TINY = {"hidden_size": 32, "head_dim": 16, "num_heads": 2, "intermediate_size": 48, "vocab_size": VOCAB}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gated_deltanet": ("GatedDeltaNet", {"num_hidden_layers": 2, "expand_v": 2.0}),
    "gated_deltanet_grouped": (
        "GatedDeltaNet",
        {
            "num_hidden_layers": 1,
            "num_v_heads": 4,
            "expand_v": 1.5,
            "use_gate": False,
            "allow_neg_eigval": True,
            "tie_word_embeddings": True,
        },
    ),
    "mom": ("Mom", {"num_hidden_layers": 2, "num_memories": 3}),
    "mom_one_projection": ("Mom", {"num_hidden_layers": 1, "single_kv_proj": True, "topk": 1, "expand_v": 2.0}),
    "mom_routed_only": ("Mom", {"num_hidden_layers": 1, "shared_mem": False, "use_output_gate": False}),
}


@pytest.fixture(scope="module")
def stable_sort():
    """Also under the functions that have bound it already: it is looked up on the tensor."""
    argsort = torch.Tensor.argsort
    torch.Tensor.argsort = lambda self, *args, **kwargs: argsort(self, *args, **{**kwargs, "stable": True})
    yield
    torch.Tensor.argsort = argsort


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, stable_sort: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LM]:
    """(their model with weights off their initial values, ours with the same ones)."""
    name, changes = KINDS[request.param]
    torch.manual_seed(0)
    config = getattr(fla_models, f"{name}Config")(**TINY, **changes)
    theirs = getattr(fla_models, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.2)
    folder: Path = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder / "theirs")
    ByteTokenizer().save(folder / "theirs")
    import_run(folder / "theirs", folder / "run")
    return theirs, load_model(folder / "run")[0]


def tokens_of(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: LM, tokens: Tensor, **fields: Any) -> Tensor:
    found = model(Batch(tokens, **fields)).logits
    assert found is not None
    return found


@pytest.mark.parametrize("length", [21, 70])
@torch.no_grad()
def test_prefill(pair: tuple[Any, LM], length: int):
    """Up to 64 tokens its recurrent kernel runs, then its chunked one."""
    theirs, ours = pair
    tokens = tokens_of(2, length)
    assert rel_err(logits(ours, tokens), theirs(tokens, use_cache=False).logits) < SAME


@torch.no_grad()
def test_step_by_step(pair: tuple[Any, LM]):
    theirs, ours = pair
    tokens = tokens_of(2, 26, seed=1)
    whole = theirs(tokens, use_cache=False).logits
    cache, state = None, ours.init_state(2, 26)
    for start, end in ((0, 19), *((t, t + 1) for t in range(19, 26))):
        got = theirs(tokens[:, start:end], past_key_values=cache, use_cache=True)
        mine = ours(Batch(tokens[:, start:end]), state)
        cache, state = got.past_key_values, mine.state
        assert rel_err(got.logits, whole[:, start:end]) < SAME, "the oracle is not itself"
        assert rel_err(mine.logits, got.logits) < SAME


@torch.no_grad()
def test_left_padding(pair: tuple[Any, LM]):
    theirs, ours = pair
    tokens = tokens_of(2, 20, seed=2)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[1, :7] = False
    want = theirs(tokens, attention_mask=valid.long(), use_cache=False).logits
    assert rel_err(logits(ours, tokens, valid=valid)[valid], want[valid]) < SAME


@torch.no_grad()
def test_packed_documents(pair: tuple[Any, LM]):
    theirs, ours = pair
    tokens = tokens_of(1, 30, seed=3)
    cu_seqlens = torch.tensor([0, 11, 12, 30])
    want = theirs(tokens, cu_seqlens=cu_seqlens, use_cache=False).logits
    positions = torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()])[None]
    assert rel_err(logits(ours, tokens, cu_seqlens=cu_seqlens.int(), positions=positions), want) < SAME


def test_gradients(pair: tuple[Any, LM]):
    """Of every parameter, the router's included, through its backward kernels."""
    theirs, ours = pair
    tokens, weights = tokens_of(2, 37, seed=4), torch.randn(2, 37, VOCAB)
    theirs.zero_grad()
    ours.zero_grad()
    (theirs(tokens, use_cache=False).logits * weights).sum().backward()
    (logits(ours, tokens) * weights).sum().backward()
    there = {name: p.grad for name, p in theirs.named_parameters()}
    want = from_native(there, ours, fla.pieces)
    for name, p in ours.named_parameters():
        assert p.grad is not None, name
        if name.endswith("router.weight") and theirs.config.topk == 1:  # the only weight is 1: rounding on both sides
            assert max(p.grad.abs().max(), want[name].abs().max()) < 1e-5
            continue
        assert_close(p.grad, want[name], "foreign", torch.float32, name)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_recording(kind: str, stable_sort: None):
    """The numbers that stand for the library in `tests.test_hf_fla`: the names, the shapes and the logits are still its own."""
    name = {"gated_deltanet": "GatedDeltaNet", "mom": "Mom"}[kind]
    config = getattr(fla_models, f"{name}Config")(**CONFIGS[kind])
    theirs = getattr(fla_models, f"{name}ForCausalLM")(config).eval()
    theirs.load_state_dict(recorded_tensors(kind))
    want = torch.tensor(RECORDED[kind])
    got = theirs(recorded_tokens(), use_cache=False).logits[:, -1, : want.shape[1]]
    assert rel_err(got, want) < SAME
    missing = set(CONFIGS[kind]) - set(config.to_dict())
    assert not missing, "fields that fla no longer knows"
