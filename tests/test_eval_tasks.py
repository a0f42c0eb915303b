"""Whole evaluations through the real lm-eval, and the tasks made from a run's own corpus."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lm_eval")

from eval import corpus_tasks
from eval.__main__ import main
from eval.judge import _all_local, evaluate, find_tasks, print_table, result_rows
from eval.run import open_run
from eval.suites import suite
from models import LM
from tests.test_eval_runs import LEARNED, LLAMA, add_corpus, tiny_model, tiny_run, write_run

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("LOCI_DATA", ROOT.parent / "shared" / "data"))
SHAPE = {"blocks": {"a": LLAMA}}


@pytest.fixture
def run(tmp_path):
    path = write_run(tmp_path / "run", tiny_model(SHAPE))
    add_corpus(path, tmp_path / "corpus")
    return path


def local_tasks(folder: Path) -> Path:
    """A multiple choice, a perplexity and a generation task on files beside them."""
    folder.mkdir()
    items = [{"query": f"{i} plus {i} is", "choices": [" odd", f" {2 * i}", " three"], "label": 1} for i in range(6)]
    (folder / "mc.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    (folder / "text.jsonl").write_text("".join(json.dumps({"page": f"Some text {i}. " * 9}) + "\n" for i in range(4)))
    common = {"dataset_path": "json", "validation_split": "validation", "metadata": {"version": 1.0}}

    def data(name):
        return {"data_files": {"validation": str(folder / name)}, "cache_dir": str(folder / "cache")}

    (folder / "mc.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "tiny_mc",
                "output_type": "multiple_choice",
                "doc_to_text": "{{query}}",
                "doc_to_target": "{{label}}",
                "doc_to_choice": "{{choices}}",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
                "dataset_kwargs": data("mc.jsonl"),
                **common,
            }
        )
    )
    (folder / "ppl.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "tiny_ppl",
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{page}}",
                "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
                "dataset_kwargs": data("text.jsonl"),
                **common,
            }
        )
    )
    (folder / "gen.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "tiny_gen",
                "output_type": "generate_until",
                "doc_to_text": "{{query}}",
                "doc_to_target": "{{choices[label]}}",
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
                "metric_list": [{"metric": "exact_match"}],
                "dataset_kwargs": data("mc.jsonl"),
                **common,
            }
        )
    )
    return folder


def test_corpus_tasks_end_to_end(run, capsys):
    results = evaluate(run, ["corpus"], progress=False)
    stored = json.loads((run / "eval" / "corpus_7.json").read_text())
    assert {"results", "configs", "versions", "n-shot", "n-samples", "config"} <= set(stored)
    values = {(task, metric): value for task, metric, value, _, _ in result_rows(stored)}
    pages = [json.loads(x)["text"] for x in (run / "eval/tasks/corpus_ppl.jsonl").read_text().splitlines()]
    model = open_run(run, "cpu").model
    nats = sum(-_logprob(model, [256], list(p.encode())) for p in pages)
    bits = nats / sum(len(p.encode()) for p in pages) / 0.6931471805599453
    assert values["corpus_ppl", "bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert 0 <= values["corpus_choice", "acc"] <= 1
    assert stored["config"]["step"] == 7
    assert stored["config"]["truncation"]["truncated"] == 0
    print_table(results)
    shown = capsys.readouterr().out
    assert "corpus_choice" in shown
    assert f"{values['corpus_ppl', 'bits_per_byte']:.4f}" in shown


def _logprob(model: LM, context: list[int], cont: list[int]) -> float:
    from tests.test_eval_scoring import plain

    return plain(model, context, cont)[0]


def test_choice_items_are_sound(run):
    folder = corpus_tasks.corpus_tasks(run)
    corpus = corpus_tasks.open_run_corpus(run)
    texts = list(corpus_tasks.documents(corpus.val, corpus.tokenizer))
    items = [json.loads(x) for x in (folder / "corpus_choice.jsonl").read_text().splitlines()]
    assert len(items) > 100
    for item in items:
        assert len(set(item["choices"])) == 4
        assert any(item["context"] + item["choices"][item["label"]] in t for t in texts)
        assert all(24 <= len(c.encode()) <= 32 for c in item["choices"])
    labels = [item["label"] for item in items]
    assert all(labels.count(x) > len(items) / 10 for x in range(4))
    assert items == corpus_tasks.choice_items(texts)
    train = [t for shards, _ in corpus.train for t in corpus_tasks.documents(shards, corpus.tokenizer)]
    assert not any(items[0]["context"] in t for t in train)


def test_corpus_tasks_survive_the_corpus_and_a_move_of_the_run(run, tmp_path):
    corpus_tasks.corpus_tasks(run)
    record = json.loads((run / "data.json").read_text())
    record["dir"] = str(tmp_path / "gone")
    (run / "data.json").write_text(json.dumps(record))
    moved = run.rename(tmp_path / "moved")
    task = yaml.safe_load((corpus_tasks.corpus_tasks(moved) / "corpus_ppl.yaml").read_text())
    assert task["dataset_kwargs"]["data_files"]["test"].startswith(str(moved))
    (moved / "eval/tasks/made_from.json").unlink()
    with pytest.raises(ValueError, match="gone") as caught:
        corpus_tasks.corpus_tasks(moved)
    assert getattr(caught.value, "one_line", False)


def test_local_tasks_need_neither_network_nor_lm_evals_own(tmp_path):
    folder = local_tasks(tmp_path / "tasks")
    assert _all_local(["tiny_*"], [folder])
    assert not _all_local(["tiny_mc", "hellaswag"], [folder])
    manager, names = find_tasks(["tiny_*"], [folder])
    assert names == ["tiny_gen", "tiny_mc", "tiny_ppl"]
    assert len(manager.all_tasks) == 3


def test_every_output_type_with_samples(tmp_path):
    run = tiny_run(tmp_path / "run", SHAPE)
    folder = local_tasks(tmp_path / "tasks")
    options = {"include_path": [folder], "progress": False, "limit": 3}
    results = evaluate(run, ["tiny_mc", "tiny_ppl", "tiny_gen"], log_samples=True, num_fewshot=0, **options)
    assert {row[0] for row in result_rows(results)} == {"tiny_mc", "tiny_ppl", "tiny_gen"}
    assert results["n-samples"]["tiny_mc"]["effective"] == 3
    (file,) = (run.dir / "eval").glob("*_0shot_limit3_7.json")
    assert "samples" not in json.loads(file.read_text())
    samples = file.with_name(f"{file.stem}_samples_tiny_gen.jsonl").read_text().splitlines()
    assert len(samples) == 3
    assert "filtered_resps" in json.loads(samples[0])
    again = evaluate(run, ["tiny_mc", "tiny_ppl", "tiny_gen"], out=tmp_path / "own.json", **options)
    assert again["results"] == results["results"]
    assert again["config"]["cached_results_used"] > 0
    assert (tmp_path / "own.json").is_file()


def test_truncation_is_shown(tmp_path, capsys):
    run = tiny_run(tmp_path / "run", {**LEARNED, "max_seq_len": 16})
    folder = local_tasks(tmp_path / "tasks")
    results = evaluate(run, ["tiny_mc"], include_path=[folder], progress=False, num_fewshot=1)
    print_table(results)
    assert "truncation: 18 of 18 requests cut on the left to 16 tokens" in capsys.readouterr().out
    assert results["config"]["truncation"]["truncated"] == 18


def llama_twin(model: LM):
    """The same weights in transformers' own class."""
    from transformers import LlamaConfig, LlamaForCausalLM

    mixer = model.layers[0].mixer
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.cfg.vocab_size,
            hidden_size=model.cfg.d_model,
            intermediate_size=model.layers[0].channel.down.weight.shape[1],
            num_hidden_layers=model.cfg.n_layers,
            num_attention_heads=mixer.heads,
            num_key_value_heads=mixer.kv_heads,
            max_position_embeddings=4096,
            rms_norm_eps=model.cfg.norm_eps,
            tie_word_embeddings=True,
            bos_token_id=256,
            eos_token_id=256,
        )
    ).eval()
    weights = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    for i, block in enumerate(model.layers):
        at, mixer, channel = f"model.layers.{i}", block.mixer, block.channel
        q, k, v = mixer.qkv.weight.split(mixer.splits)
        gate, up = channel.up.weight.chunk(2)
        weights |= {f"{at}.self_attn.{n}_proj.weight": w for n, w in zip("qkvo", (q, k, v, mixer.out.weight))}
        weights |= {f"{at}.mlp.gate_proj.weight": gate, f"{at}.mlp.up_proj.weight": up}
        weights |= {f"{at}.mlp.down_proj.weight": channel.down.weight}
        weights |= {f"{at}.input_layernorm.weight": mixer.norm.weight}
        weights |= {f"{at}.post_attention_layernorm.weight": channel.norm.weight}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return twin


