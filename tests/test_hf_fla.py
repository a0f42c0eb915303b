"""Checkpoints of flash-linear-attention read as ours, without it: against what version 0.6.0 wrote and computed, and against our
own models renamed by hand. `tests.test_fla_layers` holds the same up to the library itself, where it is installed."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import models
from data.tokenizer import ByteTokenizer
from models import LM, UserError, model_config
from models.folder import load_model
from models.hf import export_run, fla, import_run, load_pretrained
from models.hf.__main__ import main
from models.hf.weights import to_native
from tests.test_hf import our_logits, random_tokens
from tests.tools import TOLERANCE, rel_err, same_bytes, spread

VOCAB = ByteTokenizer.vocab_size
FOREIGN = TOLERANCE["foreign", torch.float32]

# -- recorded: what fla 0.6.0 writes for a tiny model, and what it computes with weights that a formula gives

WRITTEN = {  # fields that both configs have
    "attn": None,
    "attn_mode": "chunk",
    "attnres_block_size": None,
    "bos_token_id": 1,
    "conv_size": 4,
    "dtype": "float32",
    "eos_token_id": 2,
    "fuse_cross_entropy": True,
    "fuse_norm": True,
    "fuse_swiglu": True,
    "head_dim": 8,
    "hidden_act": "swish",
    "hidden_ratio": 3,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "max_position_embeddings": 2048,
    "norm_eps": 1e-06,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "transformers_version": "5.24.0",
    "use_cache": True,
    "use_short_conv": True,
    "vocab_size": 257,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gated_deltanet": {
        **WRITTEN,
        "allow_neg_eigval": False,
        "architectures": ["GatedDeltaNetForCausalLM"],
        "expand_v": 2.0,
        "fuse_linear_cross_entropy": False,
        "model_type": "gated_deltanet",
        "num_v_heads": 4,
        "output_gate_activation": "swish",
        "use_gate": True,
        "use_l2warp": False,
    },
    "mom": {
        **WRITTEN,
        "architectures": ["MomForCausalLM"],
        "aux_loss_scale": 0.01,
        "capacity": 1.0,
        "expand_v": 1.0,
        "model_type": "mom",
        "mom_backend": "gated_deltanet",
        "num_memories": 3,
        "shared_mem": True,
        "single_kv_proj": False,
        "topk": 2,
        "use_layer_wise_balance": True,
        "use_output_gate": True,
    },
}
AROUND = {
    "lm_head.weight": (257, 32),
    "model.embeddings.weight": (257, 32),
    "model.norm.weight": (32,),
    "model.layers.0.attn_norm.weight": (32,),
    "model.layers.0.mlp_norm.weight": (32,),
    "model.layers.0.mlp.gate_proj.weight": (256, 32),
    "model.layers.0.mlp.up_proj.weight": (256, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 256),
}
LAYERS = {
    "gated_deltanet": {
        "A_log": (4,),
        "dt_bias": (4,),
        "q_proj.weight": (16, 32),
        "k_proj.weight": (16, 32),
        "v_proj.weight": (64, 32),
        "a_proj.weight": (4, 32),
        "b_proj.weight": (4, 32),
        "g_proj.weight": (64, 32),
        "o_proj.weight": (32, 64),
        "o_norm.weight": (16,),
        "q_conv1d.weight": (16, 1, 4),
        "k_conv1d.weight": (16, 1, 4),
        "v_conv1d.weight": (64, 1, 4),
    },
    "mom": {
        "A_log": (2,),
        "dt_bias": (2,),
        "q_proj.weight": (16, 32),
        "gate.weight": (3, 32),
        **{f"{x}_proj.{m}.weight": (n, 32) for x, n in {"k": 16, "v": 16, "a": 2, "b": 2}.items() for m in range(3)},
        **{f"shared_{x}.weight": (n, 32) for x, n in {"k": 16, "v": 16, "a": 2, "b": 2}.items()},
        "g_proj.weight": (16, 32),
        "o_proj.weight": (32, 16),
        "o_norm.weight": (8,),
        "q_conv1d.weight": (16, 1, 4),
        "k_conv1d.weight": (16, 1, 4),
        "v_conv1d.weight": (16, 1, 4),
    },
}
RECORDED = {  # the first logits after the last of `recorded_tokens`
    "gated_deltanet": [
        [-0.45924699, -0.028254585, 0.94041693, -0.2517758, -0.32533219, 1.3064106, 1.8312784, -1.9125578],
        [-1.3080506, -0.58509427, 0.9109242, -0.51477009, 1.0313321, -0.65973186, -0.16048469, 0.10778312],
    ],
    "mom": [  # in eval mode and with a stable sort, see `tests.test_fla_layers`
        [-0.5963496, 0.11706316, -0.19652081, 0.12966159, -1.979919, -0.48927358, -0.071901575, 0.1856955],
        [-0.81119442, -0.77432239, -0.46263725, 0.23201048, -0.68733805, -1.3967134, -1.8207601, 1.034884],
    ],
}


def recorded_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    return AROUND | {f"model.layers.0.attn.{name}": shape for name, shape in LAYERS[kind].items()}


def recorded_tensors(kind: str) -> dict[str, Tensor]:
    """Weights that follow from their names: matrices keep the scale of what they map, vectors lie around 0, or 1 for norms."""
    found = {}
    for name, shape in recorded_shapes(kind).items():
        value = _noise(name, shape)
        if "norm" in name:
            value = 1 + 0.3 * value
        elif len(shape) > 1 and "embeddings" not in name:
            value = value * (3 / shape[-1]) ** 0.5
        found[name] = value.float()
    return found


def _noise(name: str, shape: tuple[int, ...]) -> Tensor:
    """In [-1, 1), by integer arithmetic alone, so that every machine makes the same."""
    mask = 0xFFFFFFFF
    x = torch.arange(torch.Size(shape).numel()) * 0x9E3779B1 + zlib.crc32(name.encode()) & mask
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        x = (x ^ x >> 16) * factor & mask
    return ((x ^ x >> 16).double() / 2**31 - 1).view(shape)


def recorded_tokens() -> Tensor:
    return (torch.arange(2 * 27) * 61 % 251).view(2, 27)


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    ByteTokenizer().save(folder)
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_recorded_logits(kind: str, tmp_path: Path):
    """The names and shapes that fla writes are read, and the same function comes out."""
    source = write_checkpoint(tmp_path / "theirs", CONFIGS[kind], recorded_tensors(kind))
    assert main(["import", str(source), str(tmp_path / "run")]) == 0
    model, _ = load_model(tmp_path / "run")
    want = torch.tensor(RECORDED[kind])
    assert rel_err(our_logits(model, recorded_tokens())[:, -1, : want.shape[1]], want) < FOREIGN


# -- our own models, renamed by hand

DELTA = {"kind": "gated_delta", "heads": 2, "head_dim": 8, "expand_v": 1.0, "conv": 4}
MIXERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, and the fields of theirs beside the sizes
    "delta": (DELTA, {"model_type": "gated_deltanet"}),
    "delta_options": (
        {**DELTA, "value_heads": 4, "expand_v": 1.5, "conv": 3, "gate": False, "allow_neg_eigval": True},
        {
            "model_type": "gated_deltanet",
            "num_v_heads": 4,
            "expand_v": 1.5,
            "conv_size": 3,
            "use_gate": False,
            "allow_neg_eigval": True,
        },
    ),
    "mom": ({"kind": "mom", "rule": DELTA, "memories": 3, "top_k": 2}, {"model_type": "mom"}),
    "mom_one_projection": (
        {"kind": "mom", "rule": DELTA, "memories": 3, "top_k": 1, "shared": False, "shared_kv": True},
        {"model_type": "mom", "topk": 1, "shared_mem": False, "single_kv_proj": True},
    ),
    "mom_routed_only": (
        {"kind": "mom", "rule": {**DELTA, "gate": False}, "memories": 3, "top_k": 3, "shared": False},
        {"model_type": "mom", "topk": 3, "shared_mem": False, "use_output_gate": False},
    ),
    "mom_first_names": (
        {"kind": "mom", "rule": DELTA, "memories": 3, "top_k": 2},
        {"model_type": "mom_gated_deltanet", "num_experts": 3, "single_expert": False, "shared_mem": True},
    ),
}


def our_config(mixer: dict[str, Any], tied: bool) -> models.ModelConfig:
    return model_config(
        {
            "d_model": 16,
            "n_layers": 2,
            "vocab_size": VOCAB,
            "max_seq_len": 64,
            "norm_eps": 1e-6,
            "tied": tied,
            "blocks": {"only": {"mixer": mixer, "channel": {"kind": "swiglu", "hidden": 24}}},
        }
    )


def their_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    memories = {} if fields["model_type"] != "mom" else {"num_memories": 3, "aux_loss_scale": 0.02}
    return {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "expand_v": 1.0,
        "max_position_embeddings": 64,
        "norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        **memories,
        **fields,
    }


def by_hand(model: LM) -> dict[str, Tensor]:
    """The weights under fla's names, one line for each of ours."""
    state = model.state_dict()
    found = {"model.embeddings.weight": state["embed.weight"], "model.norm.weight": state["norm.weight"]}
    if "head.weight" in state:
        found["lm_head.weight"] = state["head.weight"]
    for i in range(model.cfg.n_layers):
        mine = {k.removeprefix(f"layers.{i}."): t for k, t in state.items() if k.startswith(f"layers.{i}.")}
        attn: dict[str, Tensor] = {
            "A_log": mine["mixer.rule.A_log"],
            "dt_bias": mine["mixer.rule.dt_bias"],
            "o_proj.weight": mine["mixer.out.weight"],
            "o_norm.weight": mine["mixer.readout.weight"],
        }
        heads, width = len(mine["mixer.rule.A_log"]), len(mine["mixer.readout.weight"])
        keys, values = 16, heads * width
        conv = mine["mixer.conv.weight"]
        attn["q_conv1d.weight"] = conv[:keys].unsqueeze(1)
        attn["k_conv1d.weight"] = conv[keys : 2 * keys].unsqueeze(1)
        attn["v_conv1d.weight"] = conv[2 * keys :].unsqueeze(1)
        project = mine["mixer.project.weight"]
        attn["q_proj.weight"], rest = project[:keys], project[keys:]
        if "mixer.kv" in mine:
            attn["gate.weight"] = mine["mixer.router.weight"]
            kv = mine["mixer.kv"]
            for m, memory in enumerate(kv):
                last = m == len(kv) - 1 and model.cfg.layers()[i].mixer.shared
                apart = not last and len(kv) > 1
                rows = memory.split((keys, values, heads, heads))
                for letter, part in zip("kvba", rows, strict=True):
                    attn[f"{letter}_proj.{m}.weight" if apart else f"shared_{letter}.weight"] = part
        else:
            attn["k_proj.weight"], attn["v_proj.weight"], rest = rest.split((keys, values, len(rest) - keys - values))
            attn["b_proj.weight"], attn["a_proj.weight"] = rest[-2 * heads : -heads], rest[-heads:]
            rest = rest[: -2 * heads]
        if len(rest):
            attn["g_proj.weight"] = rest
        layer = f"model.layers.{i}"
        found |= {f"{layer}.attn.{name}": t for name, t in attn.items()}
        found[f"{layer}.attn_norm.weight"] = mine["mixer.norm.weight"]
        found[f"{layer}.mlp_norm.weight"] = mine["channel.norm.weight"]
        gate, up = mine["channel.up.weight"].chunk(2)
        found |= {f"{layer}.mlp.gate_proj.weight": gate, f"{layer}.mlp.up_proj.weight": up}
        found[f"{layer}.mlp.down_proj.weight"] = mine["channel.down.weight"]
    return found


