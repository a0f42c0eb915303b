"""A needle in a text: how questions are made, judged by programs that read them, and by a run."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.question import Metric
from configs.schema import RunConfig
from data.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from eval import needle, report, run_page
from eval.ablation_runs import read_metric
from eval.corpus_tasks import open_run_corpus
from eval.needle import Asker, Question, Variant, haystack, measure
from eval.run import open_run
from eval.scoring import Score
from models import Batch, UserError
from models.parsing import from_dict
from tests.runs import PLAIN, one_error, train, write_config
from tests.test_eval_runs import LEARNED, LLAMA, add_corpus, tiny_model, write_run

TEXT = "".join(f"The word after {n} is {n + 1}. Is it? It is, {'and ' * (n % 7)}so on!\n" for n in range(200))
VARIANTS = {
    "plain": Variant(),
    "keys": Variant(keys=6),
    "values": Variant(keys=2, values=2, choices=5),
    "queries": Variant(keys=4, queries=3, choices=3),
}


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else train_bpe([TEXT], 300, progress=False)


def questions(
    tokenizer: Tokenizer, variant: Variant, lengths: Sequence[int] = (600,), samples: int = 20
) -> list[Question]:
    """At depths of a half, three quarters and so on, in rows of text."""
    asker = Asker(tokenizer, haystack(tokenizer, [tokenizer.encode(TEXT)], 1, 1), variant, 5, 0)
    return [q for length in lengths for depth in range(5) for n in range(samples) for q in asker.ask(length, depth, n)]


def accuracy(tokenizer: Tokenizer, variant: Variant, numbers, samples: int = 8) -> dict:
    """Of a judge to whom those choices are likely that ``numbers(context)`` finds, and the first of them would be written."""

    def judge(requests):
        for context, choice in requests:
            found, said = numbers(tokenizer.decode(context)), tokenizer.decode(choice).strip()
            yield Score(0.0 if said in found else -1.0, said == found[0])

    return measure(
        questions(tokenizer, variant, samples=samples), variant, np.linspace(0, 1, 5), lambda r: list(judge(r))
    )


def read(context: str) -> list[str]:
    """The numbers of the city that is asked for last."""
    city = re.search(r"of (\w+) is$", context)
    assert city
    return re.findall(rf"secret numbers? of {city[1]} is (\d{{5}})", context)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_reading_answers_everything_and_presence_does_not(tokenizer: Tokenizer, variant: Variant):
    found = accuracy(tokenizer, variant, read)
    assert (found["accuracy"], found["exact"]) == (1, 1)
    assert found["answers"] == 5 * 8 * variant.queries
    # Any number that is in the context: enough with one needle; else the wrong ones are there too.
    anything = accuracy(tokenizer, variant, lambda context: re.findall(r"\d{5}", context))
    assert (anything["accuracy"] == 1) == (variant.keys == 1)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_chance(variant: Variant):
    asked = questions(ByteTokenizer(), variant, samples=40)
    drawn = np.random.default_rng(0).random(1 << 16).tolist()
    found = measure(
        asked, variant, np.linspace(0, 1, 5), lambda requests: [Score(drawn.pop(), False) for _ in requests]
    )
    assert found["accuracy"] == pytest.approx(variant.guess, abs=5 * 0.5 / len(asked) ** 0.5)
    assert found["exact"] == 0
    if variant.values == 1:
        assert found["stderr"] == pytest.approx((variant.guess * (1 - variant.guess) / len(asked)) ** 0.5, rel=0.2)
    assert [*found["by"]["depth"]] == ["0%", "25%", "50%", "75%", "100%"]
    # Nothing can be told apart: no answer is right.
    equal = measure(asked, variant, np.linspace(0, 1, 5), lambda requests: [Score(-1.0, False) for _ in requests])
    assert equal["accuracy"] <= max(0.0, 2 * variant.values / variant.choices - 1)


def test_questions_of_one_row_are_not_taken_as_independent(tokenizer: Tokenizer):
    """All of a row right or all wrong: as certain as one question a row would be."""
    variant = Variant(keys=4, queries=4)
    asked = questions(tokenizer, variant, samples=8)
    is_good = np.repeat(np.arange(len(asked) // 4) % 2 == 0, 4)
    scores = [Score(float(good == (n == 0)), False) for good in is_good for n in range(variant.choices)]
    found = measure(asked, variant, np.linspace(0, 1, 5), lambda _: scores)
    assert found["accuracy"] == is_good.mean()
    assert found["stderr"] == pytest.approx(np.std(is_good[::4], ddof=1) / (len(asked) / 4) ** 0.5)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_questions_are_what_they_say(tokenizer: Tokenizer, variant: Variant):
    """A piece of the text with needles between its sentences, as long as was asked for to the token."""
    count, behind = variant.queries, []
    for start, q in enumerate(found := questions(tokenizer, variant, lengths=(500, 640), samples=4)):
        assert q.context[0] == tokenizer.bos_id
        assert len({tuple(choice) for choice in q.choices}) == len(q.choices) == variant.choices
        if (start + 1) % count == 0:  # the last question of its row
            assert len(q.context) + max(map(len, q.choices)) == q.length
        whole = tokenizer.decode(q.context[1:])
        text, asked = whole[: whole.rindex("\nThe" if variant.values == 1 else "\nOne")], read(whole)
        assert [tokenizer.decode(choice) for choice in q.choices[: variant.values]] in (
            [f" {number}" for number in numbers] for numbers in (asked[: variant.values], asked[: variant.values][::-1])
        )
        hidden = re.findall(r" (?:The|One of the) secret numbers? of \w+ is \d{5}\.", text)
        assert len(hidden) == variant.keys * variant.values
        bare = text
        for sentence in hidden:
            bare = bare.replace(sentence, "")
        assert bare.strip("\ufffd") in TEXT + "\n\n"
        behind += [text[at - 1] in ".!?\n" for sentence in hidden if (at := text.index(sentence))]
    assert np.mean(behind) > 0.3  # where a sentence ends near the place; a place at random is seldom one
    depths = [q.depth for q in found[::count]]
    assert depths == [depth for depth in range(5) for _ in range(4)] * 2


def test_where_sentences_end():
    words = ByteTokenizer()
    text = haystack(words, [words.encode("ab. cd"), words.encode("e!")], 8, 9)
    assert bytes(text.tokens.tolist()) == b"ab. cd\n\ne!\n\n"
    assert text.ends.tolist() == [3, 7, 8, 10, 11, 12]
    assert [text.between_sentences(place, 2) for place in (0, 2, 3, 5, 6, 7)] == [0, 2, 3, 3, 6, 7]
    assert text.between_sentences(6, 3) == 3
    with pytest.raises(UserError, match="the text has 4 tokens, and the longest row 5"):
        haystack(words, [words.encode("ab")], 5, 5)


# -- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of large random weights that has a corpus."""
    folder = tmp_path_factory.mktemp("needle")
    path = write_run(folder / "run", tiny_model(), seq_len=64)
    add_corpus(path, folder)
    return path


