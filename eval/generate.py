"""Sample from a run: ``python -m eval.generate RUN --prompt "..."``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from data.tokenizer import Tokenizer
from eval.decoding import Decoder, generate, run_decoder
from eval.run import LoadedRun, open_run
from eval.streams import StopStrings, TextStream, cut_at
from models import LM, LMState, UserError, state
from models.errors import guard

__all__ = ["generate", "main", "sample_text"]

EXAMPLE = """examples:
  python -m eval.generate runs/quickstart --prompt "def " --max-tokens 200 --temperature 0.8 --seed 1
  python -m eval.generate runs/quickstart --prompt-file book.txt --max-tokens 0 --save-state book.safetensors
  python -m eval.generate runs/quickstart --load-state book.safetensors --prompt "In short, " --max-tokens 100
"""


def sample_text(
    model: LM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new: int,
    seed: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
) -> str:
    """``prompt`` and its continuation by at most ``max_new`` tokens, for a look during training.

    The model comes back in the mode it was in, and the global random generators are not touched.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    limit = model.cfg.max_seq_len
    if limit:
        max_new = max(0, min(max_new, limit - len(ids)))
    generator = torch.Generator(model.embed.weight.device).manual_seed(seed)
    training = model.training
    model.eval()
    try:
        made = generate(model, [ids], max_new, temperature, top_p=top_p, generator=generator, eos=tokenizer.eos_id)
    finally:
        model.train(training)
    return prompt + tokenizer.decode(made[0])


def save_state(decoder: Decoder, path: str | Path, run: LoadedRun) -> None:
    """The memory of one sequence, with the id that it has not read yet; the header says of which weights and tokenizer it is.

    Raises UserError when the disk refuses; nothing half-written stays behind.
    """
    tokens = int(decoder.state.seen.max()) + len(decoder.last)
    about = {"pending": decoder.last, "tokens": tokens, "run": run.name}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        state.save(decoder.state, temporary, **about, checkpoint=run.checkpoint, tokenizer=run.tokenizer.fingerprint)
        os.replace(temporary, path)
    except UserError:
        raise
    except Exception as error:  # safetensors wraps I/O failures in an error of its own
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load_decoder(run: LoadedRun, path: str | Path, more: list[int], max_new: int) -> Decoder:
    """A decoder that goes on from a saved memory, after the ids ``more``; the file is only read, so any number may branch from it.

    Raises UserError for a state of other weights or another tokenizer, and where the context gets longer than the model's.
    """
    if not Path(path).is_file():
        raise UserError(f"no state at '{path}'")
    about = state.about(path)
    if about.get("checkpoint") != run.checkpoint:
        whose = about.get("run", "unknown")
        raise UserError(f"{path}: saved from other weights ({whose}), its memory means nothing to these")
    if about.get("tokenizer") != run.tokenizer.fingerprint:
        raise UserError(f"{path}: saved with another tokenizer, its ids spell something else here")
    _check_room(run, about["tokens"] + len(more), max_new)
    seen = state.load(path, run.model.init_state(1, 1), run.model.embed.weight.device)
    room = about["tokens"] + len(more) + max_new
    pending = [*about["pending"], *more]
    return Decoder.resume(run.model, _with_room(seen, run.model.init_state(1, room)), pending)


def _check_room(run: LoadedRun, tokens: int, max_new: int) -> None:
    limit = run.model.cfg.max_seq_len
    if limit and tokens + max_new > limit:
        raise UserError(
            f"{tokens} prompt tokens and {max_new} new ones do not fit the context of {limit} of this model"
            + (f"; --max-tokens {limit - tokens} does" if tokens < limit else "")
        )


def _with_room(saved: LMState, empty: LMState) -> LMState:
    """A state made for fewer tokens inside one made for more: buffers grow at their ends, and take this model's dtype."""

    def grow(old: Any, new: Any) -> Any:
        if not isinstance(old, Tensor):
            return old
        old = old.to(new.dtype)
        if old.shape == new.shape or any(o > n for o, n in zip(old.shape, new.shape)):
            return old
        new = new.clone()
        new[tuple(slice(0, n) for n in old.shape)] = old
        return new

    return pytree.tree_map(grow, saved, empty)