def assert_equal_to_transformers(run: Path, tasks: list[str], folder: Path, max_length: int, **options) -> None:
    """Ours and `lm_eval --model hf` on the same weights: every response of every request, and every metric."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    opened = open_run(run, "cpu")
    ours = evaluate(
        opened, tasks, include_path=[folder], max_length=max_length, log_samples=True, progress=False, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    theirs = HFLM(pretrained=llama_twin(opened.model), tokenizer=tokenizer, device="cpu", max_length=max_length)
    manager, names = find_tasks(tasks, [folder])
    expected = simple_evaluate(theirs, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
    assert expected is not None
    for task in names:
        for a, b in zip(ours["samples"][task], expected["samples"][task], strict=True):
            assert a["arguments"] == b["arguments"]
            _same(a["resps"], b["resps"])
    for task, metric, value, _, _ in result_rows(ours):
        assert value == pytest.approx(expected["results"][task][f"{metric},none"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [2048, 40])
def test_equal_to_lm_evals_own_transformers_model(run, max_length):
    folder = local_tasks(run.parent / "tasks")
    assert_equal_to_transformers(run, ["tiny_mc", "tiny_ppl", "tiny_gen"], folder, max_length, num_fewshot=1)


STANDARD = {"copa": "super_glue/copa/default.yaml", "boolq": "super_glue/boolq/default.yaml", "sciq": "sciq/sciq.yaml"}


def standard_tasks(folder: Path, items: int) -> Path:
    """COPA, BoolQ and SciQ as lm-eval defines them, wikitext as a rolling task, on files of a local folder."""
    import lm_eval

    folder.mkdir()
    for task, definition in STANDARD.items():
        (source,) = DATA.glob(f"{task}_val.jsonl*")
        with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line, _ in zip(stream, range(items))]
        if task == "boolq":
            rows = [{"label": int(row["answer"]), **row} for row in rows]
        _write_task(folder, task, rows, {"include": f"{Path(lm_eval.__file__).parent}/tasks/{definition}"})
    with gzip.open(DATA / "wikitext-2-raw" / "test.txt.gz", "rt", encoding="utf-8") as stream:
        pages = [{"page": "".join(stream.readline() for _ in range(8))} for _ in range(items // 5)]
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}"}
    metrics = [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    _write_task(folder, "wiki_rolling", pages, {**rolling, "metric_list": metrics})
    return folder


def _write_task(folder: Path, name: str, rows: list[dict], task: dict) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"data_files": {"validation": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
    local = {"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": data}
    splits = {"validation_split": "validation", "training_split": None, "test_split": None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task, **local, **splits}))


@pytest.mark.slow
def test_standard_tasks_equal_to_lm_evals_own_transformers_model(run):
    if not DATA.is_dir():
        pytest.skip(f"no task items in {DATA}; LOCI_DATA names the folder")
    folder = standard_tasks(run.parent / "standard", items=20)
    assert_equal_to_transformers(run, [*STANDARD, "wiki_rolling"], folder, max_length=256)


def _same(ours, theirs):
    if isinstance(ours, float):
        assert ours == pytest.approx(theirs, abs=1e-4 * max(1, abs(theirs) / 100))
    elif isinstance(ours, str | bool):
        assert ours == theirs
    else:
        for a, b in zip(ours, theirs, strict=True):
            _same(a, b)


# -- the command


@pytest.mark.slow
def test_unknown_tasks_are_one_line_with_exit_code_2(run, capsys):
    assert main([str(run), "--tasks", "corpus,helaswag"]) == 2
    assert capsys.readouterr().err.strip().endswith("error: unknown task 'helaswag'; did you mean 'hellaswag'?")
    assert not list((run / "eval").glob("*.json"))


def test_bad_arguments_are_one_line_with_exit_code_2(run, capsys):
    for arguments, words in [
        (["--suite", "smok"], "did you mean 'smoke'"),
        (["--tasks", "corpus", "--batch-size", "many"], "--batch-size"),
        (["--tasks", "corpus", "--include-path", "/nowhere"], "/nowhere"),
        ([], "give --tasks, --suite or both"),
    ]:
        assert main([str(run), *arguments]) == 2
        shown = capsys.readouterr().err.strip().splitlines()
        assert words in shown[-1]
        assert shown[-1].startswith("error: ")
    assert not (run / "eval").exists() or not list((run / "eval").glob("*.json"))
    assert suite("smoke").tasks == ("corpus",)


def test_command_prints_a_table(run):
    command = [sys.executable, "-m", "eval", str(run), "--suite", "smoke", "--limit", "5", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| corpus_choice |" in done.stdout
    assert (run / "eval" / "smoke_limit5_7.json").is_file()
    assert "Traceback" not in done.stderr


def test_evaluation_changes_no_byte_of_the_model(run):
    opened = open_run(run, "cpu")
    before = {k: v.clone() for k, v in opened.model.state_dict().items()}
    evaluate(opened, ["corpus"], limit=4, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in opened.model.state_dict().items())
