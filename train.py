"""Pretrain a model: python train.py CONFIG [key=value ...]

`train` is the whole loop, top to bottom. The order of one step:
  1. interventions and the learning rate: pure functions of the global step
  2. forward of every micro-batch: cross-entropy over the step's global number of targets, and what parts say besides
  3. weighted sum of the losses, backward
  4. mean gradients over ranks, global norm, clip, optimizer step; a non-finite step is skipped and counted
  5. model memory changes, once, from the writes of all micro-batches and ranks; moments of reset rows are zeroed
  6. log, maybe validate, maybe sample, maybe save
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs import schema
from configs.schema import RunConfig
from data import Corpus, Loader, iterate_once, open_corpus, prepare
from eval.generate import sample_text
from models import LM, Batch, UserError, build, zoo
from models.config import tiny
from models.errors import guard
from models.folder import load_model, run_config
from models.parsing import to_dict
from models.summary import summary
from models.types import CommitInfo, Stat
from training import checkpoint, interventions
from training.optim import Optimizer
from training.parallel import (
    World,
    all_reduce,
    autocast_dtype,
    broadcast_object,
    merge_stats,
    merge_writes,
    reduce_stats,
    reduce_writes,
    sync_gradients,
    world,
)
from training.runlog import (
    Meter,
    RunLog,
    StopSignal,
    Trace,
    new_run_folder,
    peak_flops,
    write_description,
    write_environment,
)


def train(cfg: RunConfig, w: World, args: argparse.Namespace) -> tuple[Path, bool]:
    """A whole run, from data to last checkpoint. -> (its folder, did it reach the last step?)"""
    corpus = open_data(cfg, w, args.resume)
    cfg = complete(cfg, corpus)
    t, d = cfg.train, cfg.data
    micro, accumulate = micro_batches(cfg, w)
    torch.manual_seed(cfg.seed + w.rank)  # dropout; weights and data order have generators of their own

    model = build(cfg.model, cfg.seed, w.device)
    model.recompute = t.recompute
    if args.init_from:
        say(w, start_from(model, args.init_from))
    interventions.freeze(model, t.freeze)
    intervene = interventions.build(t.interventions)
    optim = Optimizer(model, cfg.optim)
    loader = Loader(corpus.train, corpus.tokenizer, d.seq_len, micro, cfg.seed, w.rank, w.size, d.packing, d.max_docs_per_row)
    dtype = autocast_dtype(t.precision, w.device, sum(p.numel() for p in model.parameters()))
    autocast = partial(torch.autocast, w.device.type, dtype, enabled=dtype is not None)
    if t.compile:
        model.compile()
    dry_run(model, optim, autocast, micro, d.seq_len, w)

    start, skipped = 0, 0
    if args.resume:
        folder = Path(args.resume)
        state = checkpoint.restore(folder, model, optim, w)
        loader.load_state_dict(state["loader"])
        start, skipped = state["step"], state["skipped"]
    else:
        folder = describe(cfg, w, corpus, model)
    tokens_per_step = t.batch_size * d.seq_len
    log = RunLog(folder, t.steps, start, tokens_per_step, cfg.log, to_dict(cfg)) if w.is_main else None
    meter = Meter(start, tokens_per_step, 3 * model.cost(d.seq_len).flops_per_token, peak_flops(w.device, dtype), w.size)
    stop = StopSignal()
    trace = Trace(folder, start) if args.profile and w.is_main else None

    for step in range(start, t.steps):
        # 1. pure functions of the global step
        for change in intervene:
            change(step, t.steps, model, optim)
        model.progress.fill_(step / t.steps)
        optim.set_lr(cfg.optim.rate(step, t.steps))

        # 2. forward: the mean of `lm` over micro-batches and ranks is the mean over all targets of the step
        batches = [Batch(**loader.next()).to(w.device) for _ in range(accumulate)]
        targets, stopping = agree(batches, stop, w)
        losses, stats, writes = {}, {}, {}
        for batch in batches:
            with autocast():
                out = model(batch, denom=targets / (accumulate * w.size))
            # 3. the one point where weights are applied
            loss = model.total(out.losses) / accumulate
            loss.backward()
            losses = {name: losses.get(name, 0.0) + value.detach() / accumulate for name, value in out.losses.items()}
            writes = merge_writes(writes, out.writes)
            stats = merge_stats(stats, out.stats)

        # 4. one norm over everything that learns; a non-finite step changes nothing and is counted
        sync_gradients(optim, w)
        norm = optim.grad_norm()
        if math.isfinite(norm.item()):
            optim.clip(norm)
            optim.step()
            # 5. model memory changes, once, alike on every rank
            info = CommitInfo(step + 1, t.steps, cfg.seed, accumulate * w.size, w.size)
            resets = model.commit(reduce_writes(writes, w), info)
            optim.zero_rows(resets)
        else:
            skipped += 1
        optim.zero_grad()

        # 6. log, maybe validate, maybe sample, maybe save
        done, last = step + 1, step + 1 == t.steps
        line = {}
        if done % cfg.log.every == 0 or last:
            line = readable(losses, stats, w) | {"grad_norm": norm.item(), "lr": optim.base_lr, "skipped": skipped}
            line |= meter.read(done)
            if log:
                log.write(done, line)
        if log:
            log.progress(done, {k: line[k] for k in ("loss", "lr", "tokens_per_s", "mfu") if k in line})
        with meter.paused():
            if done % t.every("val_every") == 0 or last:
                found = validate(model, corpus, cfg, autocast, micro, w)
                if log:
                    log.write(done, {"val": found})
                    log.say(f"step {done}: validation loss {found['loss']:.4f}, {found['bpb']:.4f} bits per byte")
            if log and t.sample_every >= 0 and (done % t.every("sample_every") == 0 or last):
                log.sample(done, sample_text(model, corpus.tokenizer, t.sample_prompt, t.sample_tokens, cfg.seed))
            if done % t.every("save_every") == 0 or last or stopping:
                position = {"loader": loader.state_dict(), "skipped": skipped}
                checkpoint.save(folder, done, model, optim, position, w, t.keep)
        if trace:
            trace.after(step)
        if stopping:
            break

    loader.close()
    if log:
        write_environment(folder)
        log.close()
    if w.is_main and skipped:
        print(f"{skipped} non-finite steps were skipped", file=sys.stderr)
    return folder, not stopping or last


# -- in the loop


def agree(batches: list[Batch], stop: StopSignal, w: World) -> tuple[torch.Tensor, bool]:
    """-> (targets counted in this step over all ranks, was any rank asked to stop?), in one reduction."""
    counted = torch.stack([b.loss_mask.sum() for b in batches if b.loss_mask is not None]).sum()
    asked = torch.tensor(int(stop.asked), device=w.device)
    if w.size > 1:
        counted, asked = all_reduce(torch.stack([counted, asked]), w).unbind()
    return counted.clamp(min=1), bool(asked) if w.size > 1 else stop.asked


def readable(losses: dict[str, torch.Tensor], stats: dict[str, list[Stat]], w: World) -> dict[str, Any]:
    """Losses (mean over ranks) and stats as plain numbers; the first time the host looks at them."""
    values = all_reduce(torch.stack([v.float() for v in losses.values()]), w) / w.size
    plain = dict(zip(losses, values.tolist(), strict=True))
    return {"loss": plain["lm"], "losses": plain, "stats": reduce_stats(stats, w)}


@torch.no_grad()
def validate(
    model: LM, corpus: Corpus, cfg: RunConfig, autocast: Callable[[], Any], rows: int, w: World
) -> dict[str, float]:
    """Mean loss per target (nats), perplexity and bits per byte on the validation split, always over the same tokens."""
    d, limit = cfg.data, cfg.train.val_tokens or None
    token_bytes = torch.from_numpy(corpus.tokenizer.token_bytes())
    sums = torch.zeros(3, dtype=torch.float64)
    model.eval()
    for fields in iterate_once(
        corpus.val, corpus.tokenizer, d.seq_len, rows, d.packing, d.max_docs_per_row, w.rank, w.size, limit
    ):
        batch = Batch(**fields)
        assert batch.targets is not None
        with autocast():
            nll = model(batch.to(w.device), denom=1.0).losses["lm"]
        scored = batch.targets[batch.loss_mask]
        sums += torch.tensor([nll.item(), len(scored), token_bytes[scored].sum().item()], dtype=torch.float64)
    model.train()
    nll, count, size = all_reduce(sums.to(w.device), w).tolist()
    loss = nll / max(1, count)
    bpb = nll / math.log(2) / max(1, size)
    return {"loss": loss, "ppl": math.exp(min(loss, 700)), "bpb": bpb, "tokens": int(count), "bytes": int(size)}


# -- before the first step


def open_data(cfg: RunConfig, w: World, resumed: str | None) -> Corpus:
    """The run's corpus: the one it started with, or prepared now by rank 0 unless that was done before."""
    where = None
    if resumed:
        where = json.loads((Path(resumed) / "data.json").read_text())["dir"]
    if where is None or not Path(where).is_dir():
        where = broadcast_object(str(prepare(cfg.data).dir) if w.is_main else None, w)
    return open_corpus(where)


