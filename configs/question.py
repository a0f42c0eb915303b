"""A question: one base config, named variants of it, what is measured, and how often. `ablate.py` answers it.

A question file is Python and holds ``question = Question(...)``; its docstring is what the question asks:

    question = Question(
        base="configs/mqar.yaml",
        variants={
            "gated_delta": Variant(),
            "attention": Variant(["model.blocks.base.mixer={kind: attention, heads: 4}"], to="gated_delta"),
        },
        baseline="gated_delta",
        metrics=["val/accuracy"],
    )
"""

from __future__ import annotations

import json
import re
import runpy
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs import schema
from configs.schema import RunConfig
from models.__main__ import read_model
from models.config import ModelConfig
from models.errors import UserError, nearest
from models.lm import meta_model
from models.match import match
from models.parsing import to_dict

MIN_SEEDS = 5  # nothing is called better with fewer
# In what runs of one variant may differ beside their seed: where they lie, and how they were watched and computed.
MAY_DIFFER = (
    "seed",
    "name",
    "out_dir",
    *(key for key in schema.MAY_CHANGE if key not in ("train.steps", "train.val_tokens", "eval")),
)
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
# By the last word of a metric: whether more is better, and its unit.
KNOWN = {
    **dict.fromkeys(("loss", "nll"), (False, "nats")),
    **dict.fromkeys(("bpb", "bits_per_byte"), (False, "bits per byte")),
    **dict.fromkeys(("ppl", "perplexity", "word_perplexity", "byte_perplexity"), (False, "")),
    **dict.fromkeys(("accuracy", "acc", "acc_norm", "exact_match", "f1"), (True, "")),
}


@dataclass(frozen=True)
class Metric:
    """One number of a finished run.

    ``path``: ``val/KEY/...``, a key path into the run's last validation (``val/loss``, ``val/by/pairs/16/accuracy``), or
    ``eval/TASK/METRIC``, from the files in its ``eval`` folder; of a synthetic task also ``eval/TASK/by/SLICE/LABEL/accuracy``.
    ``more_is_better`` and ``unit`` are known for the usual names.
    """

    path: str
    more_is_better: bool | None = None
    unit: str | None = None

    def __post_init__(self) -> None:
        room, _, rest = self.path.partition("/")
        if room not in ("val", "eval") or not rest:
            raise UserError(f"metric '{self.path}': expected val/KEY or eval/TASK/METRIC")
        more, unit = KNOWN.get(self.path.rpartition("/")[2], (None, ""))
        if self.more_is_better is None and more is None:
            raise UserError(
                f"metric '{self.path}': is more of it better? Metric('{self.path}', more_is_better=True or False)"
            )
        object.__setattr__(self, "more_is_better", more if self.more_is_better is None else self.more_is_better)
        object.__setattr__(self, "unit", unit if self.unit is None else self.unit)

    @property
    def direction(self) -> str:
        """With its unit, "nats, less is better"."""
        return f"{self.unit}, " * bool(self.unit) + f"{'more' if self.more_is_better else 'less'} is better"


@dataclass(frozen=True)
class Curve:
    """One number of a finished run at several settings, drawn over them and not compared.

    ``path``: that of a `Metric`, with {} where each of ``over`` is put in: ``eval/length/loss_{}`` over (256, 1024, 8192), or
    ``val/by/distance/{}/accuracy`` over ("2-3", "4-7"). ``label`` is what these are.
    """

    path: str
    over: Sequence[int | float | str]
    label: str
    more_is_better: bool | None = None
    unit: str | None = None

    def __post_init__(self) -> None:
        if "{}" not in self.path or not self.over:
            raise UserError(f"curve '{self.path}': expected a path with {{}} in it, and at least one setting")
        self.metrics()

    def metrics(self) -> tuple[Metric, ...]:
        return tuple(Metric(self.path.format(x), self.more_is_better, self.unit) for x in self.over)


