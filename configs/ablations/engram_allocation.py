"""Experts or rows of an n-gram table: where do parameters help that a token does not touch?

Engram's allocation law (arXiv:2601.07372, section 3) in small: a mixture of experts gives a share 1 - rho of its sparse parameters
to hashed tables of two- and three-token n-grams; total parameters and operations per token stay (`models.allocation`). The paper
finds the least loss at rho of 0.75 to 0.8, with ten times as many parameters as active ones; here they are six times as many. Beside
that, the question that a dense model asks: the same memory on top of it, against a feed-forward layer that is wider by as many
operations. Losses also by how often the last two tokens stood together in training: frequent n-grams are where a table can know
something. Everything else is equal, the learning rates too. Another corpus: data.sources.0.path=FILE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from configs.question import Metric, Question, Variant, with_vocabulary
from configs.schema import RunConfig
from models.allocation import allocate


def share(rho: float) -> Callable[[RunConfig], RunConfig]:
    """The base with this share of its sparse parameters in experts."""

    def allocated(cfg: RunConfig) -> RunConfig:
        found = allocate(with_vocabulary(cfg), rho, cfg.data.seq_len).config
        return replace(cfg, model=replace(found, vocab_size=cfg.model.vocab_size))

    return allocated


def bucket(least: int) -> Metric:
    return Metric(f"eval/frequency/loss_{least}", more_is_better=False, unit="nats")


DENSE = [f"model.blocks.{block}.channel={{kind: swiglu, hidden: 276}}" for block in ("plain", "engram")]

question = Question(
    base="configs/engram-moe-small.yaml",
    variants={
        "experts_only": Variant(share(1.0)),
        "rho_0.8": Variant(share(0.8)),
        "rho_0.6": Variant(share(0.6)),
        "rho_0.4": Variant(share(0.4)),
        "rho_0.2": Variant(share(0.2)),
        "dense_engram": Variant(DENSE),
        "dense_flops": Variant([*DENSE, "model.blocks.engram.memory=null"], to="dense_engram", on="flops"),
    },
    baseline="experts_only",
    metrics=["val/loss", bucket(0), bucket(1), bucket(10), bucket(100), bucket(1000)],
    seeds=3,
)
