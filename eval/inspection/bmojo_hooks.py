"""Where a layer of B'MOJO can be watched and changed from outside: around the attention that its forward calls, and in its options.

The size of the eidetic memory and its score are no weights, so other ones can be tried on a trained model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from eval.inspection import hooks
from models import LM, UserError
from models.errors import nearest
from models.mixers import bmojo, bmojo_decode
from models.mixers.bmojo import BMojo
from models.mixers.bmojo_scores import CONTROLS

Attend = Callable[..., Tensor]  # `kernels.memory_attention.memory_attention`
ABLATIONS = {
    "no_eidetic[@LAYER]": "no key of a token that was kept",
    "no_fading[@LAYER]": "no key of an output of the state-space mixer",
    "keep:N[@LAYER]": "N tokens are kept, also more than in training",
    "score:KIND[@LAYER]": f"tokens are kept by {', '.join(CONTROLS)} in place of the score",
}


def mixers(model: LM) -> dict[int, BMojo]:
    """By layer; those with a window, without which there is one key and nothing to choose."""
    return {n: part for n, _, part in model.parts() if isinstance(part, BMojo) and part.cfg.window}


@contextlib.contextmanager
def attending(over: Iterable[BMojo], change: Callable[[BMojo, Attend], Attend]) -> Iterator[None]:
    """Inside, these layers attend as ``change`` makes it of the layer and the op. Of nested changes the last made acts first."""

    def within(part: BMojo, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as stack:
                for module in (bmojo, bmojo_decode):
                    stack.enter_context(
                        hooks.changed([module], "memory_attention", lambda _, attend: change(part, attend))
                    )
                return forward(*args, **kwargs)

        return run

    with hooks.changed(over, "forward", within):
        yield


def _without(names: Sequence[str]) -> Callable[[BMojo, Attend], Attend]:
    """Attention that is not given these arguments."""

    def change(_: BMojo, attend: Attend) -> Attend:
        return lambda *rows, **given: attend(*rows, **{name: x for name, x in given.items() if name not in names})

    return change


LEFT_OUT = {"no_eidetic": ("index", "since", "pool"), "no_fading": ("fading_k", "fading_v")}


# -- by name


@contextlib.contextmanager
def ablate(model: LM, spec: str) -> Iterator[None]:
    """Inside, the model runs with what ``spec`` names: one of ABLATIONS, or several joined by ``+``. Raises UserError."""
    with contextlib.ExitStack() as stack:
        for change in [_parse(model, one) for one in spec.split("+")]:
            stack.enter_context(change)
        yield


def check(model: LM, spec: str) -> None:
    """Raise UserError, one line, for what `ablate` would refuse."""
    for one in spec.split("+"):
        _parse(model, one)


def standard(model: LM) -> list[str]:
    """What is tried when nothing is asked for: each kind of memory that there is, in all layers and alone, and chance as a score."""
    here = mixers(model)
    kept = [n for n, part in here.items() if part.cfg.m_e]
    fading = [n for n, part in here.items() if part.cfg.m_f]
    specs = [name for name, layers in (("no_eidetic", kept), ("no_fading", fading)) if layers]
    specs += ["score:random"] if any(here[n].cfg.score != "random" for n in kept) else []
    return specs + [f"no_eidetic@{n}" for n in kept if len(here) > 1]


def _parse(model: LM, spec: str) -> contextlib.AbstractContextManager[None]:
    rest, at, where = spec.strip().partition("@")
    name, colon, value = rest.partition(":")
    known = [form.split("[")[0].split(":")[0] for form in ABLATIONS]
    if name not in known:
        raise UserError(f"--ablate {spec}: unknown ablation '{name}'{nearest(name, known)}")
    if bool(colon) != (name in ("keep", "score")):
        form = next(f for f in ABLATIONS if f.startswith(name))
        raise UserError(f"--ablate {spec}: write it as {form}")
    option = "m_f" if name == "no_fading" else "m_e"
    here = {n: part for n, part in mixers(model).items() if getattr(part.cfg, option)}
    if not here:
        raise UserError(f"--ablate {spec}: no layer has one, {option} is 0")
    over = [here[hooks.one_of(spec, "layer", where, here)]] if at else [*here.values()]
    if name in LEFT_OUT:
        return attending(over, _without(LEFT_OUT[name]))
    other = _option(spec, name, value)
    return hooks.changed(over, "cfg", lambda _, cfg: replace(cfg, **other))


def _option(spec: str, name: str, value: str) -> dict[str, Any]:
    if name == "score":
        if value not in CONTROLS:
            raise UserError(f"--ablate {spec}: no score '{value}'{nearest(value, CONTROLS)}")
        return {"score": value}
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"--ablate {spec}: give a number of tokens, at least 1; no_eidetic keeps none")
    return {"m_e": int(value)}
