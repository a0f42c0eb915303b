"""lm-eval's model interface over our own model and state. Importing this module imports lm-eval."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tokenizers
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from data.tokenizer import Tokenizer
from eval.cache import ResultCache, cache_key, request_key
from eval.decoding import generate
from eval.run import LoadedRun
from eval.scoring import Ids, Score, Scorer
from eval.streams import StopStrings, cut_at
from models import UserError
from models.types import count_params

ROLLING_WINDOW = 2048  # when neither the model nor the run says how long a context may be, as in lm-eval
MAX_NEW = 256  # generated tokens when a task says nothing, as in lm-eval


@dataclass
class Truncation:
    """What did not fit the context: counted, shown and stored with the results, never silent."""

    requests: int = 0
    truncated: int = 0  # lost tokens on the left
    longest: int = 0  # tokens that a request would have needed
    max_length: int | None = None
    generations_shortened: int = 0  # wanted more new tokens than half of the context

    def line(self) -> str | None:
        if not self.truncated and not self.generations_shortened:
            return None
        cut = f"{self.truncated} of {self.requests} requests cut on the left to {self.max_length} tokens"
        short = f"{self.generations_shortened} generations shortened" if self.generations_shortened else None
        return "truncation: " + ", ".join(x for x in (f"{cut} (longest: {self.longest})", short) if x)


class LociLM(TemplateLM):
    """Log-likelihoods, rolling log-likelihoods and generations of a run.

    ``max_length``: most tokens that one forward may see; the default is the model's own limit, and None means that
    there is none. ``rolling``: ``windows`` cuts documents as `lm_eval --model hf` does, ``carry`` reads each once with
    its state carried along. ``batch_size``: ``auto`` or a number of rows. Scores equal those of scoring one by one.
    """

    def __init__(
        self,
        run: LoadedRun,
        batch_size: int | str = "auto",
        max_length: int | None = None,
        rolling: str = "windows",
        cache: bool = True,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.run, self.model, self.tok = run, run.model, run.tokenizer
        own = self.model.cfg.max_seq_len or None
        if max_length is not None and own is not None and max_length > own:
            raise UserError(f"--max-length {max_length} is longer than the context of this model, {own}")
        if max_length is not None and max_length < 1:
            raise UserError(f"--max-length must be at least 1, got {max_length}")
        if rolling not in ("windows", "carry"):
            raise UserError(f"unknown rolling mode '{rolling}'; valid: windows, carry")
        self.limit = max_length or own
        self.window = self.limit or run.trained_length or ROLLING_WINDOW
        self.rolling, self.batch_size, self.seed, self.progress = rolling, batch_size, seed, progress
        self._device = self.model.embed.weight.device
        self.scorer = Scorer(self.model, batch_size)
        self.truncation = Truncation(max_length=self.limit)
        dtype = self.model.embed.weight.dtype
        key = cache_key(run.checkpoint, self.tok.fingerprint, self.limit, dtype)
        self.cache = ResultCache(run.dir / "eval" / "cache" / f"{key}.jsonl" if cache else None)
        self._added = _tokens_added_in_front(self.tok)

    # -- what lm-eval asks about the model

    @property
    def eot_token_id(self) -> int:
        return self.tok.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tok.bos_id

    @property
    def max_length(self) -> int:
        return self.window

    @property
    def tokenizer_name(self) -> str:
        return self.tok.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a string, with what the tokenizer itself puts in front of a text unless told not to."""
        return self._encode_many([string], add_special_tokens is not False)[0]

    def _encode_many(self, strings: Sequence[str], specials: bool = True) -> list[list[int]]:
        front = self._added if specials else []
        return [front + ids for ids in self.tok.encode_batch(list(strings))]

    def get_model_info(self) -> dict[str, Any]:
        """Goes into ``config`` of the results, after the requests have run."""
        return {
            "run": self.run.name,
            "step": self.run.step,
            "checkpoint": self.run.checkpoint,
            "model_num_parameters": count_params(self.model),
            "model_dtype": str(self.model.embed.weight.dtype).removeprefix("torch."),
            "max_length": self.limit,
            "rolling": self.rolling,
            "rolling_window": self.window,
            "truncation": asdict(self.truncation),
            "cached_results_used": self.cache.hits,
        }

    # -- log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(context, continuation) -> (log p in nats, is it the greedy continuation)."""
        pairs = self._encode_pairs([_two(r.args) for r in requests])
        tokens = [(_two(r.args), ctx, cont) for r, (ctx, cont) in zip(requests, pairs)]
        return self._loglikelihood_tokens(tokens, disable_tqdm=disable_tqdm)

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """`TemplateLM.loglikelihood` and `_encode_pair`, each distinct text encoded once and all of them together."""
        moved = []
        for context, cont in pairs:  # blanks between context and continuation belong to the continuation
            bare = context.rstrip()
            moved.append((bare, context[len(bare) :] + cont))
        texts = list(dict.fromkeys(t for c, k in moved if c for t in (c, c + k)))
        ids = dict(zip(texts, self._encode_many(texts)))
        bare = list(dict.fromkeys(k for c, k in moved if not c))
        alone = dict(zip(bare, self._encode_many(bare, specials=False)))
        found = []
        for context, cont in moved:
            if context:
                found.append((ids[context], ids[context + cont][len(ids[context]) :]))
            elif alone[cont][:1] == [self.prefix_token_id]:
                found.append((alone[cont][:1], alone[cont][1:]))
            else:
                found.append(([self.prefix_token_id], alone[cont]))
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        fitted = [self._fit(ctx, cont) for _, ctx, cont in requests]
        return [(s.logprob, s.greedy) for s in self._scores(fitted, "log-likelihoods", disable_tqdm)]

    def _fit(self, context: list[int], cont: list[int]) -> tuple[list[int], list[int]]:
        """Cut the context on the left so that the input (all but the last token) is no longer than the limit."""
        self.truncation.requests += 1
        context = context or [self.prefix_token_id]
        need = len(context) + len(cont) - 1
        if self.limit is None or need <= self.limit:
            return context, cont
        if len(cont) > self.limit:
            raise UserError(
                f"a continuation of {len(cont)} tokens is longer than the context of {self.limit} tokens: "
                + (
                    "raise --max-length"
                    if not self.model.cfg.max_seq_len
                    else "this model cannot be judged on this task"
                )
            )
        self.truncation.truncated += 1
        self.truncation.longest = max(self.truncation.longest, need)
        return context[need - self.limit :], cont

    def _scores(self, pairs: Sequence[tuple[Ids, Ids]], what: str, quiet: bool = False) -> list[Score]:
        """Scores in order: from the cache, or computed and put there batch by batch. Equal requests are scored once."""
        keys = [request_key("ll", ctx, cont) for ctx, cont in pairs]
        scores = {k: Score(0.0, True) for k, (_, cont) in zip(keys, pairs) if not cont}
        for key in dict.fromkeys(keys):
            if key not in scores and (found := self.cache.get(key)) is not None:
                scores[key] = Score(*found)
        todo = {k: pair for k, pair in zip(keys, pairs) if k not in scores}
        names, work = list(todo), list(todo.values())
        with self._bar(sum(len(a) + len(b) for a, b in work), what, quiet) as bar:
            for done in self.scorer.score(work):
                found = {names[i]: score for i, score in done}
                self.cache.put((k, list(s)) for k, s in found.items())
                scores |= found
                bar.update(sum(len(work[i][0]) + len(work[i][1]) for i, _ in done))
        return [scores[key] for key in keys]

    def _bar(self, total: int, what: str, quiet: bool = False) -> tqdm:
        off = quiet or not self.progress or not total
        return tqdm(total=total, desc=what, unit="tok", unit_scale=True, disable=off, file=sys.stderr, mininterval=0.5)

    # -- rolling

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole documents, each token predicted once; see ``rolling``."""
        documents = self._encode_many([r.args[0] for r in requests])
        if self.rolling == "carry":
            return self._carried(documents, disable_tqdm)
        windows: list[tuple[Ids, Ids]] = []
        owner = []
        for i, ids in enumerate(documents):
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.window, context_len=1):
                windows.append(make_disjoint_window(window))
                owner.append(i)
        totals = [0.0] * len(documents)
        for i, score in zip(owner, self._scores(windows, "rolling windows", disable_tqdm)):
            totals[i] += score.logprob
        return totals

    def _carried(self, documents: list[list[int]], quiet: bool) -> list[float]:
        keys = [request_key("carry", ids, str(self.prefix_token_id)) for ids in documents]
        longest = max(map(len, documents), default=0)
        if self.limit is not None and longest > self.limit:
            raise UserError(
                f"a document of {longest} tokens does not fit the context of {self.limit}; use --rolling windows"
            )
        totals = {k: 0.0 for k, ids in zip(keys, documents) if not ids}
        totals |= {k: found for k in dict.fromkeys(keys) if (found := self.cache.get(k)) is not None}
        todo = {k: ids for k, ids in zip(keys, documents) if k not in totals}
        names, work = list(todo), list(todo.values())
        with self._bar(sum(map(len, work)), "documents", quiet) as bar:
            for done in self.scorer.score_documents(work, self.prefix_token_id, self.window):
                found = {names[i]: score.logprob for i, score in done}
                self.cache.put(found.items())
                totals |= found
                bar.update(sum(len(work[i]) for i, _ in done))
        return [totals[key] for key in keys]

    # -- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """(context, gen_kwargs) -> the text up to the first stop string or the end of text. Greedy ones are cached."""
        contexts = self._encode_many([r.args[0] for r in requests])
        results: list[str | None] = [None] * len(requests)
        by_options: dict[str, tuple[dict[str, Any], list[int]]] = {}
        for i, request in enumerate(requests):
            options = self._options(_two(request.args)[1])
            by_options.setdefault(repr(sorted(options.items())), (options, []))[1].append(i)
        with self._bar(sum(o["max_new"] * len(m) for o, m in by_options.values()), "generations", disable_tqdm) as bar:
            for name, (options, members) in by_options.items():
                fitted = {i: self._fit_prompt(contexts[i], options["max_new"]) for i in members}
                keys = {i: request_key("generate", fitted[i], name) for i in members}
                if options["temperature"] == 0:  # samples of equal requests are meant to differ
                    results = [self.cache.get(keys[i]) if i in keys else r for i, r in enumerate(results)]
                todo = [i for i in members if results[i] is None]
                bar.update(options["max_new"] * (len(members) - len(todo)))
                for batch in self._generation_batches(todo, fitted, options):
                    texts = self._generate([fitted[i] for i in batch], options)
                    for i, text in zip(batch, texts):
                        results[i] = text
                    if options["temperature"] == 0:
                        self.cache.put((keys[i], results[i]) for i in batch)
                    bar.update(options["max_new"] * len(batch))
        return [r or "" for r in results]

    def _options(self, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Of a task -> until, max_new, temperature, top_k, top_p."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, MAX_NEW))
        max_new = int(kwargs["max_gen_toks"])
        if self.limit is not None and max_new > self.limit // 2:
            self.truncation.generations_shortened += 1
            max_new = max(1, self.limit // 2)
        sampled = bool(kwargs.get("do_sample"))
        return {
            "until": [s for s in kwargs["until"] if s],
            "max_new": max_new,
            "temperature": float(kwargs.get("temperature", 1.0)) if sampled else 0.0,
            "top_k": int(kwargs.get("top_k") or 0),
            "top_p": float(kwargs.get("top_p") or 1.0),
        }

    def _fit_prompt(self, ids: list[int], max_new: int) -> list[int]:
        self.truncation.requests += 1
        ids = ids or [self.prefix_token_id]
        if self.limit is None or len(ids) + max_new <= self.limit:
            return ids
        self.truncation.truncated += 1
        self.truncation.longest = max(self.truncation.longest, len(ids) + max_new)
        return ids[-max(1, self.limit - max_new) :]

    def _generation_batches(
        self, members: list[int], prompts: dict[int, list[int]], options: dict[str, Any]
    ) -> Iterator[list[int]]:
        """Longest prompts first; as many rows as the budget of tokens and of state holds."""
        order = sorted(members, key=lambda i: -len(prompts[i]))
        budget = self.scorer.budget
        while order:
            length = len(prompts[order[0]]) + options["max_new"]
            per_row = max(1, self.model.cost(length, self.model.embed.weight.dtype).state_bytes)
            most = max(1, min(budget.rows, budget.tokens // len(prompts[order[0]]), budget.state_bytes // per_row, 256))
            yield order[:most]
            order = order[most:]

    def _generate(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        generator = torch.Generator(self._device).manual_seed(self.seed) if options["temperature"] else None
        self.seed += 1
        until = options["until"]
        made = generate(
            self.model,
            prompts,
            options["max_new"],
            temperature=options["temperature"],
            top_k=options["top_k"],
            top_p=options["top_p"],
            generator=generator,
            eos=self.eot_token_id,
            stop=StopStrings(self.tok, until) if until else None,
        )
        return [cut_at(self.tok.decode(ids), until) for ids in made]


def _two(args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The arguments of a request that has two."""
    first, second = args
    return first, second


def _tokens_added_in_front(tok: Tokenizer) -> list[int]:
    """What the tokenizer's post-processor puts before a text (Llama's beginning of text), as lm-eval's HFLM does."""
    if tok.kind == "bytes":
        return []
    plain = tokenizers.Tokenizer.from_str(tok.json())
    ids, bare = (plain.encode("a", add_special_tokens=yes).ids for yes in (True, False))
    return next((ids[:n] for n in range(len(ids)) if ids[n : n + len(bare)] == bare), [])
