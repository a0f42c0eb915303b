"""The backbone: another library's GPT-2, config errors, amendments, dropout, recomputing, branches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import models
from models import Batch, ModelConfig, UserError, model_config, zoo
from models.config import BlockConfig
from models.lm import _keep_selections
from models.parsing import load_yaml, to_dict
from models.residual import sinkhorn
from tests.cases import MODELS
from tests.tools import assert_close, gradients, in_pieces, random_batch, rel_err, same_bytes, spread, state_hash

ATTENTION = {"kind": "attention", "heads": 2}


def raw(**changes: Any) -> dict[str, Any]:
    block = {"mixer": ATTENTION, "channel": {"kind": "swiglu", "hidden": 8}}
    return {"d_model": 8, "n_layers": 4, "vocab_size": 13, "blocks": {"a": block}, **changes}


def build(**changes: Any) -> models.LM:
    return models.build(model_config(raw(**changes)))


# -- another library's model


def test_gpt2_is_gpt2():
    """Learned positions, LayerNorm, bias-free linear layers, tied head: the logits of transformers' GPT-2."""
    transformers = pytest.importorskip("transformers")
    D, H, L, V, T, W = 32, 4, 3, 61, 24, 48
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=V, n_positions=T, n_embd=D, n_layer=L, n_head=H, n_inner=W)
    ).eval()
    block = {
        "mixer": {"kind": "attention", "heads": H, "rope_theta": None},
        "channel": {"kind": "gelu", "hidden": W, "approximate": "tanh"},
    }
    norm = {"norm": "layernorm", "norm_bias": True, "learned_positions": True, "max_seq_len": T}
    ours = build(d_model=D, n_layers=L, vocab_size=V, blocks={"a": block}, **norm)
    spread(ours)
    names = {"embed": "wte", "position": "wpe", "norm": "ln_f"}
    inner = {
        "mixer.norm": "ln_1",
        "mixer.qkv": "attn.c_attn",
        "mixer.out": "attn.c_proj",
        "channel.norm": "ln_2",
        "channel.up": "mlp.c_fc",
        "channel.down": "mlp.c_proj",
    }
    names |= {f"layers.{i}.{k}": f"h.{i}.{v}" for i in range(L) for k, v in inner.items()}
    state = {n: torch.zeros_like(p) for n, p in theirs.named_parameters() if n.endswith("bias")}
    for name, p in ours.named_parameters():
        module, _, leaf = name.rpartition(".")
        transposed = "c_" in names[module]  # their Conv1D holds [in, out]
        state[f"transformer.{names[module]}.{leaf}"] = p.detach().T if transposed else p.detach()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] or not missing
    assert not unexpected
    tokens = random_batch(2, T, V).tokens
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert_close(ours.eval()(Batch(tokens)).logits, expected, "foreign", torch.float32)
        h, _, _ = in_pieces(ours, tokens, [5] + [1] * (T - 5), max_len=T)
        assert_close(ours.logits(h), expected, "foreign", torch.float32)


