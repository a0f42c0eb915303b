"""Evaluation through our lm-eval class against lm-eval's own ``hf`` class, same weights, alternating runs."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.pairs import alternate
from data import ByteTokenizer
from models import build
from models.folder import atomic_folder, save_weights
from models.parsing import to_dict

ITEMS, CHOICES = 24, 4
CONTEXT, CHOICE = (200, 400), (5, 20)  # tokens, uniformly drawn


def workload(seed: int) -> list[tuple[str, str]]:
    """(context, continuation) requests: every context comes with four continuations, as a multiple-choice task asks."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=draw.randint(low, high))).replace("  ", " x")

    contexts = [text(*CONTEXT).strip() for _ in range(ITEMS)]
    return [(c, " " + text(*CHOICE).strip()) for c in contexts for _ in range(CHOICES)]


def measure(width: int, layers: int, pairs: int, batch: int) -> dict[str, Any]:
    """lm-eval's time over ours on the same requests. Raises RuntimeError when a log-likelihood differs by more than 1e-4."""
    import yaml
    from lm_eval.models import huggingface

    from eval.harness import LociLM
    from eval.run import open_run
    from models import model_config
    from models.hf import export_run

    block = {"mixer": {"kind": "attention", "heads": width // 32}, "channel": {"kind": "swiglu", "hidden": 3 * width}}
    tokenizer = ByteTokenizer()
    cfg = model_config(
        {"d_model": width, "n_layers": layers, "vocab_size": tokenizer.vocab_size, "blocks": {"base": block}}
    )
    with tempfile.TemporaryDirectory() as folder:
        run, exported = Path(folder) / "run", Path(folder) / "exported"
        with atomic_folder(run / "checkpoints" / "step_00000000") as where:
            save_weights(build(cfg), where)
        (run / "config.yaml").write_text(yaml.safe_dump({"model": to_dict(cfg)}))
        tokenizer.save(run / "tokenizer")
        export_run(run, exported)
        ours = LociLM(open_run(run, device="cpu"), cache=False, progress=False, max_length=2048)
        peer_class: Any = huggingface.HFLM  # its decorators hide the signature from the type checker
        peer = peer_class(pretrained=str(exported), device="cpu", batch_size=batch, max_length=2048, dtype="float32")
        requests = [_request(*pair) for pair in workload(0)]
        mine, theirs = ours.loglikelihood(requests), peer.loglikelihood(requests, disable_tqdm=True)
        worst = max(abs(a[0] - b[0]) for a, b in zip(mine, theirs, strict=True))
        if worst > 1e-4 or any(a[1] != b[1] for a, b in zip(mine, theirs, strict=True)):
            raise RuntimeError(f"log-likelihoods differ by up to {worst:.1e}: no speed is reported")

        def run_ours() -> None:
            ours.cache.known.clear()  # it would otherwise answer from memory
            ours.loglikelihood(requests)

        ratio = alternate(
            run_ours,
            lambda: peer.loglikelihood(requests, disable_tqdm=True),
            pairs,
            f"evaluation d={width}",
        )
    row: dict[str, Any] = {"width": width, "layers": layers, "requests": len(requests), "peer_batch": batch}
    row |= {"worst_difference": worst, "threads": torch.get_num_threads(), "pairs": pairs}
    return row | {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}


def _request(context: str, continuation: str) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, (context, continuation), 0)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| width | layers | requests | speed ours / lm-eval hf (95 % interval) | wall time ours / hf | pairs | largest difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r['width']} | {r['layers']} | {r['requests']} | {r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}] "
            f"| {1 / r['ratio']:.2f} | {r['pairs']} | {r['worst_difference']:.1e} |"
        )
    return "\n".join(lines)
