"""What an exchange cannot say is refused in one line, exit code 2, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from models import UserError
from models.hf import export_run, load_pretrained
from models.hf.__main__ import main
from tests.test_hf import config_of, llama_config, make_run, qwen_hybrid

REFUSED_IN = {
    "model_type": ("lama", "'lama' is not supported; did you mean 'llama'?"),
    "hidden_act": ("gelu", "hidden_act = 'gelu' is not supported; supported: silu"),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, "rope_scaling.rope_type = 'linear' is not supported"),
    "rope_parameters": ({"rope_type": "llama3", "rope_theta": 5e5}, "rope_parameters.rope_type = 'llama3'"),
    "max_position_embeddings": ("long", "max_seq_len: expected int, got 'long'"),
    "partial_rotary_factor": (0.5, "partial_rotary_factor = 0.5 is not supported"),
    "logit_scale": (0.0625, "logit_scale = 0.0625 is not supported"),
    "attention_multiplier": (0.125, "attention_multiplier = 0.125 is not supported"),
    "sliding_window": (128, "sliding_window = 128 is not supported"),
    "quantization_config": ({"quant_method": "fp8"}, "quantization_config"),
    "hidden_size": ("32", "'hidden_size' must be an integer, got '32'"),
    "rms_norm_eps": ("small", "norm_eps: expected float, got 'small'"),
    "rope_theta": (5e5, "rope_theta = 500000.0 is not supported; supported: 10000.0, as in rope_parameters"),
    "num_hidden_layers": (4, "tensor 'model.layers.3.input_layernorm.weight' is missing"),
    "num_key_value_heads": (2, "has shape (32, 32), the config says (16, 32)"),
    "attention_bias": (True, "self_attn.q_proj.bias' is missing"),
    "tie_word_embeddings": (False, "tensor 'lm_head.weight' is missing"),
    "vocab_size": (100, "has shape (257, 32), the config says (100, 32)"),
}


@pytest.mark.parametrize("field", REFUSED_IN)
def test_import_refuses(field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One line with the field and its value, exit code 2, and no run left behind."""
    value, message = REFUSED_IN[field]
    make_run(tmp_path / "run", llama_config({}, {"heads": 4}, {}))
    export_run(tmp_path / "run", tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "back")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir() if "back" in p.name] == []


def test_import_refuses_mixed_or_unknown_layers(tmp_path: Path):
    make_run(tmp_path / "run", qwen_hybrid())
    export_run(tmp_path / "run", tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    raw = json.loads(file.read_text())
    for changes, message in (
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types = 'chunked_attention'"),
        ({"use_sliding_window": False}, "layer_types = 'sliding_attention'"),
        ({"layer_types": ["full_attention"]}, "one entry for each of 4 layers"),
        ({"model_type": "qwen2"}, "bias on q, k and v but none on the output"),
    ):
        file.write_text(json.dumps({**raw, **changes}))
        with pytest.raises(UserError, match=message):
            load_pretrained(tmp_path / "out")
    file.write_text(json.dumps({k: v for k, v in raw.items() if k != "layer_types"} | {"max_window_layers": 2}))
    windows = [block.mixer.window for block in load_pretrained(tmp_path / "out")[0].cfg.layers()]
    assert windows == [None, None, 5, 5]


def test_import_refuses_broken_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, cfg = config_of("plain")
    make_run(tmp_path / "run", cfg)
    export_run(tmp_path / "run", tmp_path / "out")
    weights, tokenizer = tmp_path / "out" / "model.safetensors", tmp_path / "out" / "tokenizer.json"
    tensors = load_file(weights)

    def error(source: Path = tmp_path / "out", target: Path = tmp_path / "back") -> str:
        assert main(["import", str(source), str(target)]) == 2
        return capsys.readouterr().err

    assert "no folder" in error(source=tmp_path / "nowhere")
    assert "is not a Hugging Face checkpoint" in error(source=tmp_path / "run")
    assert "already exists" in error(target=tmp_path / "run")
    save_file({**tensors, "model.layers.0.extra.weight": torch.ones(2)}, weights)
    assert "'model.layers.0.extra.weight' has no place" in error()
    save_file({k: t.to(torch.int8) for k, t in tensors.items()}, weights)
    assert "quantized checkpoints are not supported" in error()
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "cannot read" in error()
    weights.rename(tmp_path / "out" / "pytorch_model.bin")
    assert "no model.safetensors" in error()
    save_file(tensors, weights)
    content = tokenizer.read_text()
    tokenizer.write_text("{")
    assert "is not a tokenizer.json" in error()
    tokenizer.unlink()
    assert "no tokenizer.json" in error()
    tokenizer.write_text(content)
    larger = tokenizers.Tokenizer.from_file(str(tokenizer))
    larger.add_special_tokens(["<extra>"])
    larger.save(str(tokenizer))
    assert "the tokenizer has 258 ids, but the model's vocab_size is 257" in error()
    assert not (tmp_path / "back").exists()


ATTENTION = {"kind": "attention", "heads": 4}
REFUSED_OUT: dict[str, dict[str, Any]] = {
    "learned_positions": {"learned_positions": True},
    "norm 'layernorm'": {"norm": "layernorm"},
    "branches=2": {"branches": 2},
    "dropout=0.1": {"dropout": 0.1},
    "layer 1: channel 'gelu'": {"at": {1: {"channel": {"kind": "gelu"}}}},
    "layer 2: mixer 'None'": {"at": {2: {"mixer": None}}},
    "layer 1: a shape or option": {"at": {1: {"mixer": {**ATTENTION, "kv_heads": 2}}}},
    "a window in some layers only": {"at": {1: {"mixer": {**ATTENTION, "window": 4}}}},
    "without rotary positions": {"at": {i: {"mixer": {**ATTENTION, "rope_theta": None}} for i in range(3)}},
    "layer 0: token_shift": {"at": {i: {"mixer": {**ATTENTION, "token_shift": 4}} for i in range(3)}},
    "swiglu with bias and attention with qk_norm": {
        "at": {i: {"mixer": {**ATTENTION, "qk_norm": True}, "channel": {"bias": True}} for i in range(3)}
    },
    "heads=3 that do not divide d_model=32": {"at": {i: {"mixer": {"heads": 3, "head_dim": 8}} for i in range(3)}},
}


@pytest.mark.parametrize("what", REFUSED_OUT)
def test_native_export_refuses(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_run(tmp_path / "run", llama_config(REFUSED_OUT[what], {"heads": 4}, {}))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "llama"]) == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "LociForCausalLM" in capsys.readouterr().out


def test_export_refuses_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_run(tmp_path / "run", llama_config({}, {"heads": 4}, {}))
    assert main(["export", str(tmp_path / "rum"), str(tmp_path / "out")]) == 2
    assert "did you mean 'run'?" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--step", "7"]) == 2
    assert "no checkpoint of step 7; there are: 10" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "out" / "precious").is_file()
