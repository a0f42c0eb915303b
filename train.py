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
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs import schema
from configs.schema import RunConfig
from data import Corpus, Loader, Stream, Synthetic, open_corpus, prepare
from eval import asked, suites
from eval.generate import sample_text
from eval.validation import sentence, validate
from models import LM, Batch, UserError, build, zoo
from models.errors import guard
from models.folder import run_config
from models.parsing import from_dict, to_dict
from models.stores.sharded import serving
from models.summary import summary
from models.types import CommitInfo, Stat
from training import checkpoint, interventions
from training.dryrun import dry_run, random_batch
from training.optim import Optimizer
from training.parallel import (
    World,
    all_reduce,
    autocast_dtype,
    merge_stats,
    merge_writes,
    on_main,
    reduce_stats,
    reduce_writes,
    sync_gradients,
    world,
)
from training.runfolder import (
    new_run_folder,
    write_config,
    write_description,
    write_environment,
    write_finished,
    write_outcome,
)
from training.runlog import Meter, RunLog, StopSignal, Trace, check_loggers, peak_flops


def train(cfg: RunConfig, w: World, args: argparse.Namespace, stop: StopSignal) -> tuple[Path, bool]:
    """A whole run, from data to last checkpoint. -> (its folder, did it reach the last step?)"""
    data = open_data(cfg, w, args.resume)
    cfg = complete(cfg, data)
    t, d = cfg.train, cfg.data
    micro, accumulate = t.micro_batches(w.size)
    torch.manual_seed(cfg.seed + w.rank)  # dropout; weights and data order have generators of their own

    model = build(cfg.model, cfg.seed, w.device)
    if data.tokenizer is not None:
        model.use_tokenizer(data.tokenizer.json())
    model.recompute = t.recompute
    if args.init_from:
        say(w, checkpoint.init_from(model, args.init_from))
    optim = Optimizer(model, cfg.optim)
    interventions.freeze(optim, t.freeze)
    intervene = interventions.build(t.interventions)
    loader = open_loader(data, cfg, micro, w)
    dtype = autocast_dtype(t.precision, w.device, sum(p.numel() for p in model.parameters()))
    autocast = partial(torch.autocast, w.device.type, dtype, enabled=dtype is not None)
    if t.compile:
        model.compile()
    packed = "stream" if isinstance(data, Synthetic) else d.packing
    example = random_batch(micro, d.seq_len, cfg.model.vocab_size, packed, d.max_docs_per_row)
    dry_run(model, optim, autocast, example, w)

    start, skipped = 0, 0
    if args.resume:
        folder = Path(args.resume)
        state = checkpoint.restore(folder, model, optim, w)
        schema.check_resumable(from_dict(RunConfig, state["config"]), cfg)
        loader.load_state_dict(state["loader"])
        start, skipped = state["step"], state["skipped"]
        say(w, f"resumed {folder} after step {start} of {t.steps}")
        if w.is_main:
            write_config(folder, to_dict(cfg))
            write_environment(folder)
    else:
        folder = describe(cfg, w, data, model, interventions.notes(intervene, t.steps, model))
    tokens_per_step = t.batch_size * d.seq_len
    log = RunLog(folder, t.steps, start, tokens_per_step, cfg.log, to_dict(cfg)) if w.is_main else None
    flops = 3 * model.cost(d.seq_len).flops_per_token
    meter = Meter(start, tokens_per_step, flops, peak_flops(w.device, dtype), w.size)
    trace = Trace(folder, start) if args.profile and w.is_main else None
    stop.arm()
    stopping = False

    for step in range(start, t.steps):
        # 1. pure functions of the global step
        for change in intervene:
            change(step, t.steps, model, optim)
        model.progress.fill_(step / t.steps)
        optim.set_lr(cfg.optim.rate(step, t.steps))

        # 2. forward: the mean of `lm` over micro-batches and ranks is the mean over all targets of the step
        batches = [as_batch(loader.next()).to(w.device) for _ in range(accumulate)]
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
            line |= interventions.reports(intervene, done, t.steps, model) | meter.read(done)
            if log:
                log.write(done, line)
        if log:
            log.progress(done, {k: line[k] for k in ("loss", "lr", "tokens_per_s", "mfu") if k in line})
        with meter.paused():
            if done % t.every("val_every") == 0 or last:
                found = validate(model, data, cfg, autocast, micro, w)
                if log:
                    log.write(done, {"val": found})
                    log.say(f"step {done}: {sentence(found)}")
            if cfg.eval.suites and (done % (cfg.eval.suite_every or -(-t.steps // 20)) == 0 or last):
                found = suites.during(model, cfg.eval.suites, cfg.eval.suite_rows, autocast, w)
                if log:
                    log.write(done, {"suite": found})
            wanted = t.sample_every >= 0 and (done % t.every("sample_every") == 0 or last)
            if wanted and data.tokenizer is not None:
                with serving(model.tables()):
                    if log:
                        text = sample_text(model, data.tokenizer, t.sample_prompt, t.sample_tokens, cfg.seed)
                        log.sample(done, text)
            if done % t.every("save_every") == 0 or last or stopping:
                position = {"loader": loader.state_dict(), "skipped": skipped, "config": to_dict(cfg)}
                checkpoint.save(folder, done, model, optim, position, w, t.keep)
        if trace:
            trace.after(step)
        if stopping and not last:
            break
    else:
        stopping = False

    loader.close()
    if trace:
        trace.close()
    if log:
        write_outcome(folder, w.device, {name: table.stats() for name, table in model.tables().items()})
        log.close()
    if skipped:
        say(w, f"{skipped} non-finite steps were skipped")
    return folder, not stopping


# -- in the loop


def as_batch(fields: Mapping[str, Any]) -> Batch:
    """What the loader hands out, as the model takes it."""
    return Batch(**fields)


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


# -- before the first step


def open_data(cfg: RunConfig, w: World, resumed: str | None) -> Corpus | Synthetic:
    """The run's synthetic task, or its corpus: the one it started with, or prepared now by rank 0 unless that was done before."""
    if cfg.data.synthetic is not None:
        return Synthetic(cfg.data)
    where, weights = on_main(partial(find_data, cfg, resumed), w)
    corpus = open_corpus(where, verify=resumed is not None)
    shards = [(source, weight) for (source, _), weight in zip(corpus.train, weights, strict=True)]
    rows = [row | {"weight": weight} for row, weight in zip(corpus.manifest["sources"], weights, strict=True)]
    return dataclasses.replace(corpus, train=shards, manifest=corpus.manifest | {"sources": rows})


def find_data(cfg: RunConfig, resumed: str | None) -> tuple[str, list[float]]:
    """-> (prepared folder, weight of each source in this run)."""
    if resumed:
        try:
            known = json.loads((Path(resumed) / "data.json").read_text())
            where, weights = known["dir"], [float(row["weight"]) for row in known["manifest"]["sources"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{resumed}: data.json, which names the run's data, is missing or damaged") from error
        if Path(where).is_dir():
            return where, weights
    corpus = prepare(cfg.data)
    return str(corpus.dir.resolve()), [weight for _, weight in corpus.train]


def open_loader(data: Corpus | Synthetic, cfg: RunConfig, rows: int, w: World) -> Stream:
    """This rank's endless batches of ``rows`` rows."""
    if isinstance(data, Synthetic):
        return data.train(rows, cfg.seed, w.rank, w.size)
    d = cfg.data
    packing = d.packing, d.max_docs_per_row
    return Loader(data.train, data.tokenizer, d.seq_len, rows, cfg.seed, w.rank, w.size, *packing)


def complete(cfg: RunConfig, data: Corpus | Synthetic) -> RunConfig:
    """Fill in what only the data knows, and refuse what cannot work."""
    model = dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or data.vocab_size)
    if model.vocab_size < data.vocab_size:
        whose = (
            f"the task's {data.vocab_size} ids"
            if isinstance(data, Synthetic)
            else f"the tokenizer's {data.vocab_size} ids ({data.dir})"
        )
        raise UserError(f"model.vocab_size={model.vocab_size} is smaller than {whose}")
    if model.learned_positions and cfg.data.seq_len > model.max_seq_len:
        limit = f"model.max_seq_len={model.max_seq_len}"
        raise UserError(f"data.seq_len={cfg.data.seq_len} is longer than the learned positions, {limit}")
    if isinstance(data, Corpus):
        asked.check_text(cfg, data)
    return dataclasses.replace(cfg, model=model)


def describe(cfg: RunConfig, w: World, data: Corpus | Synthetic, model: LM, notes: list[str]) -> Path:
    """Make the run folder and write into it what the run is. Everything that can be refused was refused before."""
    text = "\n".join([summary(model, cfg.data.seq_len), *notes])
    say(w, text)

    def write() -> Path:
        folder = new_run_folder(cfg.out_dir, cfg.name)
        try:
            write_description(folder, to_dict(cfg), text, data.record())
            if data.tokenizer is not None:
                data.tokenizer.save(folder / "tokenizer")
        except (OSError, UserError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(f"cannot write {folder}: {error}") from error
        return folder

    return on_main(write, w)


def say(w: World, text: str) -> None:
    if w.is_main:
        print(text, file=sys.stderr, flush=True)


# -- the command


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="train.py CONFIG [key=value ...] [options]   or   train.py --resume RUN [key=value ...]",
        description="Pretrain a model. Under torchrun the run is data-parallel over the ranks.",
        epilog="example: python train.py configs/quickstart.yaml train.steps=500 data.sources.0.path=my.txt",
    )
    flag = partial(parser.add_argument, action="store_true")
    parser.add_argument("config", nargs="*", metavar="CONFIG [key=value ...]", help="a run's YAML, then overrides")
    parser.add_argument("--resume", metavar="RUN", help="continue a run folder from its newest whole checkpoint")
    parser.add_argument("--init-from", metavar="RUN_OR_DIR", help="take the weights of a run or a Hugging Face folder")
    parser.add_argument(
        "--freeze", metavar="PATTERN", action="append", help="what does not learn, e.g. 'layers.*.mixer.*'"
    )
    flag("--profile", help=f"write a trace of {Trace.STEPS} steps into the run folder")
    flag("--tiny", help="shrink the model and take two steps: does this config work?")
    flag("--allow-foreign", help="permit kind: package.module:Class (runs that code)")
    args = parser.parse_intermixed_args(argv)
    args.overrides = [a for a in args.config if "=" in a]
    files = [a for a in args.config if "=" not in a]
    if len(files) != (0 if args.resume else 1):
        parser.error("give one CONFIG, or --resume RUN without one")
    if args.resume and (args.init_from or args.freeze or args.tiny):
        parser.error("--resume continues a run as it is: no --init-from, --freeze or --tiny")
    args.file = files[0] if files else None
    return args


def settings(args: argparse.Namespace) -> RunConfig:
    """The run's config from its file and the command line."""
    if args.resume:
        run_config(Path(args.resume))
        file = Path(args.resume) / "config.yaml"
        cfg = schema.load(file, args.overrides)
        schema.check_resumable(schema.load(file), cfg)
        return cfg
    cfg = schema.load(args.file, args.overrides)
    if args.freeze:
        train = dataclasses.replace(cfg.train, freeze=(*cfg.train.freeze, *args.freeze))
        cfg = dataclasses.replace(cfg, train=train)
    return schema.shrink(cfg) if args.tiny else cfg


@guard
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    zoo.allow_foreign(args.allow_foreign)
    cfg = settings(args)
    check_loggers(cfg.log)
    with world(cfg.train.device) as w, StopSignal() as stop:
        is_main = w.is_main
        on_main(partial(asked.check, cfg), w)
        folder, finished = train(cfg, w, args, stop)
    if not is_main:
        return 0
    if not finished:
        print(f"stopped; continue with: python train.py --resume {folder}")
        return 0
    asked.answer(cfg, folder)
    write_finished(folder)
    print(f"finished: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