@dataclass(frozen=True)
class Variant:
    """What differs from the base: overrides ``key.path=value``, or a function of the base config.

    With ``to``, the name of another variant, `models.match.match` then varies the integer ``vary`` until both have equal ``on``
    (params, active_params, flops or state). With ``tuned_as``, the name of another variant, it takes what the question's sweep chose
    for that one, and is not tried itself.
    """

    changes: Sequence[str] | Callable[[RunConfig], RunConfig] = ()
    to: str | None = None
    on: str = "params"
    vary: str = "channel.hidden"
    multiple_of: int = 1
    tuned_as: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A setting of which every variant gets the value that suits it, so that none is judged at another one's.

    ``key``: ``optim.lr`` or another setting outside of the model. Each variant is trained with each of ``values`` on ``seeds``,
    which the comparison never sees; the value with the best mean of the question's first metric is the variant's (of equals the
    first).
    """

    key: str
    values: Sequence[float | int | str]
    seeds: Sequence[int] = (1000,)

    def __post_init__(self) -> None:
        if schema.is_under(self.key, ("model", "seed", "name", "out_dir", "eval")):
            raise UserError(f"sweep: '{self.key}' cannot be chosen by it; expected a setting of optim, train or data")
        names = {self.folder(v) for v in self.values}
        if isinstance(self.values, str) or len(names) < max(2, len(self.values)) or not all(map(NAME.fullmatch, names)):
            raise UserError(
                f"sweep of {self.key}: expected at least two different numbers or names, got {self.values!r}"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"sweep of {self.key}: expected different seeds from 0, got {self.seeds!r}")

    def at(self, cfg: RunConfig, value: float | int | str) -> RunConfig:
        """The run with that value."""
        return schema.changed(cfg, [f"{self.key}={json.dumps(value)}"])

    def folder(self, value: float | int | str) -> str:
        """Of the runs at that value; without a =, which makes an override of a command's word: ``optim.lr_0.01``."""
        return f"{self.key}_{value}"


@dataclass(frozen=True)
class Question:
    """Variants of ``base`` (a run's YAML), each compared with ``baseline`` by every metric, over the same seeds.

    ``seeds``: how many, from 0, or which. ``sweep``: what is chosen for every variant before. ``alpha``: the chance of any claimed
    difference where none is.
    ``name`` and ``text`` are those of the file.
    """

    base: str
    variants: Mapping[str, Variant]
    baseline: str
    metrics: Sequence[str | Metric] = ("val/loss",)
    seeds: int | Sequence[int] = MIN_SEEDS
    alpha: float = 0.05
    curves: Sequence[Curve] = ()
    sweep: Sweep | None = None
    name: str = "question"
    text: str = ""

    def __post_init__(self) -> None:
        for name, variant in self.variants.items():
            if not NAME.fullmatch(name):
                raise UserError(f"variant '{name}': a name is made of letters, digits and . _ + -")
            if not isinstance(variant, Variant):
                raise UserError(f"variant '{name}': expected Variant(...), got {variant!r}")
            if isinstance(variant.changes, str):
                raise UserError(f"variant '{name}': expected a list of overrides, got the text {variant.changes!r}")
            if variant.to is not None and variant.to not in self.variants:
                raise UserError(
                    f"variant '{name}': no variant '{variant.to}' to match{nearest(variant.to, self.variants)}"
                )
            if variant.tuned_as is not None and variant.tuned_as not in self.tried():
                raise UserError(
                    f"variant '{name}': '{variant.tuned_as}' is not tried by a sweep{nearest(variant.tuned_as, self.tried())}"
                )
        if self.baseline not in self.variants:
            raise UserError(f"no variant '{self.baseline}' to be the baseline{nearest(self.baseline, self.variants)}")
        if len(self.variants) < 2:
            raise UserError("a question needs at least two variants")
        if isinstance(self.metrics, str | Metric) or not self.metrics:
            raise UserError(f"metrics: expected a list of at least one, got {self.metrics!r}")
        self.all_metrics()
        seeds = self.all_seeds()
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise UserError(f"seeds: expected a number of at least 1, or different numbers from 0, got {self.seeds!r}")
        if self.sweep and (both := set(seeds) & set(self.sweep.seeds)):
            raise UserError(
                f"sweep: seed {min(both)} chooses {self.sweep.key} and is compared too: take others for one of them"
            )
        if not 0 < self.alpha < 1:
            raise UserError(f"alpha must be between 0 and 1, got {self.alpha}")

    def all_seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seeds) if isinstance(self.seeds, int) else self.seeds)

    def tried(self) -> tuple[str, ...]:
        """The variants that the sweep trains."""
        return tuple(name for name, v in self.variants.items() if v.tuned_as is None) if self.sweep else ()

    def all_metrics(self) -> tuple[Metric, ...]:
        return tuple(Metric(m) if isinstance(m, str) else m for m in self.metrics)


