"""Is one sentence found again in a long text? ``python -m eval.needle RUN --lengths 512,1024 --depths 5``.

A piece of held-out text is the haystack; a sentence of its own, "The secret number of Paris is 48213.", is put into it at some
depth, and the context ends with "The secret number of Paris is". Judged by log-likelihoods alone, so that a model need not follow
instructions: the right number among others, and whether greedy decoding would write it. The variants are those of RULER
(arXiv:2404.06654, section 3.1): more needles than are asked for, several numbers of one city, several questions, each after the
right answer to the one before.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data import Corpus
from data.tokenizer import Tokenizer
from eval.corpus_tasks import open_run_corpus
from eval.inspection.figures import new_figure
from eval.run import LoadedRun, open_run
from eval.scoring import Ids, Score, Scorer
from eval.tables import markdown
from models import UserError, zoo
from models.config import ModelConfig
from models.errors import guard
from training.runfolder import write_whole

LENGTHS = (512, 1024)
DEPTHS = 5
SAMPLES = 20
PIECES = 16  # a haystack that is this many times as long as a row is cut into different enough pieces
CITIES = (
    *("Amsterdam", "Athens", "Bangkok", "Berlin", "Boston", "Brussels", "Budapest", "Cairo", "Chicago", "Copenhagen"),
    *("Delhi", "Dublin", "Geneva", "Hamburg", "Havana", "Helsinki", "Istanbul", "Jakarta", "Lagos", "Lima", "Lisbon"),
    *("London", "Madrid", "Milan", "Moscow", "Nairobi", "Oslo", "Paris", "Prague", "Rome", "Tokyo", "Vienna"),
)
ONE, ONE_OF = "The secret number of {city} is", "One of the secret numbers of {city} is"
NUMBERS = (10_000, 100_000)
GAP = "\n\n"  # after each document
SENTENCE_END = re.compile(r"[.!?\n]\s*$")
DARK = 0.35  # from the middle of a scale of length 1: from there on numbers in a picture are white
NEAR = 0.05  # of a haystack: how far a needle is moved back at most to stand between two sentences


@dataclass(frozen=True)
class Variant:
    """What is hidden and asked for. Raises UserError."""

    choices: int = 4  # numbers that are compared, the right ones among them
    keys: int = 1  # cities with a needle; the numbers of those not asked for are the first wrong choices
    values: int = 1  # numbers of each city, each in a needle of its own
    queries: int = 1  # cities asked for, one after the other

    def __post_init__(self) -> None:
        for name, most in (("keys", len(CITIES)), ("values", self.choices - 1), ("queries", self.keys)):
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"{name} must lie between 1 and {most}, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        """Of its results: what differs from one needle and one question."""
        plain = asdict(Variant())
        return "_".join(("needle", *(f"{k}-{v}" for k, v in asdict(self).items() if v != plain[k])))

    @property
    def guess(self) -> float:
        """The accuracy of a choice at random."""
        return self.values / self.choices


class Question(NamedTuple):
    context: list[int]
    choices: list[list[int]]  # the first ``Variant.values`` are right
    length: int  # tokens of the whole row
    depth: int  # of the needle: the nearest of the depths asked for, by its number


class Haystack(NamedTuple):
    tokens: np.ndarray  # int64 [N]
    ends: np.ndarray  # int64 [n], rising: places in front of which a sentence ends

    def between_sentences(self, place: int, near: int) -> int:
        """The last place between two sentences up to ``place``, if there is one at most ``near`` tokens before it; else it."""
        at = int(np.searchsorted(self.ends, place, side="right"))
        return int(self.ends[at - 1]) if at and self.ends[at - 1] >= place - near else place


def haystack(tokenizer: Tokenizer, documents: Iterable[list[int]], least: int, enough: int) -> Haystack:
    """Documents with an empty line between them, until there are ``enough`` tokens. Raises UserError for less than ``least``."""
    gap = tokenizer.encode(GAP)
    found: list[int] = []
    for tokens in documents:
        found += [*tokens, *gap]
        if len(found) >= enough:
            break
    if len(found) < least:
        raise UserError(f"the text has {len(found)} tokens, and the longest row {least}")
    closing = [token for token in set(found) if SENTENCE_END.search(tokenizer.decode([token]))]
    tokens = np.array(found, dtype=np.int64)
    return Haystack(tokens, np.flatnonzero(np.isin(tokens, closing)) + 1)


class Asker:
    """Hides needles in pieces of a haystack and asks for them; a question is a function of the seed and its own place."""

    def __init__(self, tokenizer: Tokenizer, text: Haystack, variant: Variant, depths: int, seed: int) -> None:
        self.tokenizer, self.text, self.variant, self.seed = tokenizer, text, variant, seed
        self.grid = np.linspace(0, 1, depths) if depths > 1 else np.array([0.5])

    def ask(self, length: int, depth: int, sample: int) -> list[Question]:
        """The questions of one row of ``length`` tokens, its first needle at ``grid[depth]``. Raises UserError when nothing of a
        haystack fits."""
        v, rng = self.variant, np.random.Generator(np.random.PCG64([self.seed, length, depth, sample]))
        cities = rng.choice(CITIES, v.keys, replace=False).tolist()
        count = v.keys * v.values
        drawn = (rng.choice(NUMBERS[1] - NUMBERS[0], count + v.choices, replace=False) + NUMBERS[0]).tolist()
        numbers = [drawn[i * v.values : (i + 1) * v.values] for i in range(v.keys)]
        needles = [self._ids(f" {self._stem(c)} {n}.") for c, some in zip(cities, numbers) for n in some]
        asked = self._chain(cities, numbers, drawn[count:])
        last, choices = asked[-1]
        room = length - 1 - sum(map(len, needles)) - len(last) - max(map(len, choices))
        if room < 1:
            raise UserError(f"lengths: needles and questions alone are {length - room} tokens, more than {length}")
        at = np.concatenate([self.grid[depth : depth + 1], rng.random(count - 1)])
        front, places = self._hidden(needles, at, room, rng)
        nearest = np.abs(places[:: v.values, None] / room - self.grid).argmin(axis=1)  # of each city's first needle
        return [Question(front + asks, these, length, int(n)) for (asks, these), n in zip(asked, nearest)]

    def _stem(self, city: str) -> str:
        return (ONE if self.variant.values == 1 else ONE_OF).format(city=city)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def _chain(
        self, cities: list[str], numbers: list[list[int]], spare: list[int]
    ) -> list[tuple[list[int], list[list[int]]]]:
        """-> for each question: all that is said from the end of the haystack on, and the choices."""
        found, said = [], "\n"
        for i in range(self.variant.queries):
            said += self._stem(cities[i])
            wrong = [n for other in numbers[:i] + numbers[i + 1 :] for n in other] + spare
            options = (numbers[i] + wrong)[: self.variant.choices]
            asks = self._ids(said)
            # Encoded as they stand, since a tokenizer may see a word after a text in another way than alone.
            found.append((asks, [self._ids(f"{said} {number}")[len(asks) :] for number in options]))
            said += f" {numbers[i][0]}. "
        return found

    def _hidden(
        self, needles: list[list[int]], at: np.ndarray, room: int, rng: np.random.Generator
    ) -> tuple[list[int], np.ndarray]:
        """-> the beginning of text and ``room`` tokens of the haystack with the needles at depths ``at``, and where each is."""
        start, near = int(rng.integers(0, len(self.text.tokens) - room + 1)), int(NEAR * room)
        wanted = [start + round(d * room) for d in at.tolist()]
        places = np.array([self.text.between_sentences(place, min(near, place - start)) for place in wanted])
        row, done = [self.tokenizer.bos_id], start
        for n in np.argsort(places, kind="stable").tolist():
            row += self.text.tokens[done : places[n]].tolist() + needles[n]
            done = int(places[n])
        return row + self.text.tokens[done : start + room].tolist(), places - start


def questions(
    tokenizer: Tokenizer,
    documents: Iterable[list[int]],
    lengths: Sequence[int],
    depths: int = DEPTHS,
    samples: int = SAMPLES,
    variant: Variant | None = None,
    seed: int = 0,
) -> tuple[list[Question], np.ndarray]:
    """-> (every question, the depths). Raises UserError where a row is too long for the documents or too short for a question."""
    longest = max(lengths)
    text = haystack(tokenizer, documents, longest, longest * PIECES)
    asker = Asker(tokenizer, text, variant or Variant(), depths, seed)
    rows = [(length, depth, n) for length in lengths for depth in range(depths) for n in range(samples)]
    return [q for row in rows for q in asker.ask(*row)], asker.grid


Judge = Callable[[Sequence[tuple[Ids, Ids]]], Sequence[Score]]


def measure(questions: Sequence[Question], variant: Variant, depths: np.ndarray, judge: Judge) -> dict[str, Any]:
    """-> {"accuracy", "exact", "answers", "stderr", "by": {"length", "depth", "length-depth": {label: the first three}}}.

    accuracy: how many of the right numbers are among the as many most likely choices; exact: how many of the questions greedy
    decoding would answer with a right number; stderr: of the accuracy, over rows, since questions of one row are not independent
    (so rows must be whole).
    """
    scores = iter(judge([(q.context, choice) for q in questions for choice in q.choices]))
    groups: dict[tuple[str, str], list[tuple[float, bool]]] = {}
    for q in questions:
        found = [next(scores) for _ in q.choices]
        # Of equal ones the wrong ones first.
        best = sorted(range(len(found)), key=lambda i: (-found[i].logprob, i < variant.values))[: variant.values]
        right = sum(i < variant.values for i in best) / variant.values
        exact = any(score.greedy for score in found[: variant.values])
        length, depth = str(q.length), f"{100 * depths[q.depth]:.0f}%"
        for key in (("", ""), ("length", length), ("depth", depth), ("length-depth", f"{length}-{depth}")):
            groups.setdefault(key, []).append((right, exact))
    by: dict[str, dict[str, Any]] = {}
    for (name, label), judged in groups.items():
        mean = np.mean(judged, axis=0).tolist()
        by.setdefault(name, {})[label] = {"accuracy": mean[0], "exact": mean[1], "answers": len(judged)}
    # Later questions are about needles anywhere, so their depths do not come in order.
    labels = [f"{100 * depth:.0f}%" for depth in depths]
    by["depth"] = {label: by["depth"][label] for label in labels if label in by["depth"]}
    rows = np.reshape([right for right, _ in groups["", ""]], (-1, variant.queries)).mean(axis=1)
    spread = np.std(rows, ddof=min(1, len(rows) - 1))
    return {**by.pop("")[""], "stderr": float(spread / len(rows) ** 0.5), "by": by}


def evaluate(
    run: LoadedRun,
    lengths: Sequence[int] = LENGTHS,
    depths: int = DEPTHS,
    samples: int = SAMPLES,
    variant: Variant | None = None,
    text: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """`measure` on haystacks from the run's held-out documents, or from a file's text -> results, laid out as lm-eval's and written
    to ``RUN/eval/<variant>_<step>.json``. ``samples``: haystacks for each length and depth. Raises UserError."""
    variant, tokenizer = variant or Variant(), run.tokenizer
    check(run.model.cfg, lengths)
    documents = held_out(open_run_corpus(run.dir)) if text is None else [_file(text, tokenizer)]
    asked, grid = questions(tokenizer, documents, lengths, depths, samples, variant, seed)
    found = measure(asked, variant, grid, lambda pairs: _scores(run, pairs))
    metrics = {"acc,none": found["accuracy"], "acc_stderr,none": found["stderr"], "exact,none": found["exact"]}
    results = {
        "results": {variant.name: {"alias": variant.name, **metrics}},
        "n-samples": {variant.name: {"original": found["answers"], "effective": found["answers"]}},
        "config": {
            "step": run.step,
            "trained_length": run.trained_length,
            "text": None if text is None else str(text),
            "samples": samples,
            "seed": seed,
            **asdict(variant),
        },
        "guess": variant.guess,
        **found,
    }
    target = run.dir / "eval" / f"{variant.name}_{run.step}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, json.dumps(results, indent=1) + "\n")
    return results


def reach(model: ModelConfig, corpus: Corpus) -> tuple[int, str]:
    """-> (the longest row in tokens that a model and its held-out text allow, what ends it there)."""
    text = int(corpus.val.lengths.sum()) + len(corpus.val) * len(corpus.tokenizer.encode(GAP))
    if model.learned_positions and model.max_seq_len < text:
        return model.max_seq_len, f"the model has only {model.max_seq_len} learned positions"
    return text, f"the held-out text has {text} tokens"


def check(model: ModelConfig, lengths: Sequence[int]) -> None:
    """Raise UserError for lengths that the model cannot take."""
    if model.learned_positions and max(lengths) > model.max_seq_len:
        raise UserError(f"lengths: {max(lengths)} is longer than the learned positions, {model.max_seq_len}")


def _scores(run: LoadedRun, requests: Sequence[tuple[Ids, Ids]]) -> list[Score]:
    """In the order of the requests."""
    found: dict[int, Score] = {}
    with tqdm(total=len(requests), desc="choices", leave=False, disable=None) as bar:
        for batch in Scorer(run.model).score(requests):
            found |= dict(batch)
            bar.update(len(batch))
    return [found[i] for i in range(len(requests))]


def held_out(corpus: Corpus) -> Iterable[list[int]]:
    """The tokens of each document of the validation split."""
    return (corpus.val.read(doc).tolist() for doc in range(len(corpus.val)))


def _file(text: Path, tokenizer: Tokenizer) -> list[int]:
    try:
        return tokenizer.encode(text.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text: cannot read '{text}': {error}") from error


def table(results: dict[str, Any]) -> str:
    """Accuracy by length and depth, and what guessing would give."""
    (name,), by, trained = results["results"], results["by"], results["config"]["trained_length"]
    rows = [
        (
            f"{length}{' (longer than trained at)' if trained and int(length) > trained else ''}",
            *(by["length-depth"].get(f"{length}-{depth}", {}).get("accuracy") for depth in by["depth"]),
            *ends,
        )
        for length, one in by["length"].items()
        if (ends := (one["accuracy"], one["exact"]))
    ]
    head = (f"{name}: tokens", *(f"depth {depth}" for depth in by["depth"]), "all", "greedy exact")
    return (
        f"{markdown(head, rows)}\nover {results['answers']} questions: accuracy {results['accuracy']:.4f} "
        f"(standard error {results['stderr']:.4f}), greedy exact {results['exact']:.4f}; guessing: {results['guess']:.4f}"
    )


def draw(results: dict[str, Any], where: IO[bytes]) -> None:
    """The table as a picture (PNG): white is guessing, blue better, red worse."""
    from matplotlib.colors import CenteredNorm

    by, guess = results["by"], results["guess"]
    shares = [
        [by["length-depth"].get(f"{n}-{d}", {}).get("accuracy", np.nan) for d in by["depth"]] for n in by["length"]
    ]
    figure = new_figure(3 + 0.8 * len(by["depth"]), 1.8 + 0.45 * len(shares))
    axes = figure.add_subplot()
    image = axes.imshow(shares, "RdBu", aspect="auto", norm=CenteredNorm(guess, max(guess, 1 - guess)))
    for (row, column), share in np.ndenumerate(np.array(shares)):
        color = "white" if abs(image.norm(share) - 0.5) > DARK else "black"
        axes.text(column, row, "" if np.isnan(share) else f"{share:.2f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(by["depth"])), by["depth"])
    axes.set_yticks(range(len(shares)), by["length"])
    axes.set(xlabel="depth of the needle", ylabel="tokens", title=f"accuracy (guessing: {guess:.2f})")
    figure.colorbar(image, ax=axes).ax.set_ylim(0, 1)
    figure.savefig(where, format="png")


@guard
def main(argv: list[str] | None = None) -> int:
    plain = Variant()
    p = argparse.ArgumentParser(
        prog="python -m eval.needle",
        description="Whether a model finds a sentence again that was put into a long text.",
        epilog="example: python -m eval.needle runs/quickstart --lengths 512,1024 --depths 5 --keys 4",
    )
    p.add_argument("run", help="a run folder, or a model in Hugging Face format")
    default = ",".join(map(str, LENGTHS))
    p.add_argument(
        "--lengths", default=default, help="tokens of haystack, needles and questions (default: %(default)s)"
    )
    p.add_argument("--depths", type=int, default=DEPTHS, help="from the first place to the last (default: %(default)s)")
    p.add_argument("--samples", type=int, default=SAMPLES, help="for each length and depth (default: %(default)s)")
    p.add_argument("--choices", type=int, default=plain.choices, help="numbers to choose from (default: %(default)s)")
    p.add_argument(
        "--keys", type=int, default=plain.keys, help="cities with a number in the text (default: %(default)s)"
    )
    p.add_argument("--values", type=int, default=plain.values, help="numbers of each city (default: %(default)s)")
    p.add_argument("--queries", type=int, default=plain.queries, help="cities asked for (default: %(default)s)")
    p.add_argument("--text", type=Path, metavar="FILE", help="another text than the run's held-out documents")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--step", type=int, help="an older checkpoint")
    p.add_argument("--allow-foreign", action="store_true", help="let a config run code from outside this repository")
    args = p.parse_args(argv)
    for name, low in (("depths", 1), ("samples", 1), ("seed", 0)):
        if getattr(args, name) < low:
            raise UserError(f"--{name} must be at least {low}, got {getattr(args, name)}")
    words = [word.strip() for word in args.lengths.split(",")]
    if not all(word.isdigit() for word in words):
        raise UserError(f"--lengths: expected numbers with commas between them, got '{args.lengths}'")
    variant = Variant(args.choices, args.keys, args.values, args.queries)
    zoo.allow_foreign(args.allow_foreign)
    run = open_run(args.run, args.device, step=args.step)
    lengths = [int(word) for word in words]
    print(table(evaluate(run, lengths, args.depths, args.samples, variant, args.text, args.seed)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
