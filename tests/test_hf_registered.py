"""`LociForCausalLM`: every model that no native class can hold, behind transformers' Auto classes and `generate`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import models
from data.tokenizer import ByteTokenizer
from models import Batch, model_config
from models.hf import export_run, load_pretrained
from models.parsing import to_dict
from tests.test_hf import make_run, our_logits, python, random_tokens
from tests.tools import TOLERANCE, rel_err, same_bytes, state_hash

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("models.hf.modeling")

SAME = TOLERANCE["same", torch.float32]
VOCAB = ByteTokenizer.vocab_size
BASE = {"d_model": 32, "n_layers": 2, "vocab_size": VOCAB}
FULL = {"kind": "attention", "heads": 4, "kv_heads": 2}
LOCAL = {**FULL, "window": 5}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        **BASE,
        "max_seq_len": 64,
        "learned_positions": True,
        "norm": "layernorm",
        "norm_bias": True,
        "blocks": {
            "b": {
                "mixer": {"kind": "attention", "heads": 4, "rope_theta": None, "bias": True},
                "channel": {"kind": "gelu", "bias": True},
            }
        },
    },
    "hybrid": {
        **BASE,
        "tied": False,
        "blocks": {
            "local": {"mixer": LOCAL, "channel": {"kind": "swiglu"}},
            "full": {"mixer": FULL, "channel": {"kind": "gelu"}},
        },
        "pattern": ["local", "full"],
    },
    "linear": {  # states of constant size beside a growing one
        **BASE,
        "n_layers": 3,
        "blocks": {
            "delta": {"mixer": {"kind": "gated_delta", "heads": 3}, "channel": {"kind": "swiglu", "hidden": 24}},
            "ssm": {"mixer": {"kind": "mamba2", "head_dim": 16, "d_state": 8}},
            "full": {"mixer": FULL, "channel": {"kind": "gelu"}},
        },
        "pattern": ["delta", "ssm", "full"],
    },
    "relu2": {**BASE, "blocks": {"b": {"mixer": LOCAL, "channel": {"kind": "relu2"}}}, "at": {1: {"channel": None}}},
    "branches": {**BASE, "branches": 2, "blocks": {"b": {"mixer": FULL, "channel": {"kind": "relu2"}}}},
    "toys": {  # a state of its own, a row store, model memory, and a use of `progress`
        **BASE,
        "blocks": {"b": {"mixer": {"kind": "tests.toys:ToyEMA"}, "channel": {"kind": "tests.toys:ToySlots"}}},
        "at": {1: {"memory": {"kind": "tests.toy_memory:ToyHash"}, "mixer": LOCAL}},
    },
}


@pytest.fixture(params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[models.LM, Any, Path]:
    """Our model, and the same one as transformers loads it."""
    ours = make_run(tmp_path / "run", model_config(CONFIGS[request.param]))
    assert export_run(tmp_path / "run", tmp_path / "out") == "LociForCausalLM"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(theirs, modeling.LociForCausalLM)
    assert not theirs.training
    return ours, theirs, tmp_path


def generate(model: Any, tokens: torch.Tensor, new: int = 12, **options: Any) -> torch.Tensor:
    """Only what was generated: [B, new]."""
    fixed = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(tokens, **{**fixed, **options})[:, tokens.shape[1] :]


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(r) for r in rows)
    tokens = torch.stack([F.pad(r, (length - len(r), 0)) for r in rows])
    mask = torch.stack([F.pad(torch.ones_like(r), (length - len(r), 0)) for r in rows])
    return tokens, mask


@torch.no_grad()
def test_weights_and_logits(pair: tuple[models.LM, Any, Path]):
    """The exported weights are ours to the bit under our names, the buffers too, and so is the function."""
    ours, theirs, folder = pair
    assert same_bytes(ours.state_dict(), theirs.lm.state_dict())
    assert state_hash(ours) == state_hash(theirs.lm)
    assert float(theirs.lm.progress) == 1.0
    assert theirs.config.model == json.loads(json.dumps(to_dict(ours.cfg)))
    tokens = random_tokens(2, 13)
    assert torch.equal(theirs(tokens, use_cache=False).logits, our_logits(ours, tokens))
    assert rel_err(theirs(tokens).logits, our_logits(ours, tokens)) < SAME
    again, tokenizer = load_pretrained(folder / "out")
    assert tokenizer == folder / "out"
    assert state_hash(ours) == state_hash(again)


@torch.no_grad()
def test_save_again(pair: tuple[models.LM, Any, Path]):
    """What was loaded can be saved and loaded once more, by either side, also in another dtype."""
    ours, theirs, folder = pair
    theirs.to(torch.bfloat16).save_pretrained(folder / "again")
    assert (folder / "again" / "modeling_loci.py").is_file()
    assert [p.name for p in (folder / "again").glob("*.py")] == ["modeling_loci.py"]
    twice = transformers.AutoModelForCausalLM.from_pretrained(folder / "again")
    assert twice.dtype == torch.bfloat16
    back, _ = load_pretrained(folder / "again")
    assert same_bytes(back.state_dict(), twice.lm.state_dict())
    assert same_bytes(back.state_dict(), ours.to(torch.bfloat16).state_dict())
    assert (folder / "again" / "tables.safetensors").is_file() == bool(ours.tables())


@torch.no_grad()
def test_generate_with_and_without_cache(pair: tuple[models.LM, Any, Path]):
    """Greedy, with a cache, without one, and by the argmax of our own full forward: one continuation."""
    ours, theirs, _ = pair
    tokens = random_tokens(3, 9)
    cached = generate(theirs, tokens)
    assert torch.equal(cached, generate(theirs, tokens, use_cache=False))
    whole = torch.cat((tokens, cached), dim=1)
    assert torch.equal(our_logits(ours, whole)[:, 8:-1].argmax(-1), cached)


@torch.no_grad()
def test_left_padding(pair: tuple[models.LM, Any, Path]):
    """A left-padded batch gives every row what it gives alone, whatever stands in the padding."""
    _, theirs, _ = pair
    rows = [random_tokens(1, n, seed=n)[0] for n in (3, 11, 7)]
    tokens, mask = left_padded(rows)
    garbage = torch.where(mask.bool(), tokens, random_tokens(3, 11, seed=99))
    alone = torch.cat([generate(theirs, row[None]) for row in rows])
    for ids in (tokens, garbage):
        assert torch.equal(generate(theirs, ids, attention_mask=mask), alone)
        assert torch.equal(generate(theirs, ids, attention_mask=mask, use_cache=False), alone)
        logits = theirs(ids, attention_mask=mask).logits[:, -1]
        single = torch.cat([theirs(row[None]).logits[:, -1] for row in rows])
        assert rel_err(logits, single) < SAME


@torch.no_grad()
def test_beam_search(pair: tuple[models.LM, Any, Path]):
    """Beams reorder the state: the same sequences and scores as without a cache, padded rows included."""
    _, theirs, _ = pair
    tokens, mask = left_padded([random_tokens(1, n, seed=n)[0] for n in (4, 9)])
    fixed = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    options = {
        **fixed,
        "num_beams": 4,
        "num_return_sequences": 3,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    cached = theirs.generate(tokens, attention_mask=mask, **options)
    plain = theirs.generate(tokens, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    assert rel_err(cached.sequences_scores, plain.sequences_scores) < SAME
    assert not torch.equal(cached.sequences[:1, 9:], generate(theirs, tokens[:1], 10, attention_mask=mask[:1]))


@torch.no_grad()
def test_sampling(pair: tuple[models.LM, Any, Path]):
    """One seed gives one text with and without a cache; the frequencies are those of our own softmax."""
    ours, theirs, _ = pair
    tokens = random_tokens(1, 6)
    options = {"do_sample": True, "top_k": 0, "temperature": 0.7}
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        drawn.append(generate(theirs, tokens, use_cache=use_cache, num_return_sequences=4, **options))
    assert torch.equal(*drawn)
    assert len({tuple(row.tolist()) for row in drawn[0]}) > 1
    many = generate(theirs, tokens, 1, num_return_sequences=4000, **options)[:, 0]
    want = (our_logits(ours, tokens)[0, -1] / 0.7).softmax(-1)
    got = torch.bincount(many, minlength=VOCAB) / 4000
    top = want.topk(3).indices
    assert ((got - want)[top].abs() < 5 * (want * (1 - want) / 4000).sqrt()[top]).all()


# -- one model is enough for the rest


@pytest.fixture
def hybrid(tmp_path: Path) -> tuple[models.LM, Any, Path]:
    ours = make_run(tmp_path / "run", model_config(CONFIGS["hybrid"]))
    export_run(tmp_path / "run", tmp_path / "out")
    return ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tmp_path


@torch.no_grad()
def test_cache_by_hand(hybrid: tuple[models.LM, Any, Path]):
    """Prefill, several tokens, single tokens: the same logits as one forward; a copied cache is a branch of its own."""
    ours, theirs, _ = hybrid
    tokens = random_tokens(2, 14)
    want = our_logits(ours, tokens)
    out = theirs(tokens[:, :6])
    branch = copy.deepcopy(out.past_key_values)
    cache = out.past_key_values
    for start, end in ((6, 10), (10, 11), (11, 14)):
        out = theirs(tokens[:, start:end], past_key_values=cache)
        assert out.past_key_values is cache
        assert rel_err(out.logits, want[:, start:end]) < SAME
    assert branch.get_seq_length() == 6
    assert rel_err(theirs(tokens[:, 6:], past_key_values=branch).logits, want[:, 6:]) < SAME
    branch.batch_repeat_interleave(2)
    more = random_tokens(4, 3, seed=3)
    deep = our_logits(ours, torch.cat((tokens.repeat_interleave(2, 0), more), 1))[:, 14:]
    assert rel_err(theirs(more, past_key_values=branch).logits, deep) < SAME
    with pytest.raises(NotImplementedError):
        branch.crop(-1)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_cache_grows(hybrid: tuple[models.LM, Any, Path], padded: bool, monkeypatch: pytest.MonkeyPatch):
    """Beyond the room that was made, the state is made anew from the tokens; nothing in the output shows it."""
    ours, theirs, _ = hybrid
    tokens = random_tokens(2, 40)
    mask = torch.ones_like(tokens)
    mask[0, : 4 if padded else 0] = 0
    want = our_logits(ours, tokens, valid=mask.bool())
    cache = modeling.LociCache(max_len=8)
    grown = []
    grow = modeling.LociCache._grow
    monkeypatch.setattr(modeling.LociCache, "_grow", lambda self, *a: (grown.append(a[-1]), grow(self, *a)))
    steps = [(0, 8), *((t, t + 1) for t in range(8, 40))]
    for start, end in steps:
        out = theirs(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        kept = mask[:, start:end].bool()
        assert rel_err(out.logits[kept], want[:, start:end][kept]) < SAME
    assert grown[:2] == [8, 9]
    assert len(grown) < 5


@torch.no_grad()
def test_generate_continues_a_cache(hybrid: tuple[models.LM, Any, Path]):
    """A prefix that was paid for is not read again, whether the ids hold it or not."""
    _, theirs, _ = hybrid
    tokens = random_tokens(2, 12)
    want = generate(theirs, tokens)
    cache = theirs(tokens[:, :8]).past_key_values
    assert torch.equal(generate(theirs, tokens, past_key_values=copy.deepcopy(cache)), want)
    whole = torch.ones_like(tokens)
    rest = generate(theirs, tokens[:, 8:], past_key_values=cache, attention_mask=whole)
    assert torch.equal(rest, want)
    assert torch.equal(generate(theirs, tokens, prefill_chunk_size=5), want)


def test_loss_and_gradients(hybrid: tuple[models.LM, Any, Path]):
    """Labels as transformers means them: shifted inside, -100 left out; the same loss and gradients as ours."""
    ours, theirs, _ = hybrid
    tokens = random_tokens(2, 10)
    labels = tokens.clone()
    labels[0, :4] = -100
    out = theirs(tokens, labels=labels)
    out.loss.backward()
    assert out.past_key_values is None
    loss = ours(Batch(tokens[:, :-1], tokens[:, 1:], labels[:, 1:] != -100)).losses["lm"]
    loss.backward()
    assert rel_err(out.loss, loss) < SAME
    for (name, p), q in zip(ours.named_parameters(), theirs.lm.parameters(), strict=True):
        assert p.grad is not None
        assert rel_err(q.grad, p.grad) < 10 * SAME, name


@torch.no_grad()
def test_a_new_model_is_initialised(hybrid: tuple[models.LM, Any, Path]):
    """from_config gives our initialisation, complete, and a different one from another seed."""
    _, theirs, _ = hybrid
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(transformers.AutoModelForCausalLM.from_config(theirs.config))
    assert same_bytes(made[0].state_dict(), made[1].state_dict())
    assert not torch.equal(made[0].lm.embed.weight, made[2].lm.embed.weight)
    assert abs(float(made[0].lm.embed.weight.std()) - 0.02) < 0.002
    assert float(made[0].lm.progress) == 0.0


def test_refusals(hybrid: tuple[models.LM, Any, Path]):
    _, theirs, folder = hybrid
    tokens = random_tokens(1, 4)
    for options, word in (
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds"),
        ({"position_ids": torch.arange(4)[None]}, "position_ids"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask"),
        ({"past_key_values": transformers.DynamicCache()}, "past_key_values must be a LociCache"),
    ):
        with pytest.raises(ValueError, match=word):
            theirs(tokens, **options)
    with pytest.raises(NotImplementedError):
        theirs.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="stateful"):
        theirs.generate(tokens, assistant_model=theirs, max_new_tokens=4)
    file = folder / "out" / "model.safetensors"
    tensors = load_file(file)
    save_file({k: t for k, t in tensors.items() if "norm" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no tensor '.*norm"):
        transformers.AutoModelForCausalLM.from_pretrained(folder / "out")


def test_beyond_learned_positions(tmp_path: Path):
    make_run(tmp_path / "run", model_config({**CONFIGS["gpt2"], "max_seq_len": 16}))
    export_run(tmp_path / "run", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.max_position_embeddings == 16
    assert generate(model, random_tokens(1, 10), 6).shape == (1, 6)
    with pytest.raises(ValueError, match="longer than the 16 learned positions"):
        generate(model, random_tokens(1, 10), 9)


def test_trusting_the_shim(hybrid: tuple[models.LM, Any, Path]):
    """Another process that never imports us, with trust_remote_code=True; without it, no prompt is waited for."""
    ours, _, folder = hybrid
    tokens = torch.arange(5, 15)[None]
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
out = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
inputs = tokenizer(["abc", "hello"], return_tensors="pt", padding=True)
print(tuple(model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None).shape))
print(type(model).__module__, float(model(torch.arange(5, 15)[None]).logits.double().norm()))
model.save_pretrained(out + "/again")
"""
    shape, line = python(code, folder / "out", HF_HOME=str(folder / "home")).splitlines()
    assert shape == "(2, 9)"
    module, norm = line.split()
    assert module == "models.hf.modeling"
    assert abs(float(norm) / float(our_logits(ours, tokens).double().norm()) - 1) < SAME
    assert [p.name for p in (folder / "out" / "again").glob("*.py")] == ["modeling_loci.py"]


def test_lm_eval_reads_the_export(hybrid: tuple[models.LM, Any, Path]):
    """`lm_eval --model hf` on the exported folder gives the log-likelihoods of our own forward."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    ours, _, folder = hybrid
    judge = HFLM(pretrained=str(folder / "out"), trust_remote_code=True, device="cpu", batch_size=3, dtype="float32")
    pairs = [("The cat", " sat"), ("", "alone"), ("2 + 2 =", " 4, or so"), ("x" * 30, "y")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    got = judge.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (found, _) in zip(pairs, got, strict=True):
        prefix = list(context.encode()) or [256]
        ids = torch.tensor([prefix + list(continuation.encode())])
        logp = our_logits(ours, ids)[0].log_softmax(-1)
        want = sum(float(logp[i - 1, ids[0, i]]) for i in range(len(prefix), ids.shape[1]))
        assert abs(found - want) < 1e-4 * max(1, abs(want))
    request = Instance("generate_until", {}, ("The cat", {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}), 0)
    (text,) = judge.generate_until([request], disable_tqdm=True)
    assert isinstance(text, str)
