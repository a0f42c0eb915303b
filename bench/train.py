"""Training steps against transformers' LlamaForCausalLM of the same shape, with the same optimizer, in alternating runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.pairs import alternate, peak_memory
from models import LM, Batch, ModelConfig, build, model_config
from training.optim import OptimConfig, Optimizer

# name: width, layers, heads, hidden, vocabulary, T, rows
SHAPES = {
    "1M": (128, 4, 4, 384, 257, 256, 16),
    "8M": (256, 8, 8, 768, 8192, 512, 4),
    "30M": (512, 8, 8, 1536, 8192, 512, 2),
}
GPU_SHAPES = {
    "135M": (576, 30, 9, 1536, 49152, 2048, 16),
    "350M": (1024, 24, 16, 2816, 32768, 2048, 8),
}


def ours_config(shape: str) -> ModelConfig:
    d, layers, heads, hidden, vocab, _, _ = {**SHAPES, **GPU_SHAPES}[shape]
    block = {"mixer": {"kind": "attention", "heads": heads}, "channel": {"kind": "swiglu", "hidden": hidden}}
    return model_config({"d_model": d, "n_layers": layers, "vocab_size": vocab, "blocks": {"base": block}})


def peer_model(shape: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    d, layers, heads, hidden, vocab, seq_len, _ = {**SHAPES, **GPU_SHAPES}[shape]
    config: Any = LlamaConfig(
        vocab_size=vocab,
        hidden_size=d,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=seq_len,
        tie_word_embeddings=True,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def tokens(shape: str, device: str, rows: int | None = None) -> torch.Tensor:
    _, _, _, _, vocab, seq_len, usual = {**SHAPES, **GPU_SHAPES}[shape]
    return torch.randint(vocab, (rows or usual, seq_len), generator=torch.Generator().manual_seed(0)).to(device)


def ours_step(model: LM, x: torch.Tensor, dtype: torch.dtype | None) -> Callable[[], None]:
    optim = Optimizer(model, OptimConfig())
    y, mask = x.roll(-1, 1), torch.ones_like(x, dtype=torch.bool)

    def step() -> None:
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            out = model(Batch(x, y, mask))
        model.total(out.losses).backward()
        optim.clip(optim.grad_norm())
        optim.step()
        optim.zero_grad()

    return step


def peer_step(model: Any, x: torch.Tensor, dtype: torch.dtype | None) -> Callable[[], None]:
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad()

    return step


def measure(shape: str, precision: str, mode: str, pairs: int, device: str, rows: int | None) -> dict[str, Any]:
    """One cell of the table: the peer's time over ours. ``rows`` per step: default, the shape's own."""
    dtype = torch.bfloat16 if precision == "bf16" else None
    x = tokens(shape, device, rows)
    mine, theirs = build(ours_config(shape), device=device), peer_model(shape).to(device)
    own_params, peer_params = (sum(p.numel() for p in m.parameters()) for m in (mine, theirs))
    if own_params != peer_params:
        raise RuntimeError(f"shapes differ: {own_params} and {peer_params} parameters")
    if mode == "compiled":
        mine.compile()
        theirs.compile()
    ratio = alternate(
        ours_step(mine, x, dtype), peer_step(theirs, x, dtype), pairs, f"train {shape} {precision} {mode}", warmup=2
    )
    row: dict[str, Any] = {
        "shape": shape,
        "params": own_params,
        "rows": len(x),
        "precision": precision,
        "mode": mode,
        "pairs": pairs,
    }
    row |= {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}
    if mode == "eager" and device == "cpu":
        row["peak_memory_ratio"] = memory(shape, precision, "ours") / memory(shape, precision, "peer")
    torch._dynamo.reset()
    return row


def memory(shape: str, precision: str, whose: str) -> int:
    """Peak bytes of two steps in a process of its own (weights, optimizer and activations; imports left out)."""
    return peak_memory(
        "import torch\n"
        "from bench import train as b\n"
        "from models import build\n"
        "import transformers.models.llama.modeling_llama\n"
        f"x, dtype = b.tokens({shape!r}, 'cpu'), {'torch.bfloat16' if precision == 'bf16' else None}\n"
        "mark()\n"
        + (
            f"step = b.ours_step(build(b.ours_config({shape!r})), x, dtype)\n"
            if whose == "ours"
            else f"step = b.peer_step(b.peer_model({shape!r}), x, dtype)\n"
        )
        + "step(); step()"
    )


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| parameters | rows | precision | mode | speed ours / transformers (95 % interval) | pairs | peak memory ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        mem = f"{r['peak_memory_ratio']:.2f}" if "peak_memory_ratio" in r else "-"
        lines.append(
            f"| {r['params']:,} | {r['rows']} | {r['precision']} | {r['mode']} "
            f"| {r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}] | {r['pairs']} | {mem} |"
        )
    return "\n".join(lines)