def test_a_run_is_judged(run: Path):
    """As scored one choice at a time, from a tokenizer and logits alone."""
    loaded, variant = open_run(run, "cpu"), Variant(keys=2, queries=2)
    results = needle.evaluate(loaded, [200, 260], 3, 2, variant)
    text = haystack(loaded.tokenizer, needle.held_out(open_run_corpus(run)), 260, 260 * needle.PIECES)
    asker = Asker(loaded.tokenizer, text, variant, 3, 0)
    right, exact = [], []
    for length in (200, 260):
        for q in [q for depth in range(3) for n in range(2) for q in asker.ask(length, depth, n)]:
            scores = []
            for choice in q.choices:
                row = torch.tensor([q.context + choice])
                logits = loaded.model(Batch(row[:, :-1]), logits="all").logits[0, len(q.context) - 1 :].double()
                scores.append(logits.log_softmax(-1).gather(1, row[0, len(q.context) :, None]).sum().item())
                if choice is q.choices[0]:
                    exact.append(logits.argmax(-1).tolist() == choice)
            right.append(scores.index(max(scores)) == 0)
    assert results["accuracy"] == pytest.approx(np.mean(right))
    assert results["exact"] == pytest.approx(np.mean(exact))
    rows = np.mean([right[::2], right[1::2]], axis=0)
    assert results["stderr"] == pytest.approx(np.std(rows, ddof=1) / len(rows) ** 0.5)
    stored = json.loads((run / "eval" / "needle_keys-2_queries-2_7.json").read_text())
    assert stored == json.loads(json.dumps(results))
    assert stored["results"]["needle_keys-2_queries-2"]["acc,none"] == results["accuracy"]
    assert stored["n-samples"]["needle_keys-2_queries-2"]["effective"] == len(right) == 2 * 3 * 2 * 2
    for by in results["by"].values():
        assert sum(one["answers"] for one in by.values()) == len(right)
        total = sum(one["answers"] * one["accuracy"] for one in by.values())
        assert total / len(right) == pytest.approx(results["accuracy"])
    metric = Metric("eval/needle_keys-2_queries-2/by/length/260/accuracy")
    assert read_metric(metric, run, 7) == results["by"]["length"]["260"]["accuracy"]