# -- the command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m eval.generate",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", help="a run folder, or a model exported in Hugging Face format")
    p.add_argument("--prompt", default="", help="text to continue; empty: a new document")
    p.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file")
    p.add_argument("--max-tokens", type=int, default=256)
    p.add_argument("--temperature", type=float, default=0.8)
    p.add_argument("--top-k", type=int, default=0, help="keep the k most likely tokens (0: all)")
    p.add_argument("--top-p", type=float, default=1.0, help="keep the most likely tokens up to this probability")
    p.add_argument("--greedy", action="store_true", help="always the most likely token")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--samples", type=int, default=1, help="continuations of the same prompt, which is read once")
    p.add_argument("--stop", action="append", default=[], metavar="STR", help="end before this text (repeatable)")
    p.add_argument("--save-state", metavar="FILE", help="keep the model's memory of all that was read and written")
    p.add_argument(
        "--load-state", metavar="FILE", help="go on from a kept memory, as often as you like; --prompt comes after it"
    )
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", help="float32, bfloat16, float16; default: that of the weights")
    p.add_argument("--step", type=int, help="an older checkpoint")
    p.add_argument("--progress", type=float, metavar="P", help="as if training had come so far, 0 to 1 (temperatures)")
    p.add_argument("--tables", metavar="KIND", help="where tables are kept: resident, host, or mmap (left in the file)")
    p.add_argument("--allow-foreign", action="store_true", help="let a config run code from outside this repository")
    return p


@guard
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    _check(args)
    prompt = _read_prompt(args)
    run = open_run(args.run, args.device, args.dtype, args.step, args.allow_foreign, args.progress, args.tables)
    decoder = _start(run, args, prompt)
    if args.samples > 1:
        decoder.select([0] * args.samples)
    tokenizer = run.tokenizer
    printer = _Printer(tokenizer, args.stop) if args.samples == 1 else None
    if printer is not None:
        printer.write(prompt)
    made = run_decoder(
        decoder,
        args.max_tokens,
        0.0 if args.greedy else args.temperature,
        args.top_k,
        args.top_p,
        torch.Generator(run.model.embed.weight.device).manual_seed(args.seed),
        tokenizer.eos_id,
        StopStrings(tokenizer, args.stop) if args.stop else None,
        printer,
    )
    if printer is not None:
        printer.finish()
    else:
        for n, ids in enumerate(made):
            print(f"--- sample {n + 1}\n{prompt}{cut_at(tokenizer.decode(ids), args.stop)}")
    if args.save_state:
        save_state(decoder, args.save_state, run)
        print(f"state after {int(decoder.state.seen[0]) + 1} tokens: {args.save_state}", file=sys.stderr)
    return 0


def _start(run: LoadedRun, args: argparse.Namespace, prompt: str) -> Decoder:
    ids = run.tokenizer.encode(prompt)
    if args.load_state:
        return load_decoder(run, args.load_state, ids, args.max_tokens)
    ids = [run.tokenizer.bos_id, *ids]
    _check_room(run, len(ids), args.max_tokens)
    return Decoder(run.model, [ids], args.max_tokens)


def _read_prompt(args: argparse.Namespace) -> str:
    if not args.prompt_file:
        return args.prompt
    try:
        return args.prompt + Path(args.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file: cannot read '{args.prompt_file}': {error}") from error


def _check(args: argparse.Namespace) -> None:
    if args.samples < 1 or args.max_tokens < 0:
        raise UserError("--samples must be at least 1 and --max-tokens at least 0")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.top_k < 0:
        raise UserError("--temperature and --top-k must not be negative, --top-p must be above 0 and at most 1")
    if args.save_state and args.samples > 1:
        raise UserError("--save-state keeps one sequence: use it with --samples 1")


class _Printer:
    """Streams text, but holds back what could be the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str], out: Callable[[str], Any] | None = None) -> None:
        self.stream = TextStream(tokenizer)
        self.stop = [s for s in stop if s]
        self.hold = max(map(len, self.stop), default=1) - 1
        self.shown = 0
        self.write = out or self._to_terminal

    def __call__(self, row: int, token: int) -> None:
        self.stream.push(token)
        self._show(len(cut_at(self.stream.text, self.stop)) if self._ended() else len(self.stream.text) - self.hold)

    def finish(self) -> None:
        self.stream.flush()
        self._show(len(cut_at(self.stream.text, self.stop)))
        self.write("\n")

    def _ended(self) -> bool:
        return any(s in self.stream.text[max(0, self.shown - self.hold) :] for s in self.stop)

    def _show(self, end: int) -> None:
        if end > self.shown:
            self.write(self.stream.text[self.shown : end])
            self.shown = end

    @staticmethod
    def _to_terminal(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