@pytest.fixture(params=MIXERS)
def renamed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LM, Path]:
    """(our model, a folder with the same one as fla would write it)."""
    mixer, fields = MIXERS[request.param]
    tied = request.param == "delta_options"
    model = models.build(our_config(mixer, tied)).eval()
    spread(model)
    with torch.no_grad():
        model.progress.fill_(1.0)
    return model, write_checkpoint(tmp_path / "theirs", their_config(fields, tied), by_hand(model))


def test_import_to_the_bit(renamed: tuple[LM, Path], tmp_path: Path):
    model, source = renamed
    import_run(source, tmp_path / "run")
    back, _ = load_model(tmp_path / "run")
    assert same_bytes(model.state_dict(), back.state_dict())
    ours, theirs = model.cfg.layers()[0], back.cfg.layers()[0]
    assert theirs.channel.hidden == ours.channel.hidden
    for option in ("shared", "shared_kv", "memories", "top_k", "router_norm", "value_heads", "conv", "gate"):
        assert getattr(theirs.mixer, option, None) == getattr(ours.mixer, option, None)
    if hasattr(theirs.mixer, "balance_weight") and "mom_gated" not in (source / "config.json").read_text():
        assert theirs.mixer.balance_weight == pytest.approx(0.02 * theirs.mixer.top_k)
    tokens = random_tokens(2, 19)
    assert torch.equal(our_logits(model, tokens), our_logits(back, tokens))


