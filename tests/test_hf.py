"""Exchange with Hugging Face in native formats: the same function on both sides, everything odd refused."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import models
from data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from models import Batch, UserError, model_config
from models.folder import MANIFEST, atomic_folder, load_model, save_weights, verify_folder
from models.hf import export_run, import_run, load_pretrained
from models.parsing import to_dict
from tests.tools import TOLERANCE, rel_err, same_bytes, spread

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = TOLERANCE["foreign", torch.float32]
SAME = TOLERANCE["same", torch.float32]
VOCAB = ByteTokenizer.vocab_size

LLAMA = {"d_model": 32, "n_layers": 3, "vocab_size": VOCAB, "max_seq_len": 64, "norm_eps": 1e-6}
SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: architecture, changes of the model, of the attention, of the channel
    "plain": ("LlamaForCausalLM", {}, {"heads": 4}, {}),
    "grouped": ("LlamaForCausalLM", {"tied": False}, {"heads": 4, "kv_heads": 2, "rope_theta": 1e6}, {}),
    "one_kv_head": ("LlamaForCausalLM", {}, {"heads": 4, "kv_heads": 1}, {}),
    "wide_heads": ("LlamaForCausalLM", {"norm_eps": 1e-3}, {"heads": 4, "kv_heads": 2, "head_dim": 20}, {}),
    "biases": ("LlamaForCausalLM", {"tied": False}, {"heads": 4, "kv_heads": 2, "bias": True}, {"bias": True}),
    "default_width": ("LlamaForCausalLM", {}, {"heads": 2}, {"hidden": None, "multiple_of": 16}),
    "qk_norm": ("Qwen3ForCausalLM", {}, {"heads": 4, "kv_heads": 2, "head_dim": 24, "qk_norm": True}, {}),
    "qk_norm_bias": ("Qwen3ForCausalLM", {"tied": False}, {"heads": 4, "qk_norm": True, "bias": True}, {}),
    "window": ("MistralForCausalLM", {}, {"heads": 4, "kv_heads": 2, "window": 7}, {}),
}


def llama_config(changes: dict[str, Any], attention: dict[str, Any], channel: dict[str, Any]) -> models.ModelConfig:
    block = {"mixer": {"kind": "attention", **attention}, "channel": {"kind": "swiglu", "hidden": 48, **channel}}
    return model_config({**LLAMA, **changes, "blocks": {"only": block}})


def qwen_hybrid() -> models.ModelConfig:
    mixer = {"kind": "attention", "heads": 4, "kv_heads": 2, "qk_norm": True}
    channel = {"kind": "swiglu", "hidden": 48}
    blocks = {
        "full": {"mixer": mixer, "channel": channel},
        "local": {"mixer": {**mixer, "window": 5}, "channel": channel},
    }
    return model_config({**LLAMA, "n_layers": 4, "blocks": blocks, "pattern": ["local", "full"]})


def config_of(name: str) -> tuple[str, models.ModelConfig]:
    if name == "qwen_hybrid":
        return "Qwen3ForCausalLM", qwen_hybrid()
    architecture, *parts = SHAPES[name]
    return architecture, llama_config(*parts)


def make_run(folder: Path, cfg: models.ModelConfig, seed: int = 0, tokenizer: Any = None) -> models.LM:
    """A run folder around a model whose every weight is off its initial value."""
    model = models.build(cfg, seed=seed)
    spread(model, seed)
    with torch.no_grad():
        model.progress.fill_(1.0)
    folder.mkdir(parents=True)
    (tokenizer or ByteTokenizer()).save(folder / "tokenizer")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": to_dict(cfg)}, sort_keys=False))
    with atomic_folder(folder / "checkpoints" / "step_00000010") as checkpoint:
        save_weights(model, checkpoint)
    return model.eval()


def auto(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def our_logits(model: models.LM, tokens: torch.Tensor, **fields: Any) -> torch.Tensor:
    found = model(Batch(tokens, **fields)).logits
    assert found is not None
    return found


# -- the same function


@pytest.mark.parametrize("name", [*SHAPES, "qwen_hybrid"])
@torch.no_grad()
def test_export_is_native_and_equal(name: str, tmp_path: Path):
    """A plain from_pretrained gives the native class and the same logits: parallel, left-padded, cached."""
    architecture, cfg = config_of(name)
    model = make_run(tmp_path / "run", cfg)
    assert export_run(tmp_path / "run", tmp_path / "out") == architecture
    theirs = auto(tmp_path / "out")
    assert type(theirs).__name__ == architecture
    assert type(theirs).__module__.startswith("transformers.models.")
    tokens = random_tokens(3, 17)
    want = theirs(tokens).logits
    assert rel_err(our_logits(model, tokens), want) < FOREIGN

    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[0, :5], valid[1, :1] = False, False
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    padded = theirs(tokens, attention_mask=valid.long(), position_ids=positions).logits
    assert rel_err(our_logits(model, tokens, valid=valid)[valid], padded[valid]) < FOREIGN

    cache, state = None, model.init_state(3, 17)
    for start, end in ((0, 9), *((t, t + 1) for t in range(9, 17))):
        piece = tokens[:, start:end]
        got = theirs(piece, past_key_values=cache, use_cache=True)
        ours = model(Batch(piece), state)
        cache, state = got.past_key_values, ours.state
        assert rel_err(ours.logits, got.logits) < FOREIGN
        assert rel_err(ours.logits, want[:, start:end]) < FOREIGN


@pytest.mark.parametrize("name", ["grouped", "qk_norm", "window"])
@torch.no_grad()
def test_import_of_their_random_weights(name: str, tmp_path: Path):
    """The other direction, from a checkpoint that transformers itself wrote, in one file and in shards."""
    _, cfg = config_of(name)
    make_run(tmp_path / "run", cfg)
    export_run(tmp_path / "run", tmp_path / "shape")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "shape")
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    tokens = random_tokens(2, 15, seed=1)
    for kind, options in (("whole", {}), ("shards", {"max_shard_size": "40KB"})):
        theirs.save_pretrained(tmp_path / kind, **options)
        ByteTokenizer().save(tmp_path / kind)
        import_run(tmp_path / kind, tmp_path / f"{kind}_run")
        ours, _ = load_model(tmp_path / f"{kind}_run")
        assert rel_err(our_logits(ours, tokens), theirs(tokens).logits) < FOREIGN
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("name", [*SHAPES, "qwen_hybrid"])
def test_round_trip_to_the_bit(name: str, tmp_path: Path):
    """import(export(run)) has the weights of the run to the bit, and a config that says the same model."""
    _, cfg = config_of(name)
    model = make_run(tmp_path / "run", cfg)
    export_run(tmp_path / "run", tmp_path / "out")
    import_run(tmp_path / "out", tmp_path / "back")
    back, checkpoint = load_model(tmp_path / "back")
    assert verify_folder(checkpoint) is None
    assert same_bytes(model.state_dict(), back.state_dict())
    for ours, theirs in zip(cfg.layers(), back.cfg.layers(), strict=True):
        assert ours.mixer.window == theirs.mixer.window
        assert ours.mixer.rope_theta == theirs.mixer.rope_theta
    changed = {name for name in to_dict(cfg) if to_dict(cfg)[name] != to_dict(back.cfg)[name]}
    assert changed <= {"blocks", "pattern"}  # sizes written out, blocks renamed
    again, folder = load_pretrained(tmp_path / "out")
    assert same_bytes(model.state_dict(), again.state_dict())
    assert load_tokenizer(folder).fingerprint == load_tokenizer(tmp_path / "run" / "tokenizer").fingerprint


def test_import_leaves_a_run(tmp_path: Path):
    _, cfg = config_of("plain")
    make_run(tmp_path / "run", cfg)
    export_run(tmp_path / "run", tmp_path / "out", dtype=torch.bfloat16)
    import_run(tmp_path / "out", tmp_path / "back")
    config = yaml.safe_load((tmp_path / "back" / "config.yaml").read_text())
    assert config["imported_from"] == str(tmp_path / "out")
    assert config["model"]["blocks"]["full"]["channel"]["hidden"] == 48
    assert not (tmp_path / "back" / MANIFEST).exists()
    model, checkpoint = load_model(tmp_path / "back")
    assert checkpoint.name == "step_00000000"
    assert model.embed.weight.dtype == torch.float32  # fp32 unless asked otherwise
    assert float(model.progress) == 1.0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert auto(tmp_path / "out").config.dtype in (torch.float32, torch.bfloat16)


def test_old_checkpoints_with_derived_tensors(tmp_path: Path):
    """A stored duplicate of a tied head and rotary frequencies are passed over, but only if the head is a duplicate."""
    _, cfg = config_of("plain")
    make_run(tmp_path / "run", cfg)
    export_run(tmp_path / "run", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    extra["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, **extra}, tmp_path / "out" / "model.safetensors")
    load_pretrained(tmp_path / "out")
    extra["lm_head.weight"] += 1
    save_file({**tensors, **extra}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        load_pretrained(tmp_path / "out")


# -- tokenizers

TEXTS = ["def f(x):\n\treturn x  # ünïcode ☃ 🜚", "", " leading", "a\r\nb\x00c", "don't 12,345 -- ABC", "\u202e" * 3]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("form", ["llama", "loci"])
def test_tokenizer_gives_the_same_ids(kind: str, form: str, tmp_path: Path):
    tokenizer = ByteTokenizer() if kind == "bytes" else train_bpe(TEXTS * 5, 300, progress=False)
    cfg = llama_config({"vocab_size": 300}, {"heads": 4}, {})
    make_run(tmp_path / "run", cfg, tokenizer=tokenizer)
    export_run(tmp_path / "run", tmp_path / "out", form)
    importlib.import_module(
        "models.hf.modeling"
    )  # registers "loci", so that no code of the checkpoint needs to be trusted

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs.pad_token_id == tokenizer.eos_id
    batch = theirs(["ab", "abcdef"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][0][0] == 0  # padded on the left, as generation needs
    assert load_tokenizer(load_pretrained(tmp_path / "out")[1]).fingerprint == tokenizer.fingerprint


def test_ends_of_document_from_the_model_config(tmp_path: Path):
    """A tokenizer that does not say what ends a document gets it from config.json."""
    _, cfg = config_of("plain")
    make_run(tmp_path / "run", cfg)
    export_run(tmp_path / "run", tmp_path / "out")
    (tmp_path / "out" / "tokenizer_config.json").unlink()
    import_run(tmp_path / "out", tmp_path / "back")
    tokenizer = load_tokenizer(tmp_path / "back" / "tokenizer")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, 256)
    assert tokenizer.encode("aé") == list("aé".encode())


# -- beside transformers


def python(code: str, *args: Any, **env: str) -> str:
    base = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env={**base, **env}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_models_do_not_import_transformers():
    code = "import sys, models, models.hf, models.hf.__main__; print([m for m in sys.modules if m == 'transformers'])"
    assert python(code).strip() == "[]"


def test_our_kernels_beside_transformers(tmp_path: Path):
    """transformers looks for a distribution called `kernels`; finding ours on the path must confuse neither side."""
    make_run(tmp_path / "run", llama_config({}, {"heads": 4}, {}))
    code = """
import sys, kernels, transformers, torch
from transformers.utils.import_utils import is_kernels_available
from models.hf import export_run, LociForCausalLM
assert not is_kernels_available()
run, out = sys.argv[1:]
export_run(run, out + "/a", "llama"); export_run(run, out + "/b", "loci")
found = [transformers.AutoModelForCausalLM.from_pretrained(f"{out}/{x}") for x in "ab"]
ids = torch.arange(9)[None]
print([type(m).__name__ for m in found], float((found[0](ids).logits - found[1](ids).logits).abs().max()) < 1e-4)
print(kernels.__file__)
"""
    names, file = python(code, tmp_path / "run", tmp_path / "out").splitlines()
    assert names == "['LlamaForCausalLM', 'LociForCausalLM'] True"
    assert Path(file).is_relative_to(ROOT)
