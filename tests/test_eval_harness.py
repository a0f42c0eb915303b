"""lm-eval's interface over our model: conventions, truncation, rolling, generation, cache."""

import json

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eval.harness import LociLM
from eval.run import open_run
from models import Batch, UserError
from tests.test_eval_runs import HYBRID, LEARNED, tiny_model, tiny_run, write_run
from tests.test_eval_scoring import plain

EOS = 256


def requests(kind: str, arguments: list) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def harness(run, **options) -> LociLM:
    return LociLM(run, progress=False, **options)


def by_hand(lm: LociLM, context: str, cont: str) -> float:
    pair = lm._encode_pair(context, cont) if context else ([lm.prefix_token_id], lm.tok_encode(cont))
    return plain(lm.model, *pair)[0]


PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " green, they say"),
    ("The sky is ", "blue"),  # the blank moves to the continuation
    ("", "no context at all"),
    ("naïve café", " ☕"),
    ("Question: 1+1?\nAnswer:", " 2"),
    ("Question: 1+1?\nAnswer:", " 3"),
]


def test_loglikelihood_follows_the_conventions_of_lm_eval(tmp_path):
    lm = harness(tiny_run(tmp_path / "run"))
    found = lm.loglikelihood(requests("loglikelihood", PAIRS))
    for (context, cont), (logprob, _) in zip(PAIRS, found):
        assert logprob == pytest.approx(by_hand(lm, context, cont), abs=1e-4)


def test_a_token_that_the_tokenizer_itself_puts_in_front(tmp_path):
    path = write_run(tmp_path / "run", tiny_model())
    content = json.loads((path / "tokenizer" / "tokenizer.json").read_text())
    special = {"id": "<|endoftext|>", "type_id": 0}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": special}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [EOS], "tokens": ["<|endoftext|>"]}},
    }
    (path / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    (path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    lm = harness(open_run(path, "cpu"))
    assert lm.tok_encode("ab") == [EOS, *lm.tok.encode("ab")]
    found = lm.loglikelihood(requests("loglikelihood", [("ab", "c"), ("", "abc")]))
    assert found[0][0] == pytest.approx(plain(lm.model, [EOS, *b"ab"], list(b"c"))[0], abs=1e-4)
    assert found[1][0] == pytest.approx(plain(lm.model, [EOS], list(b"abc"))[0], abs=1e-4)


def test_odd_requests(tmp_path):
    lm = harness(tiny_run(tmp_path / "run"))
    found = lm.loglikelihood(requests("loglikelihood", [("a", ""), ("", ""), ("  ", "b")]))
    assert found[:2] == [(0.0, True), (0.0, True)]
    assert found[2][0] == pytest.approx(plain(lm.model, [EOS], list(b"  b"))[0], abs=1e-4)
    assert lm.loglikelihood([]) == []


def test_truncation_is_on_the_left_counted_and_reported(tmp_path):
    lm = harness(tiny_run(tmp_path / "run", LEARNED))
    long, short = "x" * 30, "ab"
    found = lm.loglikelihood(requests("loglikelihood", [(long, "yes"), (long, "n"), (short, "ok")]))
    window = [ord("x")] * 30
    assert found[0][0] == pytest.approx(plain(lm.model, window[-22:], list(b"yes"))[0], abs=1e-4)
    assert found[1][0] == pytest.approx(plain(lm.model, window[-24:], list(b"n"))[0], abs=1e-4)
    assert found[2][0] == pytest.approx(by_hand(lm, short, "ok"), abs=1e-4)
    info = lm.get_model_info()["truncation"]
    assert (info["requests"], info["truncated"], info["longest"], info["max_length"]) == (3, 2, 32, 24)
    assert "2 of 3 requests cut on the left to 24 tokens (longest: 32)" in (lm.truncation.line() or "")


def test_unbounded_models_are_never_truncated(tmp_path):
    lm = harness(tiny_run(tmp_path / "run"))
    context = "long " * 200
    found = lm.loglikelihood(requests("loglikelihood", [(context, "end")]))
    assert found[0][0] == pytest.approx(by_hand(lm, context, "end"), abs=1e-4)
    assert lm.truncation.line() is None


def test_impossible_lengths_are_one_line(tmp_path):
    run = tiny_run(tmp_path / "run", LEARNED)
    with pytest.raises(UserError, match="--max-length 25 is longer than the context of this model, 24"):
        harness(run, max_length=25)
    with pytest.raises(UserError, match="continuation of 40 tokens is longer than the context of 24"):
        harness(run).loglikelihood(requests("loglikelihood", [("a", "b" * 40)]))


@pytest.mark.parametrize("max_length", [8, 16])
def test_rolling_windows_are_those_of_lm_eval(tmp_path, max_length):
    lm = harness(tiny_run(tmp_path / "run"), max_length=max_length)
    documents = ["a short one", "", "a document that is longer than one window, by far", "x" * max_length]
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(d,) for d in documents]))
    for text, logprob in zip(documents, found):
        windows = get_rolling_token_windows(list(text.encode()), EOS, max_length, 1)
        expected = sum(plain(lm.model, *make_disjoint_window(w))[0] for w in windows)
        assert logprob == pytest.approx(expected, abs=1e-3)