def complete(cfg: RunConfig, corpus: Corpus) -> RunConfig:
    """Fill in what only the data knows, and refuse what cannot work."""
    size = corpus.tokenizer.vocab_size
    model = dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or size)
    if model.vocab_size < size:
        raise UserError(f"model.vocab_size={model.vocab_size} is smaller than the {size} tokens of the tokenizer of {corpus.dir}")
    if model.learned_positions and cfg.data.seq_len > model.max_seq_len:
        raise UserError(
            f"data.seq_len={cfg.data.seq_len} is longer than the {model.max_seq_len} learned positions (model.max_seq_len)"
        )
    return dataclasses.replace(cfg, model=model)


def micro_batches(cfg: RunConfig, w: World) -> tuple[int, int]:
    """-> (rows in one forward, forwards of this rank in one step)."""
    rows = cfg.train.batch_size
    micro = cfg.train.micro_batch or rows // w.size
    if micro < 1 or rows % (micro * w.size):
        raise UserError(f"train.batch_size={rows} is not a multiple of {w.size} ranks x train.micro_batch={micro}")
    return micro, rows // (micro * w.size)


def start_from(model: LM, source: str) -> str:
    """Take the weights of a run or of a Hugging Face folder; -> a sentence that says what was taken."""
    path = Path(source)
    if (path / "config.json").is_file() and not (path / "config.yaml").is_file():
        from models.hf import load_pretrained

        other, _ = load_pretrained(path)
    else:
        other, _ = load_model(path)
    copied, fresh = checkpoint.init_from(model, other.state_dict(), source)
    names = f" ({', '.join(fresh[:3])}{', ...' if len(fresh) > 3 else ''})" if fresh else ""
    return f"{copied} tensors from {source}; {len(fresh)} keep their fresh initialisation{names}"