def load_question(path: str | Path) -> Question:
    """Run a question file -> its question. Raises UserError, with the line, for whatever is wrong in it."""
    path = Path(path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"no question '{path}'{nearest(path.name, siblings)}")
    try:
        found = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}{_line(error, path)}: {_said(error)}") from error
    question = found.get("question")
    if not isinstance(question, Question):
        raise UserError(f"{path}: no 'question = Question(...)' in it")
    return replace(question, name=path.stem, text=(found.get("__doc__") or "").strip())


def _line(error: BaseException, path: Path) -> str:
    """Where in the file an error arose."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _said(error: BaseException) -> str:
    """A user's error as it is, any other with its kind."""
    return str(error) if getattr(error, "one_line", False) else f"{type(error).__name__}: {error}"


# -- from a question to configs


def resolve(question: Question, overrides: Sequence[str] = (), tiny: bool = False) -> dict[str, RunConfig]:
    """The config of every variant: base, then ``overrides``, then its own changes, then what makes its budget equal.

    Raises UserError that names the variant for anything that cannot be trained.
    """
    found: dict[str, RunConfig] = {}

    def one(name: str, asking: tuple[str, ...] = ()) -> RunConfig:
        if name in asking:
            raise UserError(f"matched in a circle: {' -> '.join((*asking, name))}")
        if name not in found:
            variant = question.variants[name]
            to = one(variant.to, (*asking, name)) if variant.to else None
            try:
                found[name] = _config(question, variant, overrides, to)
            except Exception as error:
                raise UserError(f"variant '{name}': {_said(error)}") from error
        return found[name]

    for name in question.variants:
        one(name)
    shrunk = {name: schema.shrink(cfg) for name, cfg in found.items()} if tiny else found
    return {name: shrunk[name] for name in question.variants}


def _config(question: Question, variant: Variant, overrides: Sequence[str], to: RunConfig | None) -> RunConfig:
    if callable(variant.changes):
        cfg = variant.changes(schema.load(question.base, overrides))
        if not isinstance(cfg, RunConfig):
            raise UserError(f"its function must return a RunConfig, got {cfg!r}")
    else:
        cfg = schema.load(question.base, [*overrides, *variant.changes])
    if to is not None:
        how = {"on": variant.on, "vary": variant.vary, "multiple_of": variant.multiple_of}
        equal = match(with_vocabulary(cfg), with_vocabulary(to), seq_len=cfg.data.seq_len, **how).config
        cfg = replace(cfg, model=replace(equal, vocab_size=cfg.model.vocab_size))
    meta_model(with_vocabulary(cfg))  # refuses what does not fit together
    return cfg


def other_setting(before: RunConfig, now: RunConfig) -> str | None:
    """The first setting that makes these configs of two variants, in words; None if they are of one."""
    for key, old, new in schema.differences(before, now):
        filled_in = key == "model.vocab_size" and not new
        if not schema.is_under(key, MAY_DIFFER) and not filled_in:
            return f"'{key}' is {old!r} there, {new!r} here"
    return None


def with_vocabulary(cfg: RunConfig) -> ModelConfig:
    """The model with the vocabulary that its data will give it."""
    return read_model(to_dict(cfg), cfg.name)