def test_rolling_with_a_carried_state_sees_everything_before(tmp_path):
    lm = harness(tiny_run(tmp_path / "run"), rolling="carry")
    lm.window = 8
    documents = ["a document that is longer than one window", "", "short"]
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(d,) for d in documents]))
    expected = [plain(lm.model, [EOS], list(d.encode()))[0] if d else 0.0 for d in documents]
    assert found == pytest.approx(expected, abs=1e-3)
    with pytest.raises(UserError, match="does not fit the context of 16"):
        harness(lm.run, rolling="carry", max_length=16).loglikelihood_rolling(
            requests("loglikelihood_rolling", [("x" * 17,)])
        )


def test_the_rolling_window_is_the_length_of_training(tmp_path):
    run = tiny_run(tmp_path / "run")
    assert harness(run).window == 2048
    run.config["data"] = {"seq_len": 48}
    assert harness(run).window == 48
    assert harness(run).limit is None


# -- generation


def greedy_by_hand(model, ids: list[int], n: int) -> list[int]:
    ids = list(ids)
    start = len(ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(Batch(torch.tensor([ids]))).logits[0, -1].argmax()))
    return ids[start:]


def text_until_eos(ids: list[int]) -> str:
    ids = ids[: ids.index(EOS)] if EOS in ids else ids
    return bytes(ids).decode("utf-8", "replace")


def test_generation_is_the_greedy_text_up_to_a_stop_string(tmp_path):
    lm = harness(tiny_run(tmp_path / "run"))
    contexts = ["def ", "a", "import os\n", "x = "]
    whole = [text_until_eos(greedy_by_hand(lm.model, list(c.encode()), 20)) for c in contexts]
    plain_kwargs = {"until": [], "max_gen_toks": 20}
    found = lm.generate_until(requests("generate_until", [(c, plain_kwargs) for c in contexts]))
    assert found == whole
    text = max(whole, key=len)
    stop = text[3:6]  # spans tokens: a token is a byte
    kwargs = {"until": [stop, "never seen"], "max_gen_toks": 20}
    found = lm.generate_until(requests("generate_until", [(c, kwargs) for c in contexts]))
    assert found == [w.split(stop)[0] for w in whole]
    assert any(f != w for f, w in zip(found, whole))


def test_sampled_generations_follow_their_seed_and_differ_between_repeats(tmp_path):
    run = tiny_run(tmp_path / "run")
    kwargs = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    asked = requests("generate_until", [("def ", kwargs)] * 3)
    first = harness(run, seed=1).generate_until(asked)
    assert first == harness(run, seed=1).generate_until(asked)
    assert first != harness(run, seed=2).generate_until(asked)
    assert len(set(first)) > 1


def test_prompts_too_long_to_generate_after_are_cut_and_counted(tmp_path):
    lm = harness(tiny_run(tmp_path / "run", LEARNED))
    found = lm.generate_until(requests("generate_until", [("y" * 40, {"until": [], "max_gen_toks": 10})]))
    assert found == [text_until_eos(greedy_by_hand(lm.model, [ord("y")] * 14, 10))]
    assert lm.truncation.truncated == 1
    lm.generate_until(requests("generate_until", [("y", {"until": [], "max_gen_toks": 500})]))
    assert "1 generations shortened" in (lm.truncation.line() or "")


# -- cache


def assert_close(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=1e-4)


def test_an_interrupted_evaluation_continues(tmp_path, monkeypatch):
    run = tiny_run(tmp_path / "run")
    asked = requests("loglikelihood", [(f"context {i % 5}", f" answer {i}") for i in range(20)])
    expected = harness(run, cache=False).loglikelihood(asked)
    features, calls = run.model.features, []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return features(*args, **kwargs)

    monkeypatch.setattr(run.model, "features", counted)
    stop_at = 12
    with pytest.raises(KeyboardInterrupt):
        harness(run, batch_size=1).loglikelihood(asked)
    (file,) = (run.dir / "eval" / "cache").glob("*.jsonl")
    kept = len(file.read_text().splitlines())
    assert 0 < kept < 20
    with file.open("a") as stream:
        stream.write('["torn')  # as a kill in the middle of a write leaves it
    stop_at = -1
    again = harness(run, batch_size=1)
    assert_close(again.loglikelihood(asked), expected)
    assert again.cache.hits == kept
    calls.clear()
    third = harness(run)
    assert_close(third.loglikelihood(asked), expected)
    assert not calls
    assert all(isinstance(json.loads(line), list) for line in file.read_text().splitlines() if line != '["torn')


def test_the_cache_belongs_to_weights_and_settings(tmp_path):
    run = tiny_run(tmp_path / "run")
    other = tiny_run(tmp_path / "other", HYBRID, std=0.1)
    files = {harness(r, max_length=n).cache.path for r in (run, other) for n in (None, 64)}
    assert len({f.name for f in files if f}) == 4
    assert harness(run, cache=False).cache.path is None


def test_generations_and_rolling_are_cached_too(tmp_path, monkeypatch):
    run = tiny_run(tmp_path / "run")
    generations = requests("generate_until", [("def ", {"until": ["\n"], "max_gen_toks": 6})])
    documents = requests("loglikelihood_rolling", [("some text",), ("other text",)])
    first = harness(run)
    expected = first.generate_until(generations), first.loglikelihood_rolling(documents)
    monkeypatch.setattr(run.model, "features", None)
    again = harness(run)
    assert (again.generate_until(generations), again.loglikelihood_rolling(documents)) == expected