def test_in_a_picture_on_the_page_of_the_run(run: Path):
    """Also with cells in which nothing was asked, and of one question alone."""
    image = pytest.importorskip("matplotlib.image")
    needle.evaluate(open_run(run, "cpu"), [200], 1, 1)
    found = json.loads((run / "eval" / "needle_7.json").read_text())
    assert (found["stderr"], found["answers"]) == (0, 1)
    found["by"]["length"]["260"] = {"accuracy": 0.0, "exact": 0.0, "answers": 0}
    drawn = io.BytesIO()
    needle.draw(found, drawn)
    drawn.seek(0)
    assert image.imread(drawn)[..., :3].std() > 0.02
    source = run_page.page(run, {})
    assert source.count("data:image/png") == len([*(run / "eval").glob("needle*.json")])


def test_the_command_on_an_exported_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It has no held-out text of its own, and any file will do."""
    from models.hf import export_run

    plain = write_run(tmp_path / "plain", tiny_model({"blocks": {"only": LLAMA}}))
    export_run(plain, tmp_path / "exported")
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["--lengths", "160, 200", "--depths", "2", "--samples", "1", "--choices", "2"]
    assert needle.main([str(tmp_path / "exported"), *words, "--text", str(tmp_path / "text.txt")]) == 0
    said = capsys.readouterr().out
    assert "| needle_choices-2: tokens | depth 0% | depth 100% |" in said
    assert "over 4 questions: accuracy " in said
    assert "guessing: 0.5000" in said
    assert needle.main([str(tmp_path / "exported"), *words]) == 2
    assert "no data.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "a"], "expected numbers with commas between them, got 'a'"),
        (["--lengths", "60"], "lengths: needles and questions alone are "),
        (["--lengths", "200000"], "tokens, and the longest row 200000"),
        (["--depths", "0"], "--depths must be at least 1"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--choices", "1"], "values must lie between 1 and 0, got 1"),
        (["--values", "4"], "values must lie between 1 and 3, got 4"),
        (["--queries", "2"], "queries must lie between 1 and 1, got 2"),
        (["--keys", "33"], "keys must lie between 1 and 32, got 33"),
        (["--text", "nowhere.txt"], "cannot read 'nowhere.txt'"),
    ],
)
def test_refused(run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    assert needle.main([str(run), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_reach_is_the_longest_row_that_is_not_refused(run: Path):
    loaded, corpus = open_run(run, "cpu"), open_run_corpus(run)
    longest, why = needle.reach(loaded.model.cfg, corpus)
    assert why == f"the held-out text has {longest} tokens"
    (asked,), _ = needle.questions(corpus.tokenizer, needle.held_out(corpus), [longest], 1, 1)
    assert asked.length == longest
    with pytest.raises(UserError, match=f"the text has {longest} tokens, and the longest row {longest + 1}"):
        needle.questions(corpus.tokenizer, needle.held_out(corpus), [longest + 1], 1, 1)


def test_learned_positions_end(run: Path, tmp_path: Path):
    learned = open_run(write_run(tmp_path / "run", tiny_model(LEARNED)), "cpu")
    with pytest.raises(UserError, match="lengths: 32 is longer than the learned positions, 24"):
        needle.evaluate(learned, [16, 32])
    found = needle.reach(learned.model.cfg, open_run_corpus(run))
    assert found == (24, "the model has only 24 learned positions")


# -- when a run ends


def test_a_run_is_judged_at_its_end_or_refused_before_it_starts(tmp_path: Path):
    """As the command's defaults judge it; a row that the held-out text, a question or the positions do not fit is refused."""
    path = write_config(tmp_path, PLAIN, eval={"needle": [200]})
    ran = train(path)
    assert "| 200 (longer than trained at) |" in ran.out
    (file,) = (ran.run / "eval").glob("needle_*.json")
    stored = json.loads(file.read_text())
    assert stored["answers"] == needle.DEPTHS * needle.SAMPLES
    assert stored["config"] == {
        **{"step": 12, "trained_length": 32, "text": None, "samples": needle.SAMPLES, "seed": 0},
        **asdict(Variant()),
    }
    assert report.summary(ran.run)["eval"] == {"needle/acc": stored["accuracy"]}
    one_error(
        train(path, "name=refused", "eval.needle=[100000]"),
        "tokens, and the longest row 100000",
        "eval.needle: the text",
    )
    one_error(train(path, "name=refused", "eval.needle=[30]"), "eval.needle: lengths: needles and questions alone are")
    learned = ("model.learned_positions=true", "model.max_seq_len=64")
    one_error(train(path, "name=refused", *learned), "lengths: 200 is longer than the learned positions, 64")
    assert not (tmp_path / "runs" / "refused").exists()


def test_a_task_is_no_text():
    raw = {"model": PLAIN, "data": {"synthetic": {"kind": "mqar"}, "seq_len": 64}, "eval": {"needle": [512]}}
    with pytest.raises(UserError, match=r"eval\.needle judges text"):
        from_dict(RunConfig, raw)