# -- configuration


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"n_layers": 4, "pattern": ["a", "a", "a"]},
            "model: pattern of 3 blocks does not divide n_layers=4; nearest: 3 or 6",
        ),
        ({"n_layer": 3}, "unknown key 'model.n_layer'; did you mean 'n_layers'?"),
        ({"blocks": {"a": {"mixr": None}}}, "unknown key 'model.blocks.a.mixr'; did you mean 'mixer'?"),
        (
            {"blocks": {"a": {"mixer": {"kind": "attention", "head": 2}}}},
            "'model.blocks.a.mixer.head'; did you mean 'heads'?",
        ),
        (
            {"blocks": {"a": {"mixer": {"kind": "atention"}}}},
            "unknown mixer kind 'atention'; did you mean 'attention'?",
        ),
        (
            {"blocks": {"a": {"channel": {"hidden": 3}}}},
            "model.blocks.a.channel: missing 'kind'; valid: gelu, gmt, moe, relu2, structured_ffn, swiglu",
        ),
        ({"blocks": {"a": {"channel": "swiglu"}}}, "expected a mapping with a kind, got 'swiglu'"),
        ({"blocks": {}}, "model: blocks: at least one named block is needed"),
        ({"blocks": {"a": {}, "b": {}}}, "pattern: needed to choose between the blocks a, b"),
        ({"pattern": ["b"]}, "pattern: no block 'b'"),
        ({"at": {4: {"mixer": None}}}, "model: at: no layer 4; valid: 0 to 3"),
        ({"at": {1: {"chanel": None}}}, "unknown key 'at.1.chanel'; did you mean 'channel'?"),
        ({"at": {1: "relu2"}}, "at.1: expected a mapping of memory, mixer, channel, got 'relu2'"),
        ({"at": {1: {"channel": {"hiden": 3}}}}, "unknown key 'at.1.channel.hiden'; did you mean 'hidden'?"),
        ({"learned_positions": True}, "model: learned_positions needs max_seq_len"),
        ({"norm": "rms"}, "unknown norm 'rms'; did you mean 'rmsnorm'?"),
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"d_model": "wide"}, "model.d_model: expected int, got 'wide'"),
        ({"d_model": 1.5}, "model.d_model: expected int, got 1.5"),
        ({"d_model": float("inf")}, "model.d_model: expected int, got inf"),
        ({"tied": 1}, "model.tied: expected bool, got 1"),
        ({"dropout": 1.0}, "dropout must lie in [0, 1), got 1.0"),
        ({"pattern": "a"}, "model.pattern: expected a list, got 'a'"),
        ({"blocks": {"a": {"mixer": {**ATTENTION, "kv_heads": 3}}}}, "mixer: kv_heads=3 does not divide heads=2"),
        ({"blocks": {"a": {"mixer": {**ATTENTION, "kv_heads": 0}}}}, "kv_heads must be at least 1, got 0"),
        ({"blocks": {"a": {"mixer": {**ATTENTION, "window": 0}}}}, "window must be at least 1, got 0"),
        ({"blocks": {"a": {"mixer": {**ATTENTION, "head_dim": 3}}}}, "head_dim=3 must be even for rotary positions"),
        ({"blocks": {"a": {"channel": {"kind": "gelu", "hidden": 0}}}}, "hidden must be at least 1, got 0"),
        ({"blocks": {"a": {"channel": {"kind": "swiglu", "multiple_of": 0}}}}, "multiple_of must be at least 1, got 0"),
        ({"blocks": {"a": {"channel": {"kind": "relu2", "ratio": -1}}}}, "ratio must be positive, got -1"),
        ({"blocks": {"a": {"channel": {"kind": "gelu", "approximate": "tan"}}}}, "did you mean 'tanh'?"),
    ],
)
def test_a_bad_config_is_one_line(changes: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        model_config(raw(**changes))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 0}, "vocab_size is not known"),
        (
            {"blocks": {"a": {"mixer": {"kind": "attention", "heads": 3}}}},
            "layer 0, mixer: heads=3 does not divide d_model=8",
        ),
        ({"d_model": 6}, "head_dim=3 must be even for rotary positions"),
        ({"blocks": {"a": {"mixer": {"kind": "tests.toys:ToyNest"}}}}, "layer 0, mixer: inner: a mixer is needed"),
    ],
)
def test_a_config_that_cannot_be_built_is_one_line(changes: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        build(**changes)
    assert said in str(error.value)


def test_foreign_parts_need_an_opt_in(monkeypatch: pytest.MonkeyPatch):
    foreign = raw(blocks={"a": {"mixer": {"kind": "tests.toys:ToyEMA"}}})
    assert model_config(foreign).blocks["a"].mixer.width == 6
    for kind, said in (
        ("tests.toys:Nothing", "cannot load 'tests.toys:Nothing'"),
        ("no_such_package:Part", "cannot load 'no_such_package:Part'"),
        ("tests.tools:Case", "'tests.tools:Case' is not a models.types.Part"),
    ):
        with pytest.raises(UserError, match=said):
            model_config(raw(blocks={"a": {"mixer": {"kind": kind}}}))
    zoo.allow_foreign(False)
    with pytest.raises(UserError, match="code from outside this repository; allow it with --allow-foreign"):
        model_config(foreign)
    assert model_config(raw())


def test_amendments_change_one_layer():
    at = {
        1: {"channel": {"hidden": 3}},
        2: {"mixer": None, "channel": {"kind": "relu2", "hidden": 5}},
        3: {"channel": None},
    }
    cfg = model_config(raw(at=at))
    plain, wider, other, short = cfg.layers()
    assert plain == cfg.blocks["a"]
    assert (wider.mixer, wider.channel.kind, wider.channel.hidden) == (plain.mixer, "swiglu", 3)
    assert (other.mixer, other.channel.kind, other.channel.hidden) == (None, "relu2", 5)
    assert short == BlockConfig(mixer=plain.mixer)
    model = models.build(cfg)
    slots = [(i, slot) for i, slot, _ in model.parts()]
    assert slots == [(0, "mixer"), (0, "channel"), (1, "mixer"), (1, "channel"), (2, "channel"), (3, "mixer")]
    assert model(random_batch(1, 5, 13)).losses["lm"].isfinite()


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_a_config_survives_plain_data(case: Any):
    cfg = case.config()
    assert model_config(to_dict(cfg)) == cfg
    assert isinstance(cfg, ModelConfig)


def test_overrides(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("model: {d_model: 64, pattern: [a, b]}\nname: x\n")
    read = load_yaml(
        tmp_path / "run.yaml", ["model.pattern.1=c", "model.at.2.mixer=null", "a.b=[1, {c: 2}]", "name=1e-3"]
    )
    assert read["model"] == {"d_model": 64, "pattern": ["a", "c"], "at": {2: {"mixer": None}}}
    assert (read["a"], read["name"]) == ({"b": [1, {"c": 2}]}, "1e-3")
    (tmp_path / "torn.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- 1")
    for name, override, said in (
        ("runn.yaml", "a=1", "did you mean 'run.yaml'?"),
        (".", "a=1", "cannot read"),
        ("torn.yaml", "a=1", "is not YAML"),
        ("list.yaml", "a=1", "expected a mapping at the top, got list"),
        ("run.yaml", "model.d_model", "override 'model.d_model': expected key.path=value"),
        ("run.yaml", "model.d_model.x=1", "'model.d_model' is 64, not a mapping"),
        ("run.yaml", "model.pattern.2=a", "'model.pattern' is a list of 2; valid: 0 to 1"),
        ("run.yaml", "a=[1", "the value is not YAML"),
    ):
        with pytest.raises(UserError) as error:
            load_yaml(tmp_path / name, [override])
        assert said in str(error.value)
        assert "\n" not in str(error.value)


# -- behaviour of the backbone


def test_a_context_that_is_too_long_is_one_line():
    learned = build(learned_positions=True, max_seq_len=6)
    for call in (
        lambda: learned(random_batch(1, 7, 13)),
        lambda: learned.init_state(1, 7),
    ):
        with pytest.raises(UserError, match="context of 7 tokens is longer than the 6 learned positions"):
            call()
    tokens = random_batch(1, 9, 13).tokens
    windowed = {"mixer": {**ATTENTION, "window": 8}}
    for model in (build(), build(blocks={"a": windowed}), learned):
        for sizes in ([6, 1], [2, 5], [1] * 7):
            with pytest.raises(UserError, match="context of 7 tokens"):
                in_pieces(model, tokens, sizes, max_len=6)
    for part in ({"mixer": {**ATTENTION, "window": 2}}, {"mixer": {"kind": "tests.toys:ToyEMA"}}):
        model = build(blocks={"a": part}, learned_positions=True, max_seq_len=6)
        with pytest.raises(UserError, match="context of 7 tokens is longer than the 6 learned positions"):
            in_pieces(model, tokens, [4, 2, 1], max_len=6)
    model = build(blocks={"a": windowed})
    h, _, _ = in_pieces(model, tokens, [4, 5], max_len=8)
    assert_close(h, model.features(Batch(tokens))[0], "forms", torch.float32)  # a full window needs no more room


def test_a_state_and_packed_documents_exclude_each_other():
    model = build()
    batch = random_batch(1, 4, 13, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="exclude each other"):
        model(batch, model.init_state(1, 4))


def test_dropout_is_off_in_eval():
    model = build(dropout=0.5, blocks={"a": {"mixer": {**ATTENTION, "dropout": 0.5}}})
    batch = random_batch(2, 8, 13)
    assert not same_bytes(model(batch).losses, model(batch).losses)
    model.eval()
    assert same_bytes(model(batch).losses, model(batch).losses)
    with torch.no_grad():
        plain = build(blocks={"a": {"mixer": ATTENTION}})
        plain.load_state_dict(model.state_dict())
        assert_close(model(batch).losses, plain(batch).losses, "same", torch.float32)


@pytest.mark.parametrize("where", ["model", "attention"])
def test_dropout_drops_in_training(where: str):
    attention = {"mixer": {**ATTENTION, "dropout": 0.5 if where == "attention" else 0.0}}
    model = build(dropout=0.5 if where == "model" else 0.0, blocks={"a": attention})
    batch = random_batch(2, 8, 13)
    assert not same_bytes(model(batch).losses, model(batch).losses)


def test_losses_are_pure_and_weighted_once():
    """`lm` is the mean cross-entropy of counted targets; a part's loss is a mean over its layers; weights act in `total`."""
    model = build(blocks={"a": {"mixer": {"kind": "tests.toys:ToyEMA", "rate_weight": 0.5}}})
    batch: Any = random_batch(2, 6, 13)
    mask = torch.arange(12).view(2, 6) % 3 > 0
    out: Any = model(batch._replace(loss_mask=mask), logits="all")
    expected = F.cross_entropy(out.logits[mask], batch.targets[mask])
    assert_close(out.losses["lm"], expected, "forms", torch.float32)
    assert_close(model(batch, denom=1.0).losses["lm"], 12 * model(batch).losses["lm"], "forms", torch.float32)
    rates = [model.features(batch)[2].losses[f"layers.{i}.mixer.rate"] for i in range(4)]
    assert_close(out.losses["tests.toys:ToyEMA.rate"], torch.stack(rates).mean(), "same", torch.float32)
    weights = {"lm": 1.0, "tests.toys:ToyEMA.rate": 0.5, "tests.toys:ToyEMA.spread": 0.02}
    assert model.loss_weights == weights
    total = sum(weights[name] * value for name, value in out.losses.items())
    assert_close(model.total(out.losses), total, "same", torch.float32)
    with pytest.raises(UserError, match=r"weight of loss 'tests.toys:ToyEMA.rate' is 0.1, but 0.5 in"):
        build(
            blocks={"a": {"mixer": {"kind": "tests.toys:ToyEMA", "rate_weight": 0.5}}},
            at={2: {"mixer": {"rate_weight": 0.1}}},
        )


def test_logits_on_request():
    model: Any = build()
    batch: Any = random_batch(2, 5, 13)
    assert model(batch).logits is None
    assert model(batch._replace(targets=None)).logits.shape == (2, 5, 13)
    assert_close(model(batch, logits="last").logits, model(batch, logits="all").logits[:, -1:], dtype=torch.float32)
    h, _, _ = model.features(batch)
    nll, greedy = model.token_nll(h, batch.targets)
    logits = model(batch, logits="all").logits
    expected = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
    assert_close(nll, expected.detach(), "forms", torch.float32)
    assert torch.equal(greedy, logits.argmax(-1) == batch.targets)


def test_the_same_seed_gives_the_same_weights():
    assert state_hash(build()) == state_hash(build())
    assert state_hash(models.build(model_config(raw()), seed=1)) != state_hash(build())
    out = dict(build(n_layers=16).named_parameters())["layers.3.mixer.out.weight"]
    assert float(out.detach().std()) == pytest.approx(0.02 / 32**0.5, rel=0.25)  # scaled down by depth


def test_selections_are_saved_and_the_rest_recomputed():
    """A tie or a last bit must not choose anew in the backward."""
    ran: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran[str(func)] += 1
            return func(*args, **(kwargs or {}))

    def choose(x: torch.Tensor) -> torch.Tensor:
        best = x.topk(2).indices
        order = torch.sort(x.exp(), dim=-1, stable=True).indices
        return x.gather(1, best).sin() * order[:, :2]

    x = torch.randn(3, 5, requires_grad=True)
    with Count():
        checkpoint(choose, x, use_reentrant=False, context_fn=_keep_selections).sum().backward()
    assert (ran["aten.topk.default"], ran["aten.sort.stable"]) == (1, 1)
    assert ran["aten.sin.default"] == 2


# -- residual branches


def test_branches_start_as_plain_residuals():
    """At first a part reads the mean of the branches and writes to all of them alike: the model without branches."""
    branched, plain = build(branches=4), build()
    plain.load_state_dict({k: v for k, v in branched.state_dict().items() if "_branches" not in k})
    batch = random_batch(2, 6, 13)
    with torch.no_grad():
        assert rel_err(branched(batch, logits="all").logits, plain(batch, logits="all").logits) < 0.02
    branched(batch).losses["lm"].backward()
    maps = {n: g for n, g in gradients(branched).items() if "_branches" in n}
    assert len(maps) == 4 * 2 * 3
    assert all(g.isfinite().all() for g in maps.values())
    assert any(g.any() for g in maps.values())


def test_sinkhorn_is_doubly_stochastic():
    m = sinkhorn(torch.randn(3, 5, 4, 4, dtype=torch.float64))
    ones = torch.ones(3, 5, 4, dtype=torch.float64)
    assert (m >= 0).all()
    assert_close(m.sum(-2), ones, "forms")
    assert rel_err(m.sum(-1), ones) < 1e-3