def dry_run(model: LM, optim: Optimizer, autocast: Callable[[], Any], rows: int, seq_len: int, w: World) -> None:
    """One forward and backward on random tokens: wrong shapes and too little memory show now, not after an hour."""
    tokens = torch.randint(model.cfg.vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(0)).to(w.device)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    try:
        with torch.random.fork_rng([w.device] if w.device.type == "cuda" else []):
            with autocast():
                out = model(Batch(tokens, tokens, everything), denom=everything.sum())
            model.total(out.losses).backward()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory with {rows} rows of {seq_len} tokens: lower train.micro_batch or data.seq_len"
        ) from error
    finally:
        optim.zero_grad()


def describe(cfg: RunConfig, w: World, corpus: Corpus, model: LM) -> Path:
    """Make the run folder and write into it what the run is. Everything that can be refused was refused before."""
    folder = Path(broadcast_object(str(new_run_folder(cfg.out_dir, cfg.name)) if w.is_main else None, w))
    text = summary(model, cfg.data.seq_len)
    say(w, text)
    if w.is_main:
        write_description(folder, to_dict(cfg), text, {"dir": str(corpus.dir.resolve()), "manifest": corpus.manifest})
        corpus.tokenizer.save(folder / "tokenizer")
    return folder


def say(w: World, text: str) -> None:
    if w.is_main:
        print(text, file=sys.stderr, flush=True)