def test_names_of_the_other_direction(renamed: tuple[LM, Path]):
    """The mapping lists every tensor of fla's once, and nothing else."""
    model, _ = renamed
    assert same_bytes(dict(sorted(to_native(model, fla.pieces).items())), dict(sorted(by_hand(model).items())))


def test_export_as_the_registered_class(renamed: tuple[LM, Path], tmp_path: Path):
    """An imported run goes out as any other model of ours: transformers computes and generates the same."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip(
        "models.hf.modeling"
    )  # registers the class, so that no code of the checkpoint needs to be trusted
    model, source = renamed
    import_run(source, tmp_path / "run")
    assert export_run(tmp_path / "run", tmp_path / "out") == "LociForCausalLM"
    with pytest.raises(UserError, match="use --format loci"):
        export_run(tmp_path / "run", tmp_path / "llama", "llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(theirs(tokens, use_cache=False).logits, our_logits(model, tokens))
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    whole = theirs.generate(tokens, **options)
    assert torch.equal(our_logits(model, whole)[:, 8:-1].argmax(-1), whole[:, 9:])


def test_early_checkpoints(renamed: tuple[LM, Path], tmp_path: Path):
    """They hold a skip weight that no forward reads, and gate and up projection of the channel in one matrix."""
    model, source = renamed
    tensors = by_hand(model)
    for i in range(2):
        mlp = f"model.layers.{i}.mlp"
        halves = (tensors[f"{mlp}.gate_proj.weight"], tensors.pop(f"{mlp}.up_proj.weight"))
        tensors[f"{mlp}.gate_proj.weight"] = torch.cat(halves)
        tensors[f"model.layers.{i}.attn.D"] = torch.ones(2)
    config = {**json.loads((source / "config.json").read_text()), "norm_first": False}
    back, _ = load_pretrained(write_checkpoint(tmp_path / "early", config, tensors))
    assert same_bytes(model.state_dict(), back.state_dict())


# -- sizes that fla derives, and what is refused


WIDTHS = {  # (width of the model, ratio, width given): width of the channel
    (1024, 3, None): 2048,
    (1024, 2, None): 1536,
    (2048, 4, None): 5632,
    (385, 1, None): 256,  # 256.67, which fla rounds down first
    (64, None, None): 256,
    (64, 4, 100): 100,
}


@pytest.mark.parametrize(("width", "ratio", "given"), WIDTHS)
def test_width_of_the_channel(width: int, ratio: int | None, given: int | None):
    fields = {"hidden_size": width, "hidden_ratio": ratio, "intermediate_size": given}
    cfg = fla.from_hf({"model_type": "gated_deltanet", **fields})
    assert cfg.layers()[0].channel.hidden == WIDTHS[width, ratio, given]


def test_defaults_are_those_of_fla():
    delta, mom = (fla.from_hf({"model_type": kind}) for kind in ("gated_deltanet", "mom"))
    assert (delta.n_layers, delta.d_model, delta.vocab_size, delta.tied) == (21, 2048, 32000, False)
    mixer = delta.layers()[0].mixer
    assert (mixer.heads, mixer.head_dim, mixer.expand_v, mixer.conv, mixer.gate) == (6, 256, 2.0, 4, True)
    mixer = mom.layers()[0].mixer
    assert (mixer.memories, mixer.top_k, mixer.shared, mixer.shared_kv, mom.n_layers) == (4, 2, True, False, 24)
    assert (mixer.rule.heads, mixer.rule.head_dim, mixer.rule.expand_v) == (4, 256, 1.0)
    assert mixer.balance_weight == pytest.approx(0.02)


REFUSED = {
    "use_short_conv": ("mom", False, "use_short_conv = False is not supported; supported: True"),
    "hidden_act": ("mom", "powlu", "hidden_act = 'powlu' is not supported; supported: swish, silu"),
    "output_gate_activation": ("gated_deltanet", "sigmoid", "output_gate_activation = 'sigmoid'"),
    "attn": ("gated_deltanet", {"layers": [0], "num_heads": 2}, "attn = {'layers': [0], 'num_heads': 2} is not"),
    "attnres_block_size": ("mom", 2, "attnres_block_size = 2 is not supported; supported: null"),
    "mom_backend": ("mom", "gla", "mom_backend = 'gla' is not supported; supported: gated_deltanet"),
    "num_memories": ("mom", 4, "tensor 'model.layers.0.attn.k_proj.3.weight' is missing"),
    "topk": ("mom", 5, "top_k=5, memories=3"),
    "shared_mem": ("mom", False, "tensor 'model.layers.0.attn.shared_a.weight' has no place"),
    "single_kv_proj": ("mom", True, "tensor 'model.layers.0.attn.a_proj.0.weight' has no place"),
    "num_v_heads": ("gated_deltanet", 3, "heads=2 does not divide value_heads=3"),
    "conv_size": ("gated_deltanet", 3, "q_conv1d.weight' has shape (16, 1, 4), the config says (16, 1, 3)"),
    "num_heads": ("gated_deltanet", "2", "'num_heads' must be an integer, got '2'"),
    "head_dim": ("gated_deltanet", 16, "q_conv1d.weight' has shape (16, 1, 4), the config says (32, 1, 4)"),
    "capacity": ("mom", "all", "capacity = 'all' is not supported; supported: a number"),
    "hidden_ratio": ("gated_deltanet", "3", "hidden_ratio = '3' is not supported; supported: a number"),
    "hidden_size": ("mom", None, "'hidden_size' must be an integer, got None"),
    "use_rope": ("gated_deltanet", True, "use_rope = True is not supported"),
    "quantization_config": ("mom", {"quant_method": "fp8"}, "quantization_config"),
    "norm_first": ("gated_deltanet", True, "norm_first = True is not supported; supported: False"),
    "model_type": ("mom", "momm", "'momm' is not supported; did you mean 'mom'?"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_refused(field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One line with the field and its value, exit code 2, and no run left behind."""
    kind, value, message = REFUSED[field]
    source = write_checkpoint(tmp_path / "theirs", {**CONFIGS[kind], field: value}, recorded_tensors(kind))
    assert main(["import", str(source), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_dead_settings_of_theirs_are_said():
    """fla reads neither; here the first could drop tokens and the second pool the loss over layers, and neither happens."""
    with pytest.warns(UserWarning, match=r"capacity=0\.5 is ignored"):
        fla.from_hf({"model_type": "mom", "capacity": 0.5})
    with pytest.warns(UserWarning, match="use_layer_wise_balance=false is ignored"):
        fla.from_hf({"model_type": "mom", "use_layer_wise_balance": False})
    with pytest.raises(UserError, match=r"capacity = 0\.5 is not supported"):  # alive in the authors' first version
        fla.from_hf({"model_type": "mom_gated_deltanet", "capacity": 0.5})