# -- the command


def judge(cfg: RunConfig, folder: Path) -> None:
    """What the run's `eval` section asks for, on the finished run."""
    if cfg.eval.baselines:
        from eval.baselines import compare

        compare(folder)
    if cfg.eval.tasks:
        from eval.harness import evaluate, print_table

        print_table(evaluate(folder, list(cfg.eval.tasks), limit=cfg.eval.limit))


def shrink(cfg: RunConfig) -> RunConfig:
    """--tiny: the same run, small enough for two steps in seconds on a CPU."""
    data = dataclasses.replace(cfg.data, seq_len=min(cfg.data.seq_len, 64))
    small = {"steps": 2, "batch_size": 4, "micro_batch": None, "val_tokens": 2048, "sample_tokens": 16, "compile": False}
    train = dataclasses.replace(cfg.train, **small)
    name = f"{cfg.name}-tiny"
    return dataclasses.replace(cfg, name=name, model=tiny(cfg.model), data=data, train=train, eval=schema.EvalConfig())


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Pretrain a model. Under torchrun the run is data-parallel over the ranks.",
        epilog="example: python train.py configs/quickstart.yaml train.steps=500 data.sources.0.path=my.txt",
    )
    parser.add_argument("config", nargs="*", metavar="CONFIG [key=value ...]", help="a run's YAML, then overrides")
    parser.add_argument("--resume", metavar="RUN", help="continue a run folder from its newest whole checkpoint")
    parser.add_argument("--init-from", metavar="RUN_OR_DIR", help="start from the weights of a run or a Hugging Face folder")
    parser.add_argument("--freeze", metavar="PATTERN", action="append", default=[], help="parameters that do not learn, e.g. 'layers.*'")
    parser.add_argument("--profile", action="store_true", help="write a trace of five steps into the run folder")
    parser.add_argument("--tiny", action="store_true", help="shrink the model and take two steps: does this config work?")
    parser.add_argument("--allow-foreign", action="store_true", help="permit kind: package.module:Class (runs that code)")
    args = parser.parse_args(argv)
    args.overrides = [a for a in args.config if "=" in a]
    files = [a for a in args.config if "=" not in a]
    if len(files) != (0 if args.resume else 1):
        parser.error("give one CONFIG, or --resume RUN without one")
    args.file = files[0] if files else None
    return args


@guard
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    zoo.allow_foreign(args.allow_foreign)
    if args.resume:
        run_config(Path(args.resume))
        schema.check_resumable(args.overrides)
        cfg = schema.load(Path(args.resume) / "config.yaml", args.overrides)
    else:
        cfg = schema.load(args.file, [*args.overrides, *([f"train.freeze={args.freeze}"] if args.freeze else [])])
    if args.tiny:
        cfg = shrink(cfg)
    with world(cfg.train.device) as w:
        is_main = w.is_main
        folder, finished = train(cfg, w, args)
    if not is_main:
        return 0
    if not finished:
        print(f"stopped; continue with: python train.py --resume {folder}")
        return 0
    judge(cfg, folder)
    print(f"finished: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
